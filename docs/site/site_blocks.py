"""What pages do not hold but ask for: `{{ name("argument") }}` becomes a table or a figure, made while building."""

import ast
import contextlib
import functools
import importlib
import io
import json
import math
import os
import re
from dataclasses import MISSING, Field, fields
from inspect import getdoc
from pathlib import Path
from typing import Any
from unittest import mock

from site_contract import contract_models, contract_table, contract_versions
from site_links import ROOT
from site_tables import table

BLOCK = re.compile(r"\{\{ (\w+)\(([^{}]*)\) \}\}")
BENCHMARKS = ROOT / "benchmarks"
UNITS = {"s": ["s"], "mb": ["MB"]}


def expand_blocks(markdown: str) -> str:
    """The page with every block filled in. Raises ValueError for a block that does not exist."""
    return BLOCK.sub(lambda block: expand(block[1], block[2]), markdown)


def expand(name: str, arguments: str) -> str:
    """What one block stands for; its arguments are literals."""
    if name not in BLOCKS:
        raise ValueError(f"{{{{ {name}({arguments}) }}}} is none of {', '.join(BLOCKS)}.")
    return BLOCKS[name](*ast.literal_eval(f"({arguments},)" if arguments else "()"))


# --- settings ---------------------------------------------------------------------------------------------


def config_table(name: str) -> str:
    """All settings of a configuration class of hf_efficient: name, type, default, meaning from its docstring."""
    config = getattr(importlib.import_module("hf_efficient"), name)
    inherited = {field.name for field in fields(config.__mro__[1])}
    meanings = field_meanings(config)
    own = [field for field in fields(config) if field.name not in inherited]
    if missing := [field.name for field in own if field.name not in meanings]:
        raise ValueError(f"the docstring of {name} says nothing about {', '.join(missing)}.")
    rows = [[f"`{f.name}`", f"`{type_text(f)}`", f"`{default_of(f)!r}`", meanings[f.name]] for f in own]
    return table(["Setting", "Type", "Default", "Meaning"], rows)


def field_meanings(config: type) -> dict[str, str]:
    """What the docstring of a configuration says about each setting."""
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", getdoc(config), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def default_of(field: Field) -> Any:
    """The default of a field."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def type_text(field: Field) -> str:
    """The type of a field as it is written."""
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def aliases_table(name: str) -> str:
    """The further names that a configuration class accepts for its settings."""
    config = getattr(importlib.import_module("hf_efficient"), name)
    rows = [[f"`{old}`", f"`{new}`"] for old, new in config.attribute_map.items()]
    return table(["Also accepted", "Setting"], rows)


def presets_table(module: str) -> str:
    """The sizes that a configuration's `from_preset` knows, with the settings that differ from the defaults."""
    presets = importlib.import_module(f"hf_efficient.models.{module}.presets").PRESETS
    rows = [
        [f"`{name}`", ", ".join(f"`{key}={value!r}`" for key, value in preset.items())]
        for name, preset in presets.items()
    ]
    return table(["Preset", "Settings"], rows)


HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


def heads_table() -> str:
    """Which Auto class builds which class of each architecture."""
    import transformers

    import hf_efficient

    rows = []
    for name in sorted(name for name in hf_efficient.__all__ if name.endswith("Config")):
        config = getattr(hf_efficient, name)
        classes = [getattr(transformers, auto)._model_mapping.get(config, None) for auto in HEADS]
        rows.append([f"`{config.model_type}`", *(f"`{found.__name__}`" if found else "" for found in classes)])
    return table(["Type", *(f"`{auto}`" for auto in HEADS)], rows)


def command_help(words: str) -> str:
    """What `hf-efficient WORDS --help` prints; without words, `hf-efficient --help`."""
    from hf_efficient.cli.__main__ import run

    output = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(output):
        run([*words.split(), "--help"])
    return f"```text\n{output.getvalue().rstrip()}\n```"


