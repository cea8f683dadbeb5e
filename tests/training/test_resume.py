"""A run that stops and goes on equals one that never stopped, bit for bit, with its memory and with dropout."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import small_run
from training.small_run import logged_losses, small_model, small_trainer

from hf_efficient.training import last_checkpoint

DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2}
# The small corpus gives 17 batches a pass: 9 updates, the last of one batch. 14 updates end inside the second pass.
RUN = {"gradient_accumulation_steps": 2, "max_steps": 14}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def state(trainer):
    """Weights and memory, by name."""
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    return weights | {f"memory.{name}": value for name, value in trainer.memory.state_dict().items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole run that saved at every step: its trainer and folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = small_trainer(folder, small_model(**DROPOUT), **RUN, **SAVING)
    trainer.train()
    return trainer, folder


@pytest.mark.parametrize("step", [1, 4, 8, 9, 10, 13])
def test_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, step):
    whole, folder = uninterrupted
    trainer = small_trainer(tmp_path, small_model(seed=1, **DROPOUT), **RUN)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert len(logged_losses(whole)) == 14
    assert logged_losses(trainer) == logged_losses(whole)
    assert_equal(state(trainer), state(whole))


def test_resumed_run_with_evaluations_equals_one_without(uninterrupted, tmp_path):
    whole, folder = uninterrupted
    settings = {**RUN, "eval_strategy": "steps", "eval_steps": 1}
    trainer = small_trainer(tmp_path, small_model(seed=1, **DROPOUT), **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert_equal(state(trainer), state(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"cutoffs": [12, 30], "div_val": 2}, {}),
        ({"memory_init": "zeros"}, {}),
        ({"mem_len": 0}, {}),
        ({}, {"boundaries": "ignore"}),
        ({}, {"bf16": True}),
        ({}, {"dataloader_num_workers": 1}),
    ],
)
def test_every_kind_of_run_resumes(tmp_path, config, settings):
    whole = small_trainer(tmp_path / "whole", small_model(**DROPOUT, **config), **RUN, **SAVING, **settings)
    whole.train()
    trainer = small_trainer(tmp_path / "resumed", small_model(seed=1, **DROPOUT, **config), **RUN, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert logged_losses(trainer) == logged_losses(whole)
    assert_equal(state(trainer), state(whole))


def test_memory_is_saved_as_safetensors(uninterrupted):
    whole, folder = uninterrupted
    memory = load_file(folder / "checkpoint-14" / "memory_0_of_1.safetensors")
    assert_equal(memory, whole.memory.state_dict())


def test_killed_run_resumes(uninterrupted, tmp_path):
    """SIGKILL one step after a checkpoint; a later checkpoint is half written."""
    settings = {**RUN, "save_strategy": "steps", "save_steps": 3}
    command = [sys.executable, small_run.__file__, str(tmp_path), "--dropout", "0.2"]
    command += ["--kill_at_step", "4", "--settings", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    run = tmp_path / "run"
    half_written = run / "checkpoint-6"
    shutil.copytree(run / "checkpoint-3", half_written)
    (half_written / "trainer_state.json").write_text('{"global_step": ')
    assert last_checkpoint(run) == str(run / "checkpoint-3")

    trainer = small_trainer(run, small_model(seed=1, **DROPOUT), **settings)
    trainer.train(resume_from_checkpoint=True)
    whole, _ = uninterrupted
    assert logged_losses(trainer) == logged_losses(whole)
    assert_equal(state(trainer), state(whole))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_folder_of_another_run_is_refused(uninterrupted):
    _, folder = uninterrupted
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=r"already holds a run \(checkpoint-14\).*resume_from_checkpoint=True"):
        small_trainer(folder, **RUN, **SAVING).train()
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        small_trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)


@pytest.fixture
def checkpoint(uninterrupted, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(uninterrupted[1] / "checkpoint-4", tmp_path / "checkpoint-4"))


def test_checkpoint_of_other_processes_is_refused(checkpoint, tmp_path):
    (checkpoint / "memory_0_of_1.safetensors").rename(checkpoint / "memory_0_of_2.safetensors")
    with pytest.raises(FileNotFoundError, match=r"memory_0_of_1\.safetensors is missing: .*as many processes"):
        small_trainer(tmp_path / "new", **RUN).train(resume_from_checkpoint=str(checkpoint))


def test_damaged_memory_is_refused(checkpoint, tmp_path):
    memory = checkpoint / "memory_0_of_1.safetensors"
    memory.write_bytes(memory.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"memory_0_of_1\.safetensors is damaged"):
        small_trainer(tmp_path / "new", **RUN).train(resume_from_checkpoint=str(checkpoint))
