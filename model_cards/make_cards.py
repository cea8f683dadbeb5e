"""Write the cards of this folder from what the runs recorded: `python model_cards/make_cards.py`. See README.md."""

import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_efficient.hub import write_model_card
from hf_efficient.hub.model_card import adapt_usage
from hf_efficient.plots import plot_loss, plot_memory

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "benchmarks"))

from experiments import draw_curves, reproduction_card, rows_in_order, script_card  # noqa: E402 (needs the folder just added)
from reproductions import ponder_cost  # noqa: E402
from reproductions.rows import RESULTS, TABLES  # noqa: E402

RECORDS, NOTES = HERE / "records", HERE / "notes"
LICENSE = "apache-2.0"


@dataclass(frozen=True)
class Notes:
    """What a person adds to a card: metadata, words for its head, and words for the end of its sections by title."""

    metadata: dict[str, Any]
    head: str
    sections: dict[str, str]


def read_notes(name: str, folder: Path = NOTES) -> Notes:
    """The notes on a card: metadata between two ---, then Markdown with the titles of sections."""
    _, metadata, text = (folder / f"{name}.md").read_text("utf-8").split("---\n", 2)
    head, *parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))
    return Notes(yaml.safe_load(metadata), head.strip(), sections)


def add_notes(card: str, notes: Notes) -> str:
    """The card with the notes at the end of its head and of its sections; new sections stand before its limits."""
    head, *parts = re.split(r"^(?=## )", card, flags=re.MULTILINE)
    parts = {part.partition("\n")[0].removeprefix("## "): part.rstrip() for part in parts}
    limits = parts.pop("Limits")
    for title, text in notes.sections.items():
        if title != "Limits":
            parts[title] = parts[title] + f"\n\n{text}" if title in parts else f"## {title}\n\n{text}"
    parts["Limits"] = f"{limits}\n{notes.sections.get('Limits', '')}".rstrip()
    return "\n\n".join(filter(None, [head.rstrip(), notes.head, *parts.values()])) + "\n"


def run_card(name: str, report: dict[str, Any], notes: Notes) -> str:
    """The card that a run of `hf-efficient` writes of itself. Its pictures are named after the run."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, name)
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report), "utf-8")
        (folder / "config.json").write_text(json.dumps(report["settings"].get("model", {})), "utf-8")
        for picture in pictures_of(report):
            (folder / picture).touch()
        card = write_model_card(folder, LICENSE, notes.metadata["language"]).read_text("utf-8")
    card = adapt_usage(card, f"runs/{name}", with_code=False)  # where the command in it puts the model
    return re.sub(r"\]\((\w+\.png)\)", rf"]({name}_\1)", card)


def pictures_of(report: dict[str, Any]) -> list[str]:
    """Names of the pictures that there are of a run."""
    return ["loss.png", *(["memory.png"] if "memory_curve" in report else [])]


def read_records(folder: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """The record of each run, by the name of its card."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


def render() -> dict[str, str]:
    """All cards: name to text."""
    cards = {}
    for name, record in read_records().items():
        notes = read_notes(name)
        make = run_card if "architecture" in record else script_card
        cards[name] = add_notes(make(name, record, notes), notes)
    for table in TABLES:
        name = f"reproduction_{table}"
        notes = read_notes(name)
        cards[name] = add_notes(reproduction_card(name, table, notes), notes)
    return cards


def draw() -> None:
    """The pictures of all cards."""
    for name, record in read_records().items():
        plot_loss(record["history"], HERE / f"{name}_loss.png")
        if "memory_curve" in record:
            trained = record["settings"]["model"]["mem_len"]
            plot_memory(record["memory_curve"], HERE / f"{name}_memory.png", trained)
    for table in TABLES:
        draw_curves(rows_in_order(table), HERE / f"reproduction_{table}_loss.png")
    shutil.copy(RESULTS.parent / ponder_cost.FIGURE, HERE / "reproduction_ponder_cost_steps.png")


def main() -> int:
    """Write the cards and their pictures."""
    for name, card in render().items():
        (HERE / f"{name}.md").write_text(card, "utf-8")
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
