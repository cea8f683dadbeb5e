"""SegmentTrainer in two processes (gloo): the same run as one process, each with the memory of its own rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from training import small_run
from training.small_run import logged_losses, small_model, small_trainer

# Two processes have the same losses up to the order of additions.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Ends inside the second pass over the data, resumes from inside the first.
SETTINGS = {"max_steps": 11, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def launch(launcher: list[str], results: Path, *options: str, **environment: str) -> Path:
    """Run small_run.py in two processes and return the folder of its results."""
    command = [*launcher, small_run.__file__, str(results), "--settings", json.dumps(SETTINGS), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return results


def report(results: Path, rank: int = 0) -> dict:
    """What a process measured."""
    return json.loads((results / f"rank_{rank}.json").read_text())


def assert_equal_files(first: Path, second: Path):
    """Bitwise equality of two safetensors files."""
    actual, expected = load_file(first), load_file(second)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def check_against_one_process(results: Path, tmp_path: Path) -> None:
    """Losses, evaluation, weights and the memory of each process's rows are those of one process."""
    alone = small_trainer(tmp_path / "alone", small_model(), **{**SETTINGS, "save_strategy": "no"})
    alone.train()
    evaluation = alone.evaluate()
    for rank in range(2):
        measured = report(results, rank)
        assert measured["world_size"] == 2
        losses = {int(step): loss for step, loss in measured["losses"].items()}
        assert losses == pytest.approx(logged_losses(alone), rel=1e-5)
        for figure in ("eval_loss", "eval_perplexity", "eval_bits_per_byte"):
            assert measured["evaluation"][figure] == pytest.approx(evaluation[figure], rel=1e-5)
        memory = load_file(results / f"memory_{rank}.safetensors")
        for name, value in alone.memory.state_dict().items():
            own_rows = value if value.ndim == 0 or len(value) != 4 else value[2 * rank : 2 * rank + 2]
            assert_close(memory[name], own_rows, **CLOSE)
    weights = load_file(results / "weights.safetensors")
    for name, value in alone.model.named_parameters():
        assert_close(weights[name], value.detach(), **CLOSE)


def check_resumed(results: Path) -> None:
    """The resumed run repeats the uninterrupted one bit for bit, in both processes."""
    for rank in range(2):
        assert report(results / "resumed", rank)["losses"] == report(results, rank)["losses"]
        assert_equal_files(results / "resumed" / f"memory_{rank}.safetensors", results / f"memory_{rank}.safetensors")
    assert_equal_files(results / "resumed" / "weights.safetensors", results / "weights.safetensors")


def test_two_processes_equal_one_and_resume_exactly(tmp_path):
    results = launch(TORCHRUN, tmp_path, "--resume_at_step", "4")
    assert report(results)["distributed_type"] == "DistributedType.MULTI_CPU"
    check_against_one_process(results, tmp_path)
    check_resumed(results)
    saved = {path.name for path in (results / "run" / "checkpoint-8").glob("memory_*")}
    assert saved == {"memory_0_of_2.safetensors", "memory_1_of_2.safetensors"}


@pytest.mark.slow
def test_two_processes_with_dropout_resume_exactly(tmp_path):
    check_resumed(launch(TORCHRUN, tmp_path, "--resume_at_step", "4", "--dropout", "0.2"))


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    results = launch(ACCELERATE, tmp_path, "--resume_at_step", "8", ACCELERATE_USE_CPU="true")
    assert report(results)["distributed_type"] == "DistributedType.MULTI_CPU"
    check_against_one_process(results, tmp_path)
    check_resumed(results)


@pytest.mark.slow
@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_sharded_processes_equal_one_and_resume_exactly(tmp_path, state_dict_type):
    """FSDP2, and it really ran sharded: on CPUs accelerate would fall back to DDP without a word."""
    results = launch(TORCHRUN, tmp_path, "--resume_at_step", "4", "--fsdp", state_dict_type)
    assert report(results)["distributed_type"] == "DistributedType.FSDP"
    assert report(results)["parameter_type"] == "DTensor"
    check_against_one_process(results, tmp_path)
    check_resumed(results)
