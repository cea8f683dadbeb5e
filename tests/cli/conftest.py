"""A text and a run that the tests of the command line share."""

import shutil

import datasets
import pytest

from hf_efficient.cli.__main__ import main

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.\n",
    "A module can define a set of functions and variables.\n",
    "Memory carries what was read before into the next segment.\n",
)
TINY_MODEL = (
    *("--model.hidden_size", "16", "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2"),
    *("--model.intermediate_size", "32", "--model.mem_len", "8"),
)
TINY_RUN = (
    *TINY_MODEL,
    *("--segment_length", "16", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"),
    *("--logging_steps", "2", "--save_steps", "2", "--disable_tqdm", "true", "--use_cpu"),
)


@pytest.fixture(scope="session", autouse=True)
def _quiet_datasets():
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """About 3 KB of English."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(SENTENCES) * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, text_file):
    """The folder of a run of four updates. Tests that change it take `run_copy`."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = ["train", "--text", str(text_file), "--validation_text", str(text_file), "--output_dir", str(folder)]
    assert main([*arguments, "--max_steps", "4", *TINY_RUN]) == 0
    return folder


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of `finished_run` to change at will."""
    return shutil.copytree(finished_run, tmp_path / "tiny")