def command_pages() -> str:
    """A section with its help for every command, and for every task of `train`."""
    from hf_efficient.cli.__main__ import COMMANDS
    from hf_efficient.cli.pair_tasks import PAIR_TASKS

    tasks = {"train": [f"train --task {task}" for task in PAIR_TASKS]}
    pages = [words for name in COMMANDS for words in (name, *tasks.get(name, ()))]
    return "\n\n".join(f"## {words}\n\n{command_help(words)}" for words in pages)


# --- results ----------------------------------------------------------------------------------------------


@functools.cache
def rows_of(benchmark: str) -> list[dict[str, Any]]:
    """The rows of a benchmark's result file."""
    return json.loads((BENCHMARKS / "results" / f"{benchmark}.json").read_text("utf-8"))


def row_of(case: str) -> dict[str, Any]:
    """One row by its name, which is benchmark/case."""
    for row in rows_of(case.split("/")[0]):
        if row["name"] == case:
            return row
    raise ValueError(f"{case}: no such row in benchmarks/results.")


def measured(case: str, field: str) -> str:
    """One figure of a row: `ratio`, or seconds or megabytes of `ours` or the `peer`."""
    value = row_of(case)[field]
    return with_unit(value, field.rpartition("_")[2])


def setting(case: str, key: str) -> str:
    """One setting that a row was measured with."""
    value = row_of(case)["config"][key]
    return f"{value:,}" if isinstance(value, int) else str(value)


def with_unit(value: float, unit: str) -> str:
    """A figure for reading, three digits of it."""
    if unit == "s" and value < 1:
        return f"{digits(1000 * value)} ms"
    return " ".join([digits(value), *UNITS.get(unit, ())])


def detail(case: str, *keys: str) -> str:
    """A figure among the details of a row, found by `keys`, one inside the other."""
    return digits(functools.reduce(lambda found, key: found[key], keys, row_of(case)["details"]))


def percent(case: str, *keys: str) -> str:
    """The same for a share, in percent."""
    share = functools.reduce(lambda found, key: found[key], keys, row_of(case)["details"])
    return f"{100 * share:.0f} %"


def crossing(benchmark: str, unit: str) -> str:
    """The length from which on ours needs less than the peer (`s` or `mb`), read between the logarithms."""
    rows = sorted(rows_of(benchmark), key=lambda row: row["config"]["length"])
    points = [(row["config"]["length"], row[f"peer_{unit}"] / row[f"ours_{unit}"]) for row in rows]
    (low, below), (high, above) = next(
        pair for pair in zip(points, points[1:], strict=False) if pair[0][1] < 1 <= pair[1][1]
    )
    share = math.log(below) / (math.log(below) - math.log(above))
    return f"{round(low * (high / low) ** share, -2):,.0f}"


def halting_prices() -> list[float]:
    """What halting takes, relative to a time proportional to the steps taken, in every case measured."""
    rows = [row for row in rows_of("ut_act_speed") if row["config"]["halted_keys"] == "refresh"]
    return [
        row["ours_s"] / row["peer_s"] * row["config"]["max_steps"] / row["config"]["mean_ponder_time"] for row in rows
    ]


def halting_price() -> str:
    """The lowest and the highest of them."""
    return f"{min(halting_prices()):.2f} to {max(halting_prices()):.2f}"


def halting_share() -> str:
    """The share of steps up to which halting saves time, whatever the case."""
    return f"{100 / max(halting_prices()):.0f} %"


def reproduced(experiment: str, name: str, *keys: str) -> str:
    """A result of a reproduced experiment, mean of the seeds; `name` is how the row's name begins."""
    rows = [row for row in rows_of(f"reproductions/{experiment}") if row["row"].startswith(name)]
    values = [functools.reduce(lambda found, key: found[key], keys, row["results"]) for row in rows]
    return digits(sum(values) / len(values))


