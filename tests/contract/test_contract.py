"""Every promise of the contract, for every public class of every architecture; rows.py and table.py are the table."""

import json
from pathlib import Path

import pytest
from contract.rows import ROWS
from contract.table import CELLS, CHECKS, DISTRIBUTED, LIMITS, description, is_distributed, limit_of
from transformers import PreTrainedModel

import hf_efficient

DOCUMENTED = Path(__file__).parents[2] / "docs" / "site" / "contract.json"


def parameters():
    """A test for each cell of the table."""
    for name, row in CELLS:
        marks = [pytest.mark.slow] if CHECKS[name].is_slow else []
        yield pytest.param(name, row, id=f"{name}-{row.name}", marks=marks)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
# conftest.py replaces `torch.empty`, where the compiler looks inside.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
@pytest.mark.parametrize(("name", "row"), list(parameters()))
def test_contract(name, row, tmp_path, record_property):
    """A model does what the check asks for, or refuses with the message that its limit has."""
    limit = limit_of(name, row)
    record_property("contract", [name, row.name, limit.reason if limit else ""])
    if limit is None:
        CHECKS[name].function(row, tmp_path)
        return
    with pytest.raises(limit.error, match=limit.message or None):
        CHECKS[name].function(row, tmp_path)


def test_every_public_class_has_a_row():
    public = {getattr(hf_efficient, name) for name in hf_efficient.__all__}
    models = {found for found in public if isinstance(found, type) and issubclass(found, PreTrainedModel)}
    assert {row.model_class for row in ROWS} == models


def test_every_limit_holds_somewhere():
    cells = [*CELLS, *((way, row) for way in DISTRIBUTED for row in ROWS if is_distributed(row))]
    assert {limit_of(name, row) for name, row in cells} - {None} == set(LIMITS)


def test_documentation_shows_this_table():
    """`make test-contract` writes the file."""
    documented = json.loads(DOCUMENTED.read_text("utf-8"))
    del documented["results"]
    assert documented == description()
