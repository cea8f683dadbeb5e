"""The contract's tables, from docs/site/contract.json, which `make test-matrix` writes."""

import json
from typing import Any

from site_links import ROOT
from site_tables import table

RESULTS = ROOT / "docs" / "site" / "contract.json"
# What is no reason of the table, the worst first.
MARKS = ("fails", "not run")


def contract() -> dict[str, Any]:
    """What the last runs found."""
    return json.loads(RESULTS.read_text("utf-8"))


def contract_versions() -> str:
    """The releases that the contract was run with, in a sentence's form."""
    return " and ".join(
        f"transformers {version} (torch {result['torch']})"
        for version, result in sorted(contract()["results"].items())
    )


def contract_models() -> str:
    """Which classes stand behind each column."""
    data = contract()
    rows = []
    for name, title in data["variants"].items():
        classes = [class_name for variant, class_name in data["rows"].values() if variant == name]
        rows.append([title, ", ".join(f"`{class_name}`" for class_name in classes)])
    return table(["Column", "Classes"], rows)


def contract_table() -> str:
    """A row for each check, a column for each way to build an architecture; what is refused has a number below."""
    data = contract()
    reasons: list[str] = []
    header = ["", *data["variants"].values()]
    rows = [
        [title, *(cell(data, check, variant, reasons) for variant in data["variants"])]
        for check, title in data["checks"].items()
    ]
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return "\n\n".join([table(header, rows), notes] if notes else [table(header, rows)])


def outcome(data: dict[str, Any], check: str, row: str) -> str:
    """What a model did with all releases: "" if it passed, else a reason, or `fails`, `not run` and the releases.

    A failure with one release counts more than what others found, and a run that is missing more than a pass.
    """
    found: dict[str, list[str]] = {}
    for version, result in data["results"].items():
        found.setdefault(result["cells"].get(check, {}).get(row, "not run"), []).append(version)
    worst = next((mark for mark in MARKS if mark in found), max(found))
    if len(found) == 1 or worst not in MARKS:
        return worst
    return f"{worst} ({', '.join(sorted(found[worst]))})"


def cell(data: dict[str, Any], check: str, variant: str, reasons: list[str]) -> str:
    """`yes`, the number of a reason, `fails` or `not run`, with heads if not all; nothing if the check is not for it.

    A reason that is new is added to `reasons`.
    """
    found: dict[str, set[str]] = {}
    total = {row for row in data["asked"][check] if data["rows"][row][0] == variant}
    for row in total:
        found.setdefault(outcome(data, check, row), set()).add(row)
    parts = ["yes"] if "" in found else []
    for result in sorted(found.keys() - {""}):
        if result.startswith(MARKS):
            text = f"**{result}**"
        else:
            if result not in reasons:
                reasons.append(result)
            text = f"no ({reasons.index(result) + 1})"
        if found[result] != total:
            text += ": " + ", ".join(sorted(f"`{row.partition('-')[2]}`" for row in found[result]))
        parts.append(text)
    return "; ".join(parts)
