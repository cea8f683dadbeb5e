"""Flags, recipes with overrides, positional words, and the help pages."""

from dataclasses import dataclass, field

import pytest

from hf_efficient.cli.arguments import Command, CommandParser
from hf_efficient.cli.errors import CommandError


@dataclass
class Options:
    """Flags for the tests."""

    source: str | None = field(default=None, metadata={"help": "Where from"})
    size: int = field(default=3, metadata={"help": "How much, 100 % at most"})
    rate: float = field(default=0.5, metadata={"help": "How fast"})
    names: list[str] | None = field(default=None, metadata={"help": "Who"})
    quiet: bool = field(default=False, metadata={"help": "Say nothing"})
    strict: bool | None = field(default=None, metadata={"help": "Be strict", "nargs": "?", "const": True})


@dataclass
class Rare:
    """Flags that `--help` hides but for one."""

    common: int = 1
    rare: int = field(default=2, metadata={"help": "Hardly ever needed"})


def command(**changes):
    settings = {
        "name": "try",
        "description": "Try it.",
        "usage": "hf-efficient try SOURCE",
        "examples": "  hf-efficient try here",
        "options": (Options, Rare),
        "shown": {"common": "Often needed"},
        "positionals": ("source",),
        "model_settings": lambda: {"tiny": {"mem_len": ("Memory", 7)}},
        "run": print,
    }
    return Command(**(settings | changes))


def read(*arguments, **changes):
    return CommandParser(command(**changes)).read(arguments)


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_become_options_and_only_what_was_given_is_recorded():
    invocation = read("--size", "5", "--rate=1e-4", "--names", "a", "b", "--quiet", "--rare", "9")
    options, rare = invocation.options
    assert (options.size, options.rate, options.names, options.quiet) == (5, 1e-4, ["a", "b"], True)
    assert (options.source, options.strict, rare.common, rare.rare) == (None, None, 1, 9)
    assert invocation.given == {"size": 5, "rate": 1e-4, "names": ["a", "b"], "quiet": True, "rare": 9}
    assert invocation.model_settings == {}
    assert invocation.command_line == "hf-efficient try --size 5 --rate=1e-4 --names a b --quiet --rare 9"


@pytest.mark.parametrize(("flags", "value"), [(["--strict"], True), (["--strict", "false"], False), ([], None)])
def test_optional_boolean(flags, value):
    assert read(*flags).options[0].strict is value


def test_positional_word_and_hyphens():
    assert read("here", "--rate", "2").options[0].source == "here"
    assert read("--source", "there").options[0].source == "there"


def test_recipe_with_overrides(tmp_path):
    path = recipe(tmp_path, "size: 5\nrate: 1e-3\nnames: [a]\nquiet: true\nrare: 4\nmodel: {mem_len: 16, tie: true}\n")
    invocation = read(path, "here", "--size", "6", "--model.mem_len", "32", "--model.new-name=[1, 2]")
    options, rare = invocation.options
    assert (options.source, options.size, options.rate, options.names) == ("here", 6, 1e-3, ["a"])
    assert (options.quiet, rare.rare) == (True, 4)
    assert invocation.model_settings == {"mem_len": 32, "tie": True, "new_name": [1, 2]}
    assert read(recipe(tmp_path, "model.mem_len: 5")).model_settings == {"mem_len": 5}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sise", "5"], ["--sise", "--size", "hf-efficient try --help-all"]),
        (["--siz", "5"], ["--siz", "--size"]),  # no silent abbreviations
        (["--size", "many"], ["--size", "many", "whole number"]),
        (["--size", "1.5"], ["--size", "1.5", "whole number"]),
        (["--rate", "fast"], ["--rate", "fast", "such as 0.1"]),
        (["--quiet", "perhaps"], ["--quiet: 'perhaps' is neither true nor false"]),
        (["--quiet", "here"], ["'here'", "in front of all flags"]),
        (["--size"], ["--size", "expected one argument"]),
        (["--mem_len", "3"], ["--mem_len", "--model.mem_len"]),
        (["--modle.mem_len", "3"], ["--modle.mem_len", "--model.mem_len"]),
        (["here", "there"], ["there", "hf-efficient try SOURCE"]),
        (["--size", "1", "there"], ["there", "hf-efficient try SOURCE"]),
        (["--model.mem_len"], ["--model.mem_len", "VALUE"]),
        (["--model.mem_len", "[1"], ["[1"]),
    ],
)
def test_mistake_on_the_command_line(arguments, words):
    with pytest.raises(CommandError) as caught:
        read(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sise: 5", ["sise", "size"]),
        ("size: many", ["--size", "many", "whole number"]),
        ("size: 1.5", ["--size", "1.5"]),
        ("rate: fast", ["--rate", "fast"]),
        ("modle: {mem_len: 3}", ["modle", "model"]),
        ("model: 3", ["model", "3", "mapping"]),
        ("mem_len: 3", ["mem_len", "model.mem_len"]),
    ],
)
def test_mistake_in_a_recipe_names_the_recipe(tmp_path, text, words):
    path = recipe(tmp_path, text)
    with pytest.raises(CommandError) as caught:
        read(path)
    assert all(word in str(caught.value) for word in [f"recipe '{path}'", *words]), str(caught.value)


def test_model_settings_only_where_there_is_a_model():
    with pytest.raises(CommandError, match="--model.mem_len"):
        read("--model.mem_len", "3", model_settings=None)


def test_help_shows_what_is_common_and_hides_what_is_rare():
    parser = CommandParser(command())
    page, whole = parser.format_help(), parser.format_help(everything=True)
    for text in (
        "Try it.",
        "hf-efficient try here",
        "--size N",
        "100 % at most (default: 3).",
        "--quiet",
        "Often needed",
    ):
        assert text in page
    assert "--model.mem_len VALUE" in page
    assert "Memory (default: 7)." in page
    assert "Hardly ever needed" not in page
    assert "hf-efficient try --help-all also shows what few runs need (1 options)." in page
    assert "Hardly ever needed (default: 2)." in whole
    assert "(default: None)" not in whole
