"""Every public name from a paper names it, and every tensor that a public function takes has its shape described."""

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import pytest

MODULES = (
    "hf_efficient",
    *(f"hf_efficient.{room}" for room in ("conversion", "data", "generation", "hub", "ops", "training")),
)

# In the first two everything carries out a paper, but for what reads files of a program; in the others these names do.
OF_PAPERS = ("hf_efficient", "hf_efficient.ops")
OF_PROGRAMS = {"ReformerTokenizer"}
FROM_PAPERS = {
    "hf_efficient.data": {
        *("AdditionTask", "CopyTask", "ReverseTask", "DuplicationTask", "LearningToExecuteTask"),
        *("AdditionVectorsTask", "GravesTask", "LogicTask", "ParityTask", "SortTask", "LogicalInferenceTask"),
        *("read_babi", "read_lambada", "read_scan", "generate_scan", "read_logical_inference"),
        *("read_agreement_table", "read_number_prediction", "read_minimal_pairs", "segment_lanes"),
    },
    "hf_efficient.generation": {"sample_and_rank"},
    "hf_efficient.training": {"PonderTimeCallback", "SegmentTrainer"},
}
PAPER = re.compile(r"arXiv \d{4}\.\d{4,5}")

# (B, T), (batch, length), (..., K), (1 or B, S), (C',); a scalar has none.
SHAPE = re.compile(r"\((?:\.\.\.|[A-Z]'?|batch|rows|steps|\w+ or B|B or \w+)(?:,[^()]*)?\)|\bscalar\b")
# The class that describes the arguments which a docstring leaves out.
ELSEWHERE = re.compile(r"`(\w+Model)(?:\.forward)?`")


def public(module: str) -> dict[str, Any]:
    """The functions and classes that a module exports."""
    names = {name: getattr(import_module(module), name) for name in import_module(module).__all__}
    return {name: item for name, item in names.items() if inspect.isclass(item) or inspect.isfunction(item)}


def is_inherited(owner: type, name: str) -> bool:
    """Whether a method takes the place of one that describes the arguments, in a base class or in another library."""
    return name != "forward" and any(name in vars(base) for base in owner.__mro__[1:])


@cache
def functions(module: str) -> dict[str, Any]:
    """The functions that a module exports, and its classes' own public methods."""
    found = {}
    for name, item in public(module).items():
        if inspect.isfunction(item):
            found[name] = inspect.unwrap(item)
            continue
        for key, value in vars(item).items():
            method = inspect.unwrap(value) if callable(value) else getattr(value, "__func__", None)
            if inspect.isfunction(method) and not key.startswith("_") and not is_inherited(item, key):
                found[f"{name}.{key}"] = method
    return found


def tensors(function: Any) -> Iterator[str]:
    """Arguments that are tensors; not those that may be plain numbers, nor collections of tensors."""
    for name, argument in inspect.signature(function).parameters.items():
        kind = argument.annotation
        text = kind.__name__ if isinstance(kind, type) else str(kind)
        if "Tensor" in text and not re.search(r"\bint\b|\[", text):
            yield name


def entry(docstring: str, name: str) -> str | None:
    """What a docstring's list says about an argument."""
    names = r"[\w, ]*"
    pattern = rf"^ *(?:{names}, )?{name}\b{names}:.*?(?=^ *{names}: |^$|\Z)|[.;] {name}\b{names}:.{{0,60}}"
    found = re.search(pattern, docstring, re.DOTALL | re.MULTILINE)
    return found and found[0]


def described_at(function: Any) -> Iterator[Any]:
    """The functions to whose arguments a docstring refers."""
    for name in ELSEWHERE.findall(inspect.getdoc(function) or ""):
        for place in (sys.modules[function.__module__], import_module("hf_efficient")):
            if hasattr(place, name):
                yield inspect.unwrap(getattr(place, name).forward)


def has_shape(function: Any, name: str) -> bool:
    """Whether the shape of an argument is told, in the docstring's list or text, or where that refers to."""
    docstring = inspect.getdoc(function) or ""
    if listed := entry(docstring, name):
        return bool(SHAPE.search(listed))
    is_alone = len(list(tensors(function))) == 1
    if SHAPE.search(docstring if is_alone else " ".join(re.findall(rf"`{name}` .{{0,40}}", docstring, re.DOTALL))):
        return True
    return any(has_shape(other, name) for other in described_at(function) if other is not function)


CASES = [(module, name) for module in MODULES for name, item in functions(module).items() if any(tensors(item))]


@pytest.mark.parametrize(("module", "name"), CASES)
def test_shape_of_every_tensor_is_told(module, name):
    function = functions(module)[name]
    assert [argument for argument in tensors(function) if not has_shape(function, argument)] == []


def test_there_are_functions_of_tensors():
    assert len(CASES) > 40


@pytest.mark.parametrize("module", MODULES)
def test_what_comes_from_a_paper_names_it(module):
    names = public(module).keys() - OF_PROGRAMS if module in OF_PAPERS else FROM_PAPERS.get(module, ())
    assert [name for name in sorted(names) if not PAPER.search(public(module)[name].__doc__)] == []


def example(tensor, mask, other):
    """Do something.

    Args:
        tensor, mask: (B, T), something; no `other` is meant.
        other: what has no shape.
    """


@pytest.mark.parametrize(("name", "is_told"), [("tensor", True), ("mask", True), ("other", False), ("missing", False)])
def test_missing_shape_is_found(name, is_told):
    assert has_shape(example, name) is is_told
