"""The entry point: help, exit codes, and what is printed where."""

import os
import subprocess
import sys

import pytest

import hf_efficient
from hf_efficient.cli.__main__ import COMMANDS, main


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_overview(arguments, capsys):
    assert main(arguments) == 0
    page = capsys.readouterr().out
    assert all(name in page for name in COMMANDS)
    assert "hf-efficient demo" in page


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h", "--help-all"])
def test_help_of_each_command(name, flag, capsys):
    assert main([name, flag]) == 0
    page = capsys.readouterr().out
    assert f"hf-efficient {name}" in page
    assert "Examples:" in page


def test_help_of_train_begins_with_ours_and_explains_model_settings(capsys):
    main(["train", "--help"])
    page = capsys.readouterr().out
    assert page.index("--text ") < page.index("--output_dir") < page.index("--model.mem_len")
    assert "Length of the memory" in page
    assert "--fsdp_config" not in page
    main(["train", "--help-all"])
    assert "--fsdp_config" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-efficient {hf_efficient.__version__}\n"


def test_misspelt_command(capsys):
    assert main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-efficient: unknown command 'trian'; the nearest real one is 'train'")


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("HF_EFFICIENT_TRACEBACK", "1")
    with pytest.raises(Exception, match="trian"):
        main(["trian"])


def test_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_efficient.cli.__main__.run", interrupted)
    assert main(["train"]) == 130
    assert "interrupted. The same command with --resume goes on" in capsys.readouterr().err
    assert main(["evaluate"]) == 130
    assert "resume" not in capsys.readouterr().err


def test_reader_that_has_gone_is_no_error(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["--help"]) == 1
    assert capsys.readouterr().err == ""


def test_module_and_exit_code():
    command = [sys.executable, "-m", "hf_efficient.cli", "train", "--max_stps", "3"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert "'--max_stps'" in finished.stderr
    assert "'--max_steps'" in finished.stderr
