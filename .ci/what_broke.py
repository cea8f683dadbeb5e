"""Prints what of the installed transformers is no longer as we use it; `make what-broke` installs the newest first.

It runs tests/test_transformers_contract.py, the list of all that we use of the libraries beyond what they promise, or
the tests named on the command line, and prints one line for each finding. The exit status is 1 if there is any.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "tests" / "test_transformers_contract.py"
LIBRARIES = ("torch", "transformers", "huggingface_hub", "accelerate", "datasets")


class Findings:
    """A plugin of pytest that keeps the first line of what each failed test said, by the test's name."""

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self.num_held = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for the beginning, the run and the end of each test."""
        if report.failed:
            self.broken[report.nodeid] = said(report)
        elif report.when == "call" and report.passed:
            self.num_held += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Called for each file; one that cannot be imported is a finding too."""
        if report.failed:
            self.broken[report.nodeid] = report.longreprtext.strip().splitlines()[-1]


def said(report: pytest.TestReport) -> str:
    """The first line of a failed test's message, without the name of its exception."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else report.longreprtext
    return message.strip().splitlines()[0].removeprefix("AssertionError: ")


def main(tests: list[str]) -> int:
    """Run the tests and print what broke."""
    findings = Findings()
    # Without reports on the terminal the project's options for them are unknown.
    options = ["-o", "addopts=--import-mode=importlib", f"--rootdir={ROOT}"]
    options += ["-p", "no:terminal", "-p", "no:cacheprovider"]
    status = pytest.main([*options, *(tests or [str(CONTRACT)])], plugins=[findings])
    print(", ".join(f"{name} {version(name)}" for name in LIBRARIES))
    for test, message in findings.broken.items():
        print(f"BROKE  {test.rpartition('::')[2]}: {message}")
    print(f"{findings.num_held} checks hold, {len(findings.broken)} do not")
    return 1 if findings.broken or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
