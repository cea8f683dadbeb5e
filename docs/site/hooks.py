"""What mkdocs runs while it builds: pages from elsewhere in the repository, the API reference, generated blocks."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_api import api_nav, api_pages
from site_blocks import expand_blocks
from site_figures import figures
from site_links import ROOT, BrokenLink, included_files, page_uris, rewrite_links


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the model cards and the API reference to the navigation."""
    cards = [
        uri for uri in sorted(included_files().values()) if uri.startswith("model_cards/") and uri.endswith(".md")
    ]
    config.nav += [{"Model cards": sorted(cards, key=lambda uri: "index" not in uri)}, {"API reference": api_nav()}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that do not lie in docs/."""
    for path, uri in included_files().items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for uri, content in {**api_pages(), **figures()}.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and turn links to files into links to pages."""
    uri = page.file.src_uri
    try:
        pages = page_uris(file.src_uri for file in files)
        return expand_blocks(rewrite_links(markdown, uri, pages))
    except (BrokenLink, ValueError) as error:
        raise PluginError(f"{uri}: {error}") from error
