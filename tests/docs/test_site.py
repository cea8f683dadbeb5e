"""What the site makes of the pages: links, settings, results, the reference. `make docs` builds it, strictly."""

import json
import re
from dataclasses import fields

import pytest
import site_api
import site_blocks
import site_figures
import site_links
import yaml
from docs_pages import PAGES, ROOT
from site_links import BrokenLink, rewrite_links

import hf_efficient

DOCS = ROOT / "docs"
OWN = {path.relative_to(DOCS).as_posix(): path for path in PAGES}
INCLUDED = {uri: ROOT / path for path, uri in site_links.included_files().items()}
SITE = OWN | {uri: path for uri, path in INCLUDED.items() if uri.endswith(".md")}
PLACES = site_links.page_uris([*OWN, *INCLUDED])


@pytest.mark.parametrize("uri", SITE)
def test_links_and_blocks_of_every_page(uri):
    markdown = site_blocks.expand_blocks(rewrite_links(SITE[uri].read_text("utf-8"), uri, PLACES))
    assert "{{" not in markdown


@pytest.fixture(scope="module")
def reference():
    """What the reference describes: names in full, and the modules and classes all of whose members it has."""
    directives = re.findall(
        r"^::: (\S+)(\n    options: \{members: false)?", "\n".join(site_api.api_pages().values()), re.M
    )
    return {name: not alone for name, alone in directives}


@pytest.mark.parametrize("uri", SITE)
def test_links_to_code_lead_into_the_reference(uri, reference):
    """The strict build refuses others."""
    markdown = site_blocks.expand_blocks(rewrite_links(SITE[uri].read_text("utf-8"), uri, PLACES))
    for name in re.findall(r"\]\[(hf_efficient[\w.]*)\]", markdown):
        owners = [name.rsplit(".", cut)[0] for cut in range(1, name.count(".") + 1)]
        assert name in reference or any(reference.get(owner) for owner in owners), name


def test_every_page_stands_in_the_navigation():
    settings = (DOCS / "site" / "mkdocs.yml").read_text("utf-8")
    assert set(re.findall(r": ([\w/]+\.md)$", settings, re.MULTILINE)) == {
        uri for uri in SITE if not uri.startswith("model_cards/")
    }


def test_nothing_is_fetched():
    """Fonts, scripts and plug-ins that a browser or the build would load from elsewhere."""
    settings = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text("utf-8"))
    assert settings["theme"]["font"] is False
    assert settings["strict"]
    plugins = [name if isinstance(name, str) else next(iter(name)) for name in settings["plugins"]]
    assert plugins == ["search", "mkdocstrings"]
    assert not any("://" in path for path in settings["extra_css"])


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../architecture.md#halting)", "[a](../architecture.md#halting)"),
        ("[a](../../CHANGELOG.md)", "[a](../changelog.md)"),
        ("[a](../../README.md)", "[a](../index.md)"),
        (
            "[`a`](../../hf_efficient/training/trainer.py#SegmentTrainer)",
            "[`a`][hf_efficient.training.trainer.SegmentTrainer]",
        ),
        ("[a](../../hf_efficient/ops/__init__.py)", "[a][hf_efficient.ops]"),
        ("[a](../../examples/quick_cpu.yaml)", "a"),
        ("[a](https://arxiv.org/abs/1901.02860)", "[a](https://arxiv.org/abs/1901.02860)"),
        ("[a](#here)", "[a](#here)"),
        ("```text\n[a](nowhere.md)\n```", "```text\n[a](nowhere.md)\n```"),
        ("| `head \\| tail` | [a](../index.md) |", "| `head | tail` | [a](../index.md) |"),
    ],
)
def test_link_is_rewritten(link, expected):
    assert rewrite_links(link, "architectures/reformer.md", PLACES) == expected


def test_included_page_links_from_where_it_stood():
    page = "[notes](../../benchmarks/README.md) ![curve](reproductions/ponder_cost.png)"
    expected = "[notes](benchmarks.md) ![curve](reproductions/ponder_cost.png)"
    assert rewrite_links(page, "results.md", PLACES) == expected


def test_broken_link_is_found():
    with pytest.raises(BrokenLink, match="docs/index.md: the link to nowhere.md"):
        rewrite_links("[a](nowhere.md)", "index.md", PLACES)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_that_links_give_are_there(page):
    """`file.py#name`, and `file.py#Class.method`."""
    for target, name in re.findall(r"\]\(([^()#]+\.py)#([\w.]+)\)", page.read_text("utf-8")):
        source = (page.parent / target).read_text("utf-8")
        for word in name.split("."):
            assert re.search(rf"^ *(?:class|def) {word}\b|^{word}\b.* =", source, re.MULTILINE), (target, name)


def test_layers_to_wrap_are_there():
    """The table of docs/training.md, and the blocks that models name themselves."""
    page = (DOCS / "training.md").read_text("utf-8")
    rows = re.search(
        r"^\| Architecture \| `transformer_layer_cls_to_wrap` \|\n(.*?)\n\n", page, re.MULTILINE | re.DOTALL
    )
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "hf_efficient" / "models").rglob("*.py"))
    named = re.findall(r"`(\w+)`", rows[1])
    assert [name for name in named if not re.search(rf"^class {name}\(", sources, re.MULTILINE)] == []
    assert len(rows[1].splitlines()) - 1 == len(site_api.architectures())


