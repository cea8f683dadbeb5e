"""Whose run a folder holds: find the checkpoint to go on from, and never write over another run."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRAINER_STATE_NAME = "trainer_state.json"
SETTINGS_NAME = "run_settings.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# What a run leaves behind; a folder with one of these but without SETTINGS_NAME holds somebody's work.
RUN_FILES = ("checkpoint-*", "config.json", "*.safetensors", "*.bin")


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint in a run folder, None if there is none.

    A process killed while it saves leaves a checkpoint without a readable `trainer_state.json`, the file that is
    written last; such a checkpoint is passed over.
    """
    root = Path(output_dir)
    steps = {
        int(match[1]): path
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    }
    return next((str(steps[step]) for step in sorted(steps, reverse=True) if _is_complete(steps[step])), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_run_folder(output_dir: str | os.PathLike, settings: Mapping[str, Any]) -> str | None:
    """Make `output_dir` the folder of the run with these settings, or refuse to.

    A new folder is made and the settings are recorded in it as `run_settings.json`. A folder of the same run (equal
    settings) may be used again. Every process of a run may call this.

    settings: what makes the run this run and no other (model, data, schedule, seed); values that JSON can hold, paths
    and other objects by their `str`. Leave out what may change when a run goes on, such as logging.

    Returns the checkpoint to resume from, None if the run has none yet.
    Raises ValueError, having written nothing, if the folder holds a different run or files of an unknown one, or if
    `output_dir` is a file.
    """
    root = Path(output_dir)
    if root.exists() and not root.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file: give the path of a folder")
    settings = json.loads(json.dumps(dict(settings), default=str))
    record = root / SETTINGS_NAME
    if record.is_file():
        _require_same_run(root, _read_settings(record), dict(settings))
    elif foreign := sorted(path.name for pattern in RUN_FILES for path in root.glob(pattern)):
        raise ValueError(
            f"output_dir={str(output_dir)!r} already holds a different run ({foreign[0]} is there, {SETTINGS_NAME} is "
            "not): choose another folder, or remove this one"
        )
    else:
        root.mkdir(parents=True, exist_ok=True)
        _write_atomically(record, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return last_checkpoint(root)


def _read_settings(record: Path) -> dict[str, Any]:
    try:
        settings = json.loads(record.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is not readable JSON ({error}): choose another output_dir") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{record} holds no settings: choose another output_dir")
    return settings


def _require_same_run(root: Path, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    names = sorted(recorded.keys() | settings.keys())
    different = [name for name in names if recorded.get(name) != settings.get(name)]
    if different:
        name = different[0]
        others = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise ValueError(
            f"output_dir={str(root)!r} already holds a different run: {name} is {recorded.get(name)!r} there and "
            f"{settings.get(name)!r} here{others}; choose another output_dir, or use the settings of {SETTINGS_NAME}"
        )


def _write_atomically(path: Path, text: str) -> None:
    """Other processes see the whole file or none of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
