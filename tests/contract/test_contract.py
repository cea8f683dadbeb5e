"""Every promise of the contract, for every public class of every architecture; rows.py and table.py are the table."""

import pytest
from contract.table import CELLS, CHECKS, limit_of


def parameters():
    """A test for each cell of the table."""
    for name, row in CELLS:
        marks = [pytest.mark.slow] if CHECKS[name].is_slow else []
        yield pytest.param(name, row, id=f"{name}-{row.name}", marks=marks)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
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
