"""Keeps what the contract's tests found: printed at the end, and written where $HF_EFFICIENT_CONTRACT says."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from contract.rows import ROWS
from contract.table import TITLES, description

# check -> row -> "" if it passed, the reason if it refused as it should, "fails" otherwise
found: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One cell; under xdist this runs in the controller, with what the workers report."""
    cell = dict(report.user_properties).get("contract")
    if cell is not None and report.when == "call":
        check, row, reason = cell
        found.setdefault(check, {})[row] = reason if report.passed else "fails"


def version() -> str:
    """What the results belong to."""
    return transformers.__version__


def summary_lines() -> list[str]:
    """A line for each check: in how many models it passed, was refused, failed."""
    lines = []
    for name in filter(found.__contains__, TITLES):
        reasons = list(found[name].values())
        failed = reasons.count("fails")
        refused = sum(reason not in ("", "fails") for reason in reasons)
        lines.append(f"{TITLES[name]:45}{reasons.count(''):4} pass{refused:4} refuse{failed:4} fail")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if found:
        terminalreporter.section(f"contract, transformers {version()}")
        for line in summary_lines():
            terminalreporter.write_line(line)


def results_file(session: pytest.Session) -> Path | None:
    """What this process writes, if any."""
    target = os.environ.get("HF_EFFICIENT_CONTRACT")
    return Path(target) if target and not hasattr(session.config, "workerinput") else None


def write(path: Path, new_cells: dict[str, dict[str, str]]) -> None:
    """The table, and what was found; what the file holds of other versions, checks and rows of the table stays."""
    results = json.loads(path.read_text("utf-8"))["results"] if path.exists() else {}
    if new_cells:
        earlier = results.get(version(), {"cells": {}})["cells"]
        names = {row.name for row in ROWS}
        cells = {
            check: {
                row: cell for row, cell in (earlier.get(check, {}) | new_cells.get(check, {})).items() if row in names
            }
            for check in TITLES
        }
        results[version()] = {"torch": torch.__version__.partition("+")[0], "cells": cells}
    path.write_text(json.dumps(description() | {"results": results}, indent=1) + "\n", encoding="utf-8")


def pytest_sessionstart(session: pytest.Session) -> None:
    """A table that has changed is written at once: a test compares the file with it."""
    if path := results_file(session):
        write(path, {})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Add what was found to the file."""
    if found and (path := results_file(session)):
        write(path, found)
