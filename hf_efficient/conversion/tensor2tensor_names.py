"""What the readers of tensor2tensor's models share: choices among known settings, and changes of weights' shapes."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

# Of the 32 rows of its table of target spaces tensor2tensor adds this one to every input of a translation's encoder.
TARGET_SPACE_ID = 1

# A layer norm's scale and shift, by tensor2tensor's names.
NORM = {"g": "weight", "b": "bias"}

# Our name of a weight, and how its shape changes.
Renaming = tuple[str, Callable[[Tensor], Tensor]]


def choose(cfg: Mapping[str, Any], key: str, choices: Mapping[Any, Any]) -> Any:
    """What the value of a setting becomes.

    Raises:
        ValueError: none of the choices is the value.
    """
    value = cfg.get(key)
    for known, meaning in choices.items():
        if type(known) is type(value) and known == value:  # True is no 1
            return meaning
    raise ValueError(f"{key}={value!r} has no counterpart; known are {', '.join(map(repr, choices))}.")


def norm_position(cfg: Mapping[str, Any], sequences: Mapping[tuple[str, str], str]) -> str:
    """What the settings `pre` and `post` together become: the sequences of operations around a sub-layer.

    Raises:
        ValueError: none of the sequences is the pair.
    """
    pair = (cfg["pre"], cfg["post"])
    if pair not in sequences:
        raise ValueError(f"pre and post = {pair} have no counterpart; known are {', '.join(map(str, sequences))}.")
    return sequences[pair]


def smoothing_over_all(cfg: Mapping[str, Any]) -> float:
    """Label smoothing. There the mass is spread over the other ids only, here over all: the loss is the same but for a
    constant."""
    return cfg["label_smoothing"] * cfg["vocab"] / (cfg["vocab"] - 1)


def same(weight: Tensor) -> Tensor:
    """As it is."""
    return weight


def transposed(weight: Tensor) -> Tensor:
    """(in, out), with or without axes of 1 before it, to (out, in)."""
    return weight.reshape(weight.shape[-2:]).t()


def norm_names(old: str, new: str) -> dict[str, Renaming]:
    """A layer norm's scale and shift."""
    return {f"{old}.{key}": (f"{new}.{NORM[key]}", same) for key in NORM}


def attention_names(old: str, new: str) -> dict[str, Renaming]:
    """The four matrices of an attention."""
    return {f"{old}.{key}.w": (f"{new}.{key}_proj.weight", transposed) for key in "qkvo"}
