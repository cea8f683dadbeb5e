"""Every command that README or a page shows is understood by the program that it calls: flags, paths, targets."""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from docs_pages import DOCUMENTS, ROOT, commands
from torch.distributed.run import get_args_parser

from hf_efficient.cli.arguments import CommandParser
from hf_efficient.cli.errors import CommandError

SHOWN = [(path.relative_to(ROOT), words) for path in DOCUMENTS for words in commands(path)]
PROGRAM = "train.py"  # what pages call a program of the reader's own


def parser_for(name, arguments):
    return CommandParser(import_module(f"hf_efficient.cli.{name}").COMMAND.for_arguments(arguments))


def check_hf_efficient(words):
    name, *arguments = words
    here = ["--use_cpu"] if "--bf16" in arguments else []  # which needs an accelerator otherwise
    parser_for(name, arguments).read([*arguments, *here])


def check_launched(words):
    """What torchrun or accelerate starts."""
    if words != [PROGRAM]:
        assert words[:2] == ["-m", "hf_efficient.cli"] or words[0] == "hf_efficient.cli", words
        check_hf_efficient(words[2:] if words[0] == "-m" else words[1:])


def check_torchrun(words):
    chosen = get_args_parser().parse_args(words)
    assert chosen.module is (chosen.training_script != PROGRAM)
    check_launched([chosen.training_script, *chosen.training_script_args])


def check_accelerate(words):
    assert words[0] == "launch"
    chosen = launch_command_parser().parse_args(words[1:])
    check_launched([chosen.training_script, *chosen.training_script_args])


def check_make(words):
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    settings = re.findall(r"^([A-Z]+) \?=", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    names = [word for word in words if "=" not in word]
    assert set(names) <= set(targets)
    assert {word.partition("=")[0] for word in words} - set(names) <= set(settings)


def check_pip(words):
    assert words[0] == "install"
    extras = set(
        re.findall(r'^    "(\w+)": \[|^EXTRAS\["(\w+)"\]', (ROOT / "setup.py").read_text("utf-8"), re.MULTILINE)
    )
    for word in words[1:]:
        for asked in re.findall(r"\[([\w,]+)\]", word):
            assert set(asked.split(",")) <= {name for pair in extras for name in pair}


def check_python(words):
    """A script of ours; those with a parser of their own are asked."""
    path = ROOT / words[0]
    assert path.is_file()
    if path.parent.name == "benchmarks":
        sys.path.append(str(path.parent))
        parse = getattr(import_module(path.stem), "parse", None)
        if parse is not None:
            parse(words[1:])


CHECKS = {
    "hf-efficient": check_hf_efficient,
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "git": lambda words: None,
    "cd": lambda words: None,
}


@pytest.mark.parametrize(("path", "words"), SHOWN, ids=[f"{path}-{' '.join(words)[:60]}" for path, words in SHOWN])
def test_command_is_understood(path, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    CHECKS[words[0]](words[1:])


MENTIONED = sorted(
    {words for path in DOCUMENTS for words in re.findall(r"`hf-efficient ([a-z][^`]*)`", path.read_text("utf-8"))}
)


@pytest.mark.parametrize("words", MENTIONED)
def test_flags_of_mentioned_command_exist(words):
    """In a sentence a command may leave out what it needs; its name and its flags exist all the same."""
    name, *arguments = shlex.split(words)
    flags = [word.removeprefix("--").partition("=")[0] for word in arguments if word.startswith("--")]
    assert set(flags) <= {*parser_for(name, arguments).names, "help", "help-all"}


def test_there_are_commands_of_every_kind():
    assert {words[0] for _, words in SHOWN} == CHECKS.keys()


@pytest.mark.parametrize(
    "line",
    [
        "hf-efficient train --text my.txt --output_dir runs/mine --max_stepz 3",
        "torchrun --nproc_per_node 2 -m hf_efficient.cli train --textt my.txt",
        "torchrun --processes 2 train.py",
        "accelerate launch --num_gpus 2 train.py",
        "make tests",
        'pip install ".[training]"',
        "python examples/missing.py",
    ],
)
def test_misspelt_command_is_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = line.replace('"', "").split()
    with pytest.raises((AssertionError, CommandError, SystemExit)):
        CHECKS[words[0]](words[1:])


def test_pages_are_found():
    assert Path("docs/quick_start.md") in {path for path, _ in SHOWN}
