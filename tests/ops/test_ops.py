"""The façade hands out the operations themselves, and its example runs."""

import doctest

from hf_efficient import ops
from hf_efficient.models.transformer_xl import relative_attention


def test_names_are_the_architecture_s_own():
    assert {name: getattr(ops, name) for name in ops.__all__} == {
        name: getattr(relative_attention, name) for name in ops.__all__
    }


def test_example_runs():
    result = doctest.testmod(ops)
    assert result.attempted > 0
    assert result.failed == 0
