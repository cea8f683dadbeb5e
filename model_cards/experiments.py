"""Cards of experiments: a table of small models that were trained and tested alike, or one script of `examples/`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from reproductions import ponder_cost
from reproductions.rows import SETTINGS, read_rows, read_settings
from reproductions.runner import table_module
from reproductions.summary import by_row, mean_of

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "experiment_card.jinja"
BENCHMARK_NOTES = HERE.parent / "benchmarks" / "notes"


def reproduction_card(name: str, table: str, notes: Any) -> str:
    """The card of a table of the reproductions: its results, what they say, how the models were trained."""
    rows = rows_in_order(table)
    module = table_module(table)
    return render_card(
        notes.metadata | {"name": name},
        list(measured(rows, notes.metadata["metrics"])),
        description=module.__doc__.strip(),
        results=module.table(rows).replace(ponder_cost.FIGURE, f"{name}_steps.png"),
        verdict=(BENCHMARK_NOTES / f"{table}.md").read_text("utf-8").strip(),
        facts=reproduction_facts(rows),
        settings=(SETTINGS / f"{table}.yaml").read_text("utf-8").strip(),
        command="\n".join(reproduction_commands(table, rows)),
    )


def rows_in_order(table: str) -> list[dict[str, Any]]:
    """The finished rows of a table, seed by seed in the order of its settings."""
    order = list(read_settings(table))
    return sorted(read_rows(table), key=lambda row: (row["seed"], order.index(row["row"])))


def reproduction_commands(table: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """A command for each seed, which names the rows unless it is all of them."""
    every = list(read_settings(table))
    for seed in sorted({row["seed"] for row in rows}):
        names = [row["row"] for row in rows if row["seed"] == seed]
        chosen = "" if names == every else " --rows " + " ".join(f'"{name}"' for name in names)
        yield f"python benchmarks/reproduce.py --data data --tables {table} --seeds {seed}{chosen}"


def reproduction_facts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What a table's models have in common, and the size and cost of each."""
    sizes = {name: of_row[0]["training"]["parameters"] for name, of_row in by_row(rows)}
    seconds = sum(row["training"]["seconds"] for row in rows)
    machines = sorted({f"{row['machine']['cpu']}, {row['device']}, {row['threads']} thread(s)" for row in rows})
    return [
        ("Trainings", f"{len(rows)}, one for each row and seed"),
        ("Parameters", "; ".join(f"{name}: {size:,}" for name, size in sizes.items())),
        ("Time", f"{seconds:,.0f} CPU seconds for all trainings together, without the tests"),
        ("Hardware", "; ".join(machines)),
        ("Versions", "; ".join(sorted({describe_versions(row["versions"]) for row in rows}))),
        ("Date", ", ".join(sorted({row["date"] for row in rows}))),
    ]


def measured(rows: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """Type, name and value of each figure of each row, means over the seeds; none where a row has no such figure."""
    for name, of_row in by_row(rows):
        for metric in metrics:
            value = mean_of(of_row, *metric["path"])
            if value is not None:
                yield metric["type"], f"{metric['name']}, {name}", value


def script_card(name: str, record: dict[str, Any], notes: Any) -> str:
    """The card of a script of `examples/`, from the record of its run."""
    return render_card(
        notes.metadata | {"name": name},
        list(printed(record["output"], notes.metadata["metrics"])),
        description=record["description"],
        results=f"What the script printed:\n\n```text\n{record['output'].strip()}\n```",
        verdict="",
        facts=[
            ("Parameters", f"{record['parameters']:,}"),
            ("Updates", f"{record['steps']:,}"),
            ("Time", f"{record['seconds']:,.0f} s, the measuring included"),
            ("Hardware", record["hardware"]),
            ("Versions", describe_versions(record["versions"])),
            ("Date", record["date"]),
        ],
        settings="",
        command=record["command"],
    )


def printed(output: str, metrics: list[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """Type, name and value of the figures in what a script printed, found by regular expressions.

    Raises ValueError if one is not there.
    """
    for metric in metrics:
        found = re.search(metric["pattern"], output)
        if found is None:
            raise ValueError(f"pattern {metric['pattern']!r} finds nothing in what the script printed.")
        yield metric["type"], metric["name"], float(found[1])


def render_card(metadata: dict[str, Any], figures: list[tuple[str, str, float]], **words: Any) -> str:
    """A card with these figures in its model index."""
    data = ModelCardData(
        license="apache-2.0",
        language=metadata["language"],
        library_name="transformers",
        pipeline_tag=metadata["pipeline_tag"],
        tags=["hf_efficient", *metadata["tags"]],
        model_name=metadata["name"],
        eval_results=[
            EvalResult(
                task_type=metadata["pipeline_tag"],
                task_name=metadata["task"],
                dataset_type=metadata["dataset"],
                dataset_name=metadata["dataset"],
                dataset_split=metadata["split"],
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
            )
            for kind, name, value in figures
        ],
    )
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), metadata=metadata, **words)
    return str(card)


def describe_versions(versions: dict[str, str]) -> str:
    """`python 3.11.7, torch 2.13.0, ...`"""
    return ", ".join(f"{package} {number}" for package, number in versions.items())


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """The training loss of every row, those of the first seed, against updates."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Loss while training", loc="left", fontsize=13, fontweight="bold")
    axes.set(xlabel="updates", ylabel="training loss")
    axes.set_prop_cycle(color=matplotlib.colormaps["tab10"].colors)
    for name, of_row in by_row(rows):
        curve = of_row[0]["training"]["curve"]
        axes.plot([point["step"] for point in curve], [point["loss"] for point in curve], linewidth=1.6, label=name)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    # No date or version in the file, so that the same numbers give the same picture.
    figure.savefig(path, metadata={"Software": None})
