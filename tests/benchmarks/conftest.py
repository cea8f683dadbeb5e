"""The benchmarks are scripts: their folder is on the path, as it is for `python benchmarks/run.py`."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import harness  # noqa: E402 (found on the path just extended)


@pytest.fixture(autouse=True)
def _toy_sides_for_workers(monkeypatch):
    """Lets the workers' Python find `toy_sides`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def make_toy_row():
    """Makes a row with three rounds of made-up times: `make_toy_row(name)`."""

    def make(name, config=None):
        return harness.make_row(
            name,
            times={"ours": [0.5, 0.4, 0.9], "peer": [1.0, 1.2, 9.0]},
            memory={"ours": {"mb": 10.0, "process_mb": 30.0}, "peer": {"mb": 40.0, "process_mb": 50.0}},
            config={"peer": "another toy", "threads": 1} | (config or {}),
            versions={"ours": {"python": "3"}, "peer": {"python": "3"}},
            details={"check": "green"},
        )

    return make
