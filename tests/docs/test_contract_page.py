"""How the contract's page joins the results of several releases: what one of them cannot do must show."""

import pytest
from site_contract import cell


def contract(old, new):
    """Two models of one architecture, run with two releases; an outcome of None was not run."""
    runs = {"5.21.0": old, "5.23.0": new}
    cells = {
        version: {"check": {row: found for row, found in run.items() if found is not None}}
        for version, run in runs.items()
    }
    return {
        "rows": {"x-Model": ["x", "XModel"], "x-ForCausalLM": ["x", "XForCausalLM"], "y-Model": ["y", "YModel"]},
        "asked": {"check": ["x-Model", "x-ForCausalLM"]},
        "results": {version: {"cells": cells[version]} for version in runs},
    }


def run(model, language_model):
    return {"x-Model": model, "x-ForCausalLM": language_model}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (run("", ""), run("", ""), "yes"),
        (run("", "a reason"), run("", "a reason"), "yes; no (1): `ForCausalLM`"),
        (run("a reason", "a reason"), run("a reason", "a reason"), "no (1)"),
        (run(None, None), run("", ""), "**not run (5.21.0)**"),
        (run("fails", ""), run("", ""), "yes; **fails (5.21.0)**: `Model`"),
        (run("fails", None), run("fails", None), "**fails**: `Model`; **not run**: `ForCausalLM`"),
        (run(None, ""), run("fails", ""), "yes; **fails (5.23.0)**: `Model`"),
    ],
)
def test_cell(old, new, expected):
    assert cell(contract(old, new), "check", "x", []) == expected


def test_check_of_another_architecture():
    assert cell(contract(run("", ""), run("", "")), "check", "y", []) == ""


def test_reasons_are_numbered_in_order():
    reasons = ["of another check"]
    assert cell(contract(run("new", ""), run("new", "")), "check", "x", reasons) == "yes; no (2): `Model`"
    assert reasons == ["of another check", "new"]
