"""Run notebooks from top to bottom, each in an empty folder: `python notebooks/execute.py [--write] [NOTEBOOK ...]`.

Without names all notebooks beside this file are run. Needs nbclient and ipykernel. Exits with 1 if a cell fails.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).parent
SECONDS = 600  # for one cell; a notebook takes one or two minutes


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new run. Raises what nbclient does if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}})
        client.extra_arguments = ["--log-level=ERROR"]  # the kernel warns of other users of the machine
        client.record_timing = False
        client.execute()
    # Which Python it was run with is no part of a notebook: the next run would only change it.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def run(path: Path, write: bool) -> bool:
    """Run a notebook, say how long it took or what failed, and keep its outputs if `write`; whether all went well."""
    started = time.perf_counter()
    try:
        notebook = execute(path)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"{path.name}: failed\n{error}", file=sys.stderr)
        return False
    print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
    if write:
        nbformat.write(notebook, path)
    return True


def main(arguments: list[str]) -> int:
    """Run what the command line names; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--write", action="store_true", help="keep the new outputs in the files")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time; each uses one core")
    options = parser.parse_args(arguments)
    # Threads that wait give their core away instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A notebook shows no progress bars, so it does not miss the widgets for them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    with ThreadPoolExecutor(options.jobs) as pool:  # each notebook has a process of its own
        return 0 if all(list(pool.map(run, options.notebooks, [options.write] * len(options.notebooks)))) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
