"""What the pages' commands and programs are run with: a folder with the files they name."""

import sys
from pathlib import Path

import datasets
import pytest
from docs_pages import ROOT, cheap, prepare

from hf_efficient.cli.__main__ import main

# mkdocs finds the site's own modules beside mkdocs.yml.
sys.path.append(str(Path(ROOT, "docs", "site")))


@pytest.fixture(scope="session", autouse=True)
def _quiet_datasets():
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory):
    """The folder of a finished run, `runs/mine` of the pages."""
    folder = tmp_path_factory.mktemp("docs")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(cheap(["train", "examples/quick_cpu.yaml", "--text", "my.txt", "--output_dir", "runs/mine"])) == 0
    return folder / "runs" / "mine"
