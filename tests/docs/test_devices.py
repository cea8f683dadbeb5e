"""The commands of docs/training.md start as many processes as they say, on one machine and on two."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import ROOT, cheap, commands, prepare

SEGMENT_LENGTH, NUM_STEPS = 32, 2  # of the recipe, and of `cheap`
ON_THIS_MACHINE = {"--nproc_per_node": "1", "--master_addr": "127.0.0.1", "--per_device_train_batch_size": "4"}


def shown(*words: str) -> list[list[str]]:
    """The page's commands that have these words."""
    found = [command for command in commands(ROOT / "docs" / "training.md") if set(words) <= set(command)]
    assert found, words
    return found


def start(command: list[str], folder: Path) -> subprocess.Popen:
    """A launcher and the training behind it, with as little work as it can have."""
    own = command.index("hf_efficient.cli") + 1
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [*command[:own], *cheap(command[own:])],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trained_tokens(folder: Path) -> int:
    """Tokens of all processes together."""
    return json.loads((folder / "report.json").read_text("utf-8"))["train_tokens"]


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output


@pytest.mark.slow
def test_two_processes_on_a_cpu(tmp_path):
    prepare(tmp_path)
    (command,) = shown("torchrun", "--use_cpu")
    finish([start(command, tmp_path)])
    batch_size = int(command[command.index("--per_device_train_batch_size") + 1])
    assert trained_tokens(tmp_path / "runs" / "two") == NUM_STEPS * 2 * batch_size * SEGMENT_LENGTH


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Their recipe and its text are exchanged for small ones, and both machines are this one."""
    prepare(tmp_path)
    machines = shown("torchrun", "--nnodes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for command in machines:
        changed = [word for word in command if word != "--bf16"]
        for flag, value in (ON_THIS_MACHINE | {"--master_port": port}).items():
            changed[changed.index(flag) + 1] = value
        recipe = next(index for index, word in enumerate(changed) if word.endswith(".yaml"))
        changed[recipe : recipe + 1] = ["examples/quick_cpu.yaml", "--text", "my.txt"]
        processes.append(start(changed, tmp_path))
    assert len(processes) == 2
    finish(processes)
    assert trained_tokens(tmp_path / "runs" / "wikitext103") == NUM_STEPS * 2 * 4 * SEGMENT_LENGTH
