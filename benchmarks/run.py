"""Run a benchmark: `python benchmarks/run.py NAME [--json FILE]`. See benchmarks/README.md."""

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

from harness import CheckFailed, Row, Settings, WorkerFailed, format_table, write_rows

BENCHMARKS = (
    "xl_decode",
    "xl_eval_window",
    "xl_train_step",
    "ptb_memory",
    "reformer_forward",
    "reformer_train",
    "reformer_vs_sdpa",
    "reformer_depth_memory",
    "reformer_decode",
    "reformer_duplication",
    "reformer_quality",
    "ut_decode",
    "ut_act_speed",
    "ut_fixed_vs_llama",
    "et_train",
    "et_decode",
)


def load(name: str) -> ModuleType:
    """The module of a benchmark: `TARGETS`, `CASES`, `measure(case, settings)`, perhaps `table`, `summarise`."""
    return importlib.import_module(name)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    defaults = {field.name: field.default for field in fields(Settings)}
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Time both sides of a comparison in turns, print a table and write rows of JSON.",
    )
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, help="which benchmark", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and their cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, after each case")
    parser.add_argument("--keep", action="store_true", help="keep that file's rows of cases that are not run now")
    parser.add_argument("--case", action="append", help="only this case; may be repeated; default all")
    parser.add_argument("--threads", type=int, default=defaults["threads"], help="CPU threads of each side")
    parser.add_argument("--rounds", type=int, default=defaults["rounds"], help="timings of each side, in turns")
    parser.add_argument(
        "--min-seconds", type=float, default=defaults["min_seconds"], help="repeat the work this long per timing"
    )
    parser.add_argument(
        "--legacy-python", help="a Python with transformers 4.35.2; default: one made under .benchmarks/, once"
    )
    parser.add_argument("--data", help="folder of the data set (ptb_memory: ptb.train.txt.gz, ptb.test.txt.gz, ...)")
    chosen = parser.parse_args(arguments)
    if not chosen.list and chosen.name is None:
        parser.error(f"give a NAME, one of {', '.join(BENCHMARKS)}, or --list")
    if chosen.name:
        unknown = set(chosen.case or ()) - set(load(chosen.name).CASES)
        if unknown:
            parser.error(f"--case {unknown.pop()!r} is none of {', '.join(map(repr, load(chosen.name).CASES))}")
    for option in ("threads", "rounds", "min_seconds"):
        if getattr(chosen, option) <= 0:
            parser.error(f"--{option.replace('_', '-')} {getattr(chosen, option)} must be positive")
    return chosen


def list_benchmarks() -> str:
    """Name, what it measures and cases of every benchmark."""
    lines = []
    for name in BENCHMARKS:
        module = load(name)
        lines += [f"{name}: {module.__doc__.splitlines()[0]}", *(f"    --case {case!r}" for case in module.CASES)]
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    header = ["case", "ours s", "peer s", "peer/ours", "range", "ours MB", "peer MB", "ours/peer"]
    cells = [
        [
            row.name,
            f"{row.ours_s:.4g}",
            f"{row.peer_s:.4g}",
            f"{row.ratio:.4g}",
            "{:.4g} to {:.4g}".format(*row.details["ratio_range"]),
            f"{row.ours_mb:.0f}",
            f"{row.peer_mb:.0f}",
            f"{row.ours_mb / row.peer_mb:.2f}",
        ]
        for row in rows
    ]
    return format_table(header, cells)


def join_rows(name: str, earlier: list[Row], rows: list[Row]) -> list[Row]:
    """New rows and those earlier ones that they do not replace, in the order of the benchmark's cases."""
    by_name = {row.name: row for row in [*earlier, *rows]}
    return [by_name[f"{name}/{case}"] for case in load(name).CASES if f"{name}/{case}" in by_name]


def main(arguments: list[str]) -> int:
    """Run; 0, 1 when a check failed, 2 for a wrong command line."""
    chosen = parse(arguments)
    if chosen.list:
        print(list_benchmarks())
        return 0
    module = load(chosen.name)
    settings = Settings(**{field.name: getattr(chosen, field.name) for field in fields(Settings)})
    rows, earlier = [], []
    if chosen.keep and chosen.json and chosen.json.exists():
        earlier = [Row(**row) for row in json.loads(chosen.json.read_text("utf-8"))]
    try:
        for case in chosen.case or module.CASES:
            rows.append(module.measure(case, settings))
            if chosen.json:
                write_rows(chosen.json, join_rows(chosen.name, earlier, rows))
    except (CheckFailed, WorkerFailed, FileNotFoundError, ValueError, subprocess.CalledProcessError) as error:
        print(f"{chosen.name}: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if hasattr(module, "summarise"):
        print(module.summarise([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
