"""The weights of a saved model: whole safetensors files, and never pickles."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What a training leaves beside the model: ours, and transformers' Trainer.
TRAINING_STATE = (
    *("training_args.bin", "trainer_state.json", "run_settings.json", "report.json", "recipe.yaml"),
    *("optimizer.*", "scheduler.*", "scaler.*", "rng_state*"),
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")


def weight_files(folder: Path) -> list[str]:
    """Names of the files that `from_pretrained` reads the weights from, each found to be whole.

    Raises FileNotFoundError if there are none or a shard is missing, ValueError if they are pickled or broken.
    """
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / WEIGHTS_INDEX).is_file():
        names = [WEIGHTS_INDEX, *read_index(folder / WEIGHTS_INDEX)]
    else:
        for path in sorted(folder.iterdir()):
            refuse_pickle(path)
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no {WEIGHTS}; save the model with save_pretrained({str(folder)!r})."
        )
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / WEIGHTS_INDEX} names {name!r}, which is missing; save the model again."
            )
        if name != WEIGHTS_INDEX:
            check_safetensors(folder / name)
    return names


def read_index(path: Path) -> list[str]:
    """The shards that an index names. Raises ValueError if it is damaged or leads out of its folder."""
    try:
        shards = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no index of weights ({error}); save the model again.") from error
    for shard in shards:
        if not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise ValueError(f"{path} names {shard!r}, which is no safetensors file beside it; save the model again.")
    return shards


def check_safetensors(path: Path) -> None:
    """Raises ValueError if a file is no safetensors file, or its end is missing."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); save or copy it again.") from error
    if not names:
        raise ValueError(f"{path} holds no weights; save the model again.")


def is_training_state(name: str) -> bool:
    """Whether a file records a training: its settings, its figures, where it stood."""
    return any(fnmatchcase(name, pattern) for pattern in TRAINING_STATE)


def refuse_pickle(path: Path) -> None:
    """Raises ValueError if a file is a pickle, which can run code on the machine of whoever loads it."""
    if not is_training_state(path.name) and any(fnmatchcase(path.name, pattern) for pattern in PICKLES):
        raise ValueError(
            f"folder={str(path.parent)!r} holds {path.name!r}, a pickle, which can run code where it is loaded; save "
            f"the model again with save_pretrained, which writes {WEIGHTS}, and remove {path.name!r} or name it in "
            ".hubignore."
        )
