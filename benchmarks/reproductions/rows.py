"""Rows of the reproductions: what is to be trained, from a table's YAML file, and what came out, in its JSON file."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / "settings"
RESULTS = HERE.parent / "results" / "reproductions"
TABLES = ("logical_inference", "algorithmic", "babi", "graves", "ponder_cost", "translation")


@dataclass(frozen=True)
class Plan:
    """One training: a row of a table with one seed, and everything that decides its outcome."""

    table: str
    row: str
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """`table/row/seed 0`"""
        return f"{self.table}/{self.row}/seed {self.seed}"

    @property
    def file_name(self) -> str:
        """The name with nothing that a file system minds."""
        return "".join(letter if letter.isalnum() else "_" for letter in self.name)


def merge(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`common` with the entries of `own` in place of or beside its own, in nested dictionaries too."""
    merged = dict(common)
    for key, value in own.items():
        is_nested = isinstance(value, dict) and isinstance(common.get(key), dict)
        merged[key] = merge(common[key], value) if is_nested else value
    return merged


def read_settings(table: str, folder: Path = SETTINGS) -> dict[str, dict[str, Any]]:
    """The settings of every row of a table: the file's `common` with what the row changes, in the file's order."""
    content = yaml.safe_load((folder / f"{table}.yaml").read_text("utf-8"))
    return {row: merge(content["common"], own or {}) for row, own in content["rows"].items()}


def read_rows(table: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The finished rows of a table, none without a file."""
    path = folder / f"{table}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def is_finished(plan: Plan, folder: Path = RESULTS) -> bool:
    """Whether the plan's row stands in the file with these very settings."""
    return any(_is_of(plan, row) and row["settings"] == plan.settings for row in read_rows(plan.table, folder))


def store(plan: Plan, outcome: dict[str, Any], folder: Path = RESULTS) -> None:
    """Put a finished row into its table's file, in place of one with the same name, and before rows with later seeds.

    Several processes may store at the same time; the file is whole at every moment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        rows = [row for row in read_rows(plan.table, folder) if not _is_of(plan, row)]
        rows.append({"row": plan.row, "seed": plan.seed, "settings": plan.settings, **outcome})
        rows.sort(key=lambda row: row["seed"])
        path = folder / f"{plan.table}.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        os.replace(draft, path)


def _is_of(plan: Plan, row: dict[str, Any]) -> bool:
    return (row["row"], row["seed"]) == (plan.row, plan.seed)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process holds the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
