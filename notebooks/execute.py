"""Run notebooks from top to bottom, each in an empty folder: `python notebooks/execute.py [--write] [NOTEBOOK ...]`.

Without names all notebooks beside this file are run. Needs nbclient and ipykernel. Exits with 1 if a cell fails.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
SECONDS = 600  # for one cell; a notebook takes one or two minutes


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new run. Raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}})
        client.record_timing = False
        client.execute()
    # Which Python it was run with is no part of a notebook: the next run would only change it.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(arguments: list[str]) -> int:
    """Run what the command line names; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--write", action="store_true", help="keep the new outputs in the files")
    options = parser.parse_args(arguments)
    # Threads that wait give their core away instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A notebook shows no progress bars, so it does not miss the widgets for them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    failures = 0
    for path in options.notebooks:
        started = time.perf_counter()
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            failures += 1
            print(f"{path.name}: failed\n{error}", file=sys.stderr)
            continue
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
        if options.write:
            nbformat.write(notebook, path)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
