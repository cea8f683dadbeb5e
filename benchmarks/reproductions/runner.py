"""Train the rows of the reproductions' tables one by one; finished rows are skipped, a half-done one goes on.

python benchmarks/reproduce.py --data data                        # every row, seed 0
python benchmarks/reproduce.py --data data --tables graves --seeds 0 1 2
python benchmarks/reproduce.py --data data --tables babi --rows "2: two supporting facts" --device cuda
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from harness import describe_machine, report_progress, today
from worker import installed_versions

from . import rows
from .rows import Plan
from .training import Run


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/reproduce.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=list(rows.TABLES), choices=rows.TABLES, metavar="TABLE")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only rows of these names; default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--data", type=Path, help="folder with the data sets: logic/generated, babi, multi30k")
    parser.add_argument("--settings", type=Path, default=rows.SETTINGS, help="folder of the tables' YAML files")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the tables' JSON files")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path(".benchmarks/reproductions"), help="where half-done trainings lie"
    )
    parser.add_argument("--list", action="store_true", help="say which rows are finished and which are not")
    chosen = parser.parse_args(arguments)
    known = {row for table in chosen.tables for row in rows.read_settings(table, chosen.settings)}
    for row in chosen.rows or ():
        if row not in known:
            parser.error(f"--rows {row!r} is none of {', '.join(map(repr, sorted(known)))}")
    return chosen


def make_plans(chosen: argparse.Namespace) -> list[Plan]:
    """The trainings that the command line asks for: first every row with the first seed, then with the next."""
    return [
        Plan(table, row, seed, settings)
        for seed in chosen.seeds
        for table in chosen.tables
        for row, settings in rows.read_settings(table, chosen.settings).items()
        if chosen.rows is None or row in chosen.rows
    ]


def carry_out(plan: Plan, chosen: argparse.Namespace) -> None:
    """Train and test one row, store it, and drop its checkpoint."""
    checkpoint = chosen.checkpoints / f"{plan.file_name}.pt"
    torch.manual_seed(plan.seed)
    device = torch.device(chosen.device)
    experiment = table_module(plan.table).make_experiment(plan.settings, plan.seed, device, chosen.data)
    run = Run(experiment, checkpoint)
    training = run.train(lambda line: report_progress(f"{plan.name}: {line}"))
    experiment.model.eval()
    with torch.no_grad():
        results = experiment.results()
    outcome = {
        "training": training,
        "results": results,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": describe_machine(),
        "versions": installed_versions(),
        "date": today(),
    }
    rows.store(plan, outcome, chosen.results)
    checkpoint.unlink(missing_ok=True)


def table_module(table: str):
    """The module of a table: `make_experiment(settings, seed, device, data)` and `table(rows)`."""
    return importlib.import_module(f"{__package__}.{table}")


def main(arguments: list[str]) -> int:
    """Run; 0, or 1 when data is missing."""
    chosen = parse(arguments)
    torch.set_num_threads(chosen.threads)
    for plan in make_plans(chosen):
        finished = rows.is_finished(plan, chosen.results)
        if chosen.list:
            print(f"{'finished' if finished else 'to do':8}  {plan.name}")
        elif finished:
            report_progress(f"{plan.name}: finished before")
        else:
            try:
                carry_out(plan, chosen)
            except FileNotFoundError as error:
                print(f"{plan.name}: {error}", file=sys.stderr)
                return 1
    return 0
