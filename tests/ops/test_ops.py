"""The façade hands out the operations themselves, and its examples run."""

import doctest

from hf_efficient import ops
from hf_efficient.models import evolved_transformer, reformer, transformer_xl, universal_transformer

FOLDERS = (evolved_transformer, reformer, transformer_xl, universal_transformer)


def test_names_are_the_architectures_own():
    for name in ops.__all__:
        operation = getattr(ops, name)
        assert operation.__name__ == name
        assert operation.__module__.startswith(tuple(f"{folder.__name__}." for folder in FOLDERS))


def test_examples_run():
    result = doctest.testmod(ops)
    assert result.attempted > 10
    assert result.failed == 0
