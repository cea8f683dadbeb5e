"""The contract's tables, from docs/site/contract.json, which `make test-matrix` writes."""

import json
from typing import Any

from site_links import ROOT
from site_tables import table

RESULTS = ROOT / "docs" / "site" / "contract.json"


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


def cell(data: dict[str, Any], check: str, variant: str, reasons: list[str]) -> str:
    """`yes`, the number of a reason, `fails` or `not run`, with heads if not all; nothing if the check is not for it.

    All versions count; a reason that is new is added to `reasons`.
    """
    found: dict[str, set[str]] = {}
    total = {row for row in data["asked"][check] if data["rows"][row][0] == variant}
    for result in data["results"].values():
        for row, outcome in result["cells"].get(check, {}).items():
            if data["rows"][row][0] == variant:
                found.setdefault(outcome, set()).add(row)
    if missing := total - set().union(*found.values()):
        found["not run"] = missing
    parts = ["yes"] if "" in found else []
    for outcome in sorted(found.keys() - {""}):
        if outcome in ("fails", "not run"):
            text = f"**{outcome}**"
        else:
            if outcome not in reasons:
                reasons.append(outcome)
            text = f"no ({reasons.index(outcome) + 1})"
        if found[outcome] != total:
            text += ": " + ", ".join(sorted(f"`{row.partition('-')[2]}`" for row in found[outcome]))
        parts.append(text)
    return "; ".join(parts)
