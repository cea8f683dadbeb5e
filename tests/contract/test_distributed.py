"""Every way to build an architecture in two processes (gloo), under DDP and FSDP2, against one process."""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest
from contract import distributed_run
from contract.distributed_run import DISTRIBUTED, WAYS
from contract.table import limit_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory, request):
    """What each process measured; one launch for all."""
    results = tmp_path_factory.mktemp("distributed")
    tests = request.config.rootpath / "tests"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    command = [*TORCHRUN, distributed_run.__file__, str(results)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=850)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [json.loads((results / f"rank_{rank}.json").read_text()) for rank in range(2)]


@cache
def alone(name: str) -> dict:
    """One process, which sees the whole batch."""
    model = distributed_run.make_model(DISTRIBUTED[name])
    return distributed_run.outcome(model, distributed_run.train(model, DISTRIBUTED[name]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes_equal_one(name, way, reports, record_property):
    limit = limit_of(way, DISTRIBUTED[name])
    record_property("contract", [way, name, limit.reason if limit else ""])
    if limit is not None:
        for report in reports:
            assert re.search(limit.message, report[way][name]["error"])
        return
    expected = alone(name)
    assert expected["losses"][-1] < expected["losses"][0]
    for report in reports:
        assert report[way][name]["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert report[way][name]["squares"] == pytest.approx(expected["squares"], rel=1e-6, abs=1e-12)
