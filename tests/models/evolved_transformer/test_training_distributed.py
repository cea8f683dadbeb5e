"""Whole models in two processes (gloo), under DDP with default flags and under FSDP2, against one process."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
from models.evolved_transformer import training_run
from models.universal_transformer.training_run import outcome, train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(ways, tmp_path_factory, request) -> list[dict]:
    """What each process measured, for every way of a kind to distribute; one launch for all."""
    results = tmp_path_factory.mktemp("training")
    tests = request.config.rootpath / "tests"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    command = [*TORCHRUN, training_run.__file__, str(results), ways]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [json.loads((results / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, request):
    return launch("DDP", tmp_path_factory, request)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory, request):
    return launch("FSDP", tmp_path_factory, request)


@cache
def alone(name: str) -> dict:
    """One process, which sees the whole batch."""
    model = training_run.make_model(name)
    return outcome(model, train(model))


def assert_equals_one(way, run, reports, parameters) -> None:
    expected = alone(run.args[0])
    assert expected["losses"][-1] < expected["losses"][0]
    for report in reports:
        assert report[way]["parameters"] == [parameters]
        assert report[way]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert report[way]["squares"] == pytest.approx(expected["squares"], rel=1e-5)


@pytest.mark.parametrize("way", training_run.DDP)
def test_two_processes_equal_one(way, ddp):
    assert_equals_one(way, training_run.DDP[way], ddp, "Tensor")


@pytest.mark.slow
@pytest.mark.parametrize("way", training_run.FSDP)
def test_two_sharded_processes_equal_one(way, fsdp):
    assert_equals_one(way, training_run.FSDP[way], fsdp, "DTensor")
