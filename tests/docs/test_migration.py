"""What docs/migration.md puts on the right-hand side exists: names, arguments, settings and their values, presets."""

import ast
import inspect
import re
from dataclasses import fields
from importlib import import_module
from operator import attrgetter

import pytest
from docs_pages import ROOT

import hf_efficient
from hf_efficient.cli.arguments import CommandParser

PAGE = (ROOT / "docs" / "migration.md").read_text("utf-8")
HEADER = re.compile(r"^\| There \| Here(?:, in `(\w+)`)? \|$")
CODE = re.compile(r"`([^`]+)`")
# What a value asks for beside itself.
NEEDED = {'halting_scope="sequence"': {"is_encoder_decoder": False}}


def new_names() -> list[tuple[str, str]]:
    """(class whose settings the table lists, or "", name) of everything in code on the right of a table."""
    found, scope = [], ""
    for line in PAGE.splitlines():
        if header := HEADER.match(line):
            scope = header[1] or ""
        elif line.startswith("| ") and not line.startswith("| There"):
            found += [(scope, name) for name in CODE.findall(line.split(" | ")[-1])]
    return found


def find(path: str):
    """What a dotted name within hf_efficient stands for: modules are imported on the way."""
    words = path.split(".")
    for count in range(len(words), -1, -1):
        try:
            module = import_module(".".join(["hf_efficient", *words[:count]]))
        except ModuleNotFoundError:
            continue
        return attrgetter(".".join(words[count:]))(module) if count < len(words) else module
    raise AssertionError(path)


def check_setting(config_class: type, text: str) -> None:
    """A setting, perhaps with a value that it may take."""
    name, equals, value = text.partition("=")
    assert name in {field.name for field in fields(config_class)}
    if equals:
        config_class(**NEEDED.get(text, {}), **{name: ast.literal_eval(value)})


def check_name(text: str) -> None:
    """A command, a preset, an argument of a function in parentheses, an attribute, or a name."""
    if text.startswith("hf-efficient "):
        return CommandParser(import_module(f"hf_efficient.cli.{text.split()[1]}").COMMAND)
    path, _, argument = text.rstrip(")").partition("(")
    if path.endswith("from_preset"):
        return find(path)(ast.literal_eval(argument))
    owner, _, attribute = path.rpartition(".")
    holder = find(owner) if owner else hf_efficient
    if inspect.isclass(holder) and hasattr(holder, "__dataclass_fields__") and not hasattr(holder, attribute):
        assert attribute in holder.__dataclass_fields__
    elif argument:
        assert argument in inspect.signature(getattr(holder, attribute)).parameters
    else:
        find(path)
    return None


@pytest.mark.parametrize(("scope", "name"), sorted(set(new_names())))
def test_new_name_exists(scope, name):
    if scope:
        check_setting(getattr(hf_efficient, scope), name)
    else:
        check_name(name)


WRONG = ["TransformerXL", "data.read_baby", "ReformerForCausalLM.forward(mems)", "hf-efficient trein"]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_name_is_found(name):
    with pytest.raises((AssertionError, AttributeError, ModuleNotFoundError)):
        check_name(name)


@pytest.mark.parametrize("setting", ["mem_length", 'memory_init="zero"'])
def test_wrong_setting_is_found(setting):
    with pytest.raises((AssertionError, ValueError)):
        check_setting(hf_efficient.TransformerXLConfig, setting)


def test_page_has_tables():
    assert len(new_names()) > 100
