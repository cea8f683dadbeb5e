"""Links that are right twice: in the repository they lead to files, on the site to pages.

A link to a Python file of the package leads to that module's place in the API reference, and one with a name behind
`#` to that function or class, where its source can be unfolded. A file that is no page becomes plain text.
"""

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "hf_efficient"

# Files outside docs/ that are pages or pictures of the site, and their places there.
INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/README.md": "results.md",
    "benchmarks/results/reproductions/ponder_cost.png": "reproductions/ponder_cost.png",
    "examples/README.md": "recipes.md",
    "model_cards/README.md": "model_cards/index.md",
}
# Where a link to a file leads whose text stands elsewhere on the site.
SAME_AS = {"README.md": "index.md", "hf_efficient/__init__.py": "api/index.md"}

FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)\s*?$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


class BrokenLink(ValueError):
    """A link that leads nowhere."""


def included_files() -> dict[str, str]:
    """`INCLUDED`, and every model card with its pictures."""
    cards = [path for path in (ROOT / "model_cards").iterdir() if path.suffix in (".md", ".png")]
    return {f"model_cards/{path.name}": f"model_cards/{path.name}" for path in cards} | INCLUDED


def source_path(uri: str) -> str:
    """The file of the repository that the page `uri` was made from."""
    sources = {place: path for path, place in included_files().items()}
    return sources.get(uri, f"docs/{uri}")


def page_uris(uris: Iterable[str]) -> dict[str, str]:
    """For every file of the repository that is on the site, its place there."""
    return {source_path(uri): uri for uri in uris} | SAME_AS


def rewrite_links(markdown: str, uri: str, pages: dict[str, str]) -> str:
    """The page `uri` with its links as the site needs them. Raises BrokenLink for one that leads nowhere."""
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: rewrite_link(link, uri, pages), unescape_bars(part)) for part in parts[::2]]
    return "".join(parts)


def unescape_bars(text: str) -> str:
    """Bars in inline code are escaped for GitHub's tables; Python-Markdown would show the backslash."""
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace("\\|", "|"), text)


def rewrite_link(link: re.Match[str], uri: str, pages: dict[str, str]) -> str:
    """One link of the page `uri`."""
    mark, text, target = link.groups()
    file, _, name = target.partition("#")
    if "://" in target or not file:
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source_path(uri)), file))
    if path in pages:
        place = posixpath.relpath(pages[path], posixpath.dirname(uri) or ".")
        return f"{mark}[{text}]({place}{'#' + name if name else ''})"
    if not (ROOT / path).exists():
        raise BrokenLink(f"{source_path(uri)}: the link to {target} leads nowhere")
    if path.startswith(f"{PACKAGE}/") and path.endswith(".py") and (name or "/models/" not in path):
        return f"[{text}][{identifier(path, name)}]"
    return text


def identifier(path: str, name: str) -> str:
    """Dotted name of a Python file of the package, or of `name` in it."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"{module}.{name}" if name else module