def digits(value: float) -> str:
    """Three digits, with a comma in thousands."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def comparison(benchmark: str) -> str:
    """All rows of a benchmark, both sides beside each other, and what they were measured with."""
    rows = [
        [
            row["name"].split("/", 1)[1],
            row["config"]["peer"],
            *(with_unit(row[f"{side}_s"], "s") for side in ("ours", "peer")),
            digits(row["ratio"]),
            *(digits(row[f"{side}_mb"]) for side in ("ours", "peer")),
        ]
        for row in rows_of(benchmark)
    ]
    unit = rows_of(benchmark)[0]["config"]["unit"]
    header = ["Case", "Peer", f"Ours, per {unit}", "Peer", "Peer / ours", "Ours, MB", "Peer, MB"]
    return table(header, rows, align="llrrrrr") + "\n\n" + conditions(benchmark)


def figure(name: str, text: str) -> str:
    """A figure that site_figures.py draws; `text` says what is on it."""
    return f"![{text}](figures/{name}.svg)"


def conditions(benchmark: str) -> str:
    """Machine, versions and day of a benchmark, in a line."""
    row = rows_of(benchmark)[0]
    machine, versions = row["machine"], row["versions"]["ours"]
    return (
        f"*{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:g} GB; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {row['date']}. "
        f"[Everything about it](results.md#{benchmark}).*"
    )


def memory(benchmark: str) -> str:
    """The rows of a benchmark of which only the memory is to be read."""
    rows = [
        [
            row["name"].split("/", 1)[1],
            row["config"]["peer"],
            *(digits(row[f"{side}_mb"]) for side in ("ours", "peer")),
            digits(row["ours_mb"] / row["peer_mb"]),
        ]
        for row in rows_of(benchmark)
    ]
    header = ["Case", "Peer", "Ours, MB", "Peer, MB", "Ours / peer"]
    return table(header, rows, align="llrrr") + "\n\n" + conditions(benchmark)


def comparisons(prefix: str, title: str) -> str:
    """A section on every benchmark whose name begins so, what it measures and its rows; nothing if there is none."""
    names = sorted(path.stem for path in (BENCHMARKS / "results").glob(f"{prefix}*.json"))
    parts = [f"{summary(BENCHMARKS / f'{name}.py')}\n\n{comparison(name)}" for name in names]
    return "\n\n".join([f"## {title}", *parts] if parts else [])


def reproductions() -> str:
    """A section for every reproduced experiment, with its tables from the page that benchmarks/report.py writes."""
    page = (BENCHMARKS / "results" / "README.md").read_text("utf-8")
    parts = []
    for name in sorted(path.stem for path in (BENCHMARKS / "results" / "reproductions").glob("*.json")):
        section = re.search(rf"^## {name}$(.*?)(?=^- Machine)", page, re.MULTILINE | re.DOTALL)
        tables = re.findall(r"(?:^\|.*\n)+", section[1], re.MULTILINE) if section else []
        title = summary(BENCHMARKS / "reproductions" / f"{name}.py").rstrip(".")
        parts += [f"### {title}", *tables, f"*[Everything about it](results.md#{name}).*"] if tables else []
    return "\n\n".join(parts)


def summary(script: Path) -> str:
    """The first paragraph of a script's docstring."""
    docstring = ast.get_docstring(ast.parse(script.read_text("utf-8")))
    return " ".join(docstring.split("\n\n")[0].split())


# --- all of them -----------------------------------------------------------------------------------------

BLOCKS = {
    "aliases_table": aliases_table,
    "command_help": command_help,
    "command_pages": command_pages,
    "comparison": comparison,
    "comparisons": comparisons,
    "config_table": config_table,
    "contract_models": contract_models,
    "contract_table": contract_table,
    "contract_versions": contract_versions,
    "crossing": crossing,
    "detail": detail,
    "figure": figure,
    "halting_price": halting_price,
    "halting_share": halting_share,
    "heads_table": heads_table,
    "measured": measured,
    "memory": memory,
    "percent": percent,
    "presets_table": presets_table,
    "reproduced": reproduced,
    "reproductions": reproductions,
    "setting": setting,
}