CONFIGS = [name for name in hf_efficient.__all__ if name.endswith("Config")]


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_have_meanings_and_a_page(name):
    config = getattr(hf_efficient, name)
    rows = site_blocks.config_table(name).splitlines()[2:]
    own = {field.name for field in fields(config)} - {field.name for field in fields(config.__mro__[1])}
    assert {row.split("`")[1] for row in rows} >= own
    assert all(row.rstrip(" |").endswith(".") for row in rows)
    assert any(f'config_table("{name}")' in path.read_text("utf-8") for path in PAGES)


def test_unknown_block_is_found():
    with pytest.raises(ValueError, match="is none of"):
        site_blocks.expand_blocks("{{ table_of(1) }}")


@pytest.mark.parametrize("page", ["performance.md", "choosing.md"])
def test_figures_are_read_not_typed(page):
    text = site_blocks.BLOCK.sub("", (DOCS / page).read_text("utf-8"))
    assert re.findall(r"\d", text) == []


def test_crossing_is_that_of_the_report():
    """benchmarks/reformer_vs_sdpa.py computes the same for the page of all results."""
    report = (ROOT / "benchmarks" / "results" / "README.md").read_text("utf-8")
    assert f"faster than the Llama from about {site_blocks.crossing('reformer_vs_sdpa', 's')} tokens on" in report
    assert int(site_blocks.crossing("reformer_vs_sdpa", "mb").replace(",", "")) < 2048


def test_price_of_halting_is_that_of_the_report():
    report = (ROOT / "benchmarks" / "results" / "README.md").read_text("utf-8")
    found = re.findall(r"time is ([\d.]+) to ([\d.]+) times n / N", report)
    low, high = min(low for low, _ in found), max(high for _, high in found)
    assert site_blocks.halting_price() == f"{low} to {high}"
    assert site_blocks.halting_share() == f"{100 / float(high):.0f} %"


def test_reproduced_figure_is_the_mean_of_the_seeds():
    report = (ROOT / "benchmarks" / "results" / "README.md").read_text("utf-8")
    for name in ("Evolved", "Transformer with", "Transformer, 2"):
        cell = re.search(rf"^\| {name}.*? \| +[\d,]+ \| [^|]* \| +([\d.]+)", report, re.MULTILINE)[1]
        assert abs(float(site_blocks.reproduced("translation", name, "bleu", "4")) - float(cell)) < 0.06


def test_measured_figure_is_that_of_the_file():
    (row,) = (row for row in site_blocks.rows_of("reformer_vs_sdpa") if row["name"].endswith("/64K"))
    assert site_blocks.measured("reformer_vs_sdpa/64K", "ratio") == f"{row['ratio']:.3g}"
    with pytest.raises(ValueError, match="no such row"):
        site_blocks.measured("reformer_vs_sdpa/63K", "ratio")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0272, "s", "27.2 ms"), (101.2, "s", "101 s"), (2919.7, "mb", "2,920 MB"), (0.7664, "", "0.766"), (2, "", "2")],
)
def test_figure_for_reading(value, unit, text):
    assert site_blocks.with_unit(value, unit) == text


def test_every_benchmark_is_on_the_performance_page():
    page = site_blocks.expand_blocks((DOCS / "performance.md").read_text("utf-8"))
    report = (ROOT / "benchmarks" / "results" / "README.md").read_text("utf-8")
    missing = set(re.findall(r"^## (\w+)$", report, re.MULTILINE)) - set(re.findall(r"\(results\.md#(\w+)\)", page))
    assert missing <= {"ptb_memory", "reformer_duplication", "reformer_quality"}  # quality, not speed: in the results


def test_figures_are_drawn_and_the_same_every_time():
    drawn = site_figures.figures()
    assert drawn == site_figures.figures()
    named = re.findall(r'figure\("(\w+)"', "".join(path.read_text("utf-8") for path in DOCS.glob("*.md")))
    assert {f"figures/{name}.svg" for name in named} == drawn.keys()


def test_reference_has_every_public_name():
    index = site_api.index_page()
    for module in ("hf_efficient", *(f"hf_efficient.{room}" for room in site_api.rooms() if room != "plots")):
        exported = {name for name, _, _ in site_api.exported(module)}
        assert exported == set(__import__(module, fromlist=["__all__"]).__all__)
        assert all(f"| [`{name}`]" in index for name in exported)


def test_every_public_name_has_a_summary():
    modules = ("hf_efficient", *(f"hf_efficient.{room}" for room in site_api.rooms() if room != "plots"))
    assert [name for module in modules for name, _, summary in site_api.exported(module) if not summary] == []


def test_reference_has_every_architecture():
    folders = {path.parent.name for path in (ROOT / "hf_efficient" / "models").glob("*/__init__.py")}
    assert site_api.architectures().keys() == folders
    assert all(f"architectures/{name}.md" in OWN for name in folders)


def test_results_of_json_are_readable():
    """A guard for the blocks above: result files are lists of rows with these fields."""
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        for row in json.loads(path.read_text("utf-8")):
            assert {
                "name",
                "ratio",
                "ours_s",
                "peer_s",
                "ours_mb",
                "peer_mb",
                "config",
                "machine",
                "date",
            } <= row.keys()
