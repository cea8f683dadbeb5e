"""Run folders: found again, never overwritten."""

import json
from pathlib import Path

import pytest

from hf_efficient.training import check_run_folder, last_checkpoint

SETTINGS = {"learning_rate": 0.01, "model": {"mem_len": 128}, "data": Path("corpus.txt"), "cutoffs": (1, 2)}


def make_checkpoint(root: Path, step: int, state: str = "{}") -> Path:
    """A checkpoint as far as its last file goes."""
    path = root / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(state)
    return path


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path / "missing") is None
    assert last_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 11, state='{"epoch": 1.')
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    assert last_checkpoint(tmp_path) == str(newest)


def test_new_folder_is_made_and_recorded(tmp_path):
    folder = tmp_path / "runs" / "xl"
    assert check_run_folder(folder, SETTINGS) is None
    recorded = json.loads((folder / "run_settings.json").read_text())
    assert recorded == {"learning_rate": 0.01, "model": {"mem_len": 128}, "data": "corpus.txt", "cutoffs": [1, 2]}
    assert [path.name for path in folder.iterdir()] == ["run_settings.json"]


def test_folder_with_other_files_may_be_used(tmp_path):
    (tmp_path / "notes.md").write_text("why I run this")
    assert check_run_folder(tmp_path, SETTINGS) is None


def test_same_run_goes_on(tmp_path):
    check_run_folder(tmp_path, SETTINGS)
    assert check_run_folder(tmp_path, SETTINGS) is None
    checkpoint = make_checkpoint(tmp_path, 5)
    assert check_run_folder(tmp_path, dict(reversed(SETTINGS.items()))) == str(checkpoint)


def test_different_run_is_refused(tmp_path):
    check_run_folder(tmp_path, SETTINGS)
    make_checkpoint(tmp_path, 5)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r"already holds a different run: learning_rate is 0\.01 there and 0\.1 here;"
    ):
        check_run_folder(tmp_path, {**SETTINGS, "learning_rate": 0.1})
    with pytest.raises(ValueError, match=r"cutoffs is \[1, 2\] there and None here \(and 1 more\)"):
        check_run_folder(tmp_path, {"learning_rate": 0.01, "model": {"mem_len": 128}})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint-5/trainer_state.json", "model.safetensors", "config.json"])
def test_unknown_run_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"already holds a different run \(.* is there, run_settings.json is not\)"):
        check_run_folder(tmp_path, SETTINGS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "run_settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"run_settings\.json .*choose another output_dir"):
        check_run_folder(tmp_path, SETTINGS)


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(ValueError, match="is a file: give the path of a folder"):
        check_run_folder(path, SETTINGS)
