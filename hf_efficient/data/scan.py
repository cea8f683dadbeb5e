"""SCAN: commands such as "jump left twice" and the actions they mean (Lake and Baroni 2018, arXiv 1711.00350).

The language is small enough to be written out: 20,910 commands. A division says which of them a model is trained on,
and so what it has to generalise to: longer action sequences, or a verb it has seen only alone.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .generated_task import NUM_RESERVED_IDS, sequence_pair
from .text_sources import lines_of

VERBS = ("walk", "look", "run", "jump")
SIDES = ("left", "right")
COMMAND_WORDS = (*VERBS, "turn", *SIDES, "opposite", "around", "twice", "thrice", "and", "after")
ACTIONS = ("I_WALK", "I_LOOK", "I_RUN", "I_JUMP", "I_TURN_LEFT", "I_TURN_RIGHT")
# One vocabulary for both sides; 0 is padding and 1 ends a sequence.
SYMBOL_IDS = {symbol: index for index, symbol in enumerate((*COMMAND_WORDS, *ACTIONS), NUM_RESERVED_IDS)}
# Symbols of both sides, and the reserved ids.
SCAN_VOCAB_SIZE = NUM_RESERVED_IDS + len(SYMBOL_IDS)

DIVISIONS = ("simple", "length", "add_jump")
LONGEST_IN_TRAINING = 22  # actions, in the division by length; the test goes up to 48
JUMP_SHARE = 10  # in the division by jump, one training example in ten is the bare command


class ScanExample(NamedTuple):
    """A command and its actions, both as words."""

    command: tuple[str, ...]
    actions: tuple[str, ...]


# --- the language ----------------------------------------------------------------------------------------------------


def scan_actions(command: str) -> tuple[str, ...]:
    """The actions a command means. Raises ValueError if it is not in the language."""
    for word, reverse in (("and", False), ("after", True)):
        first, found, second = command.partition(f" {word} ")
        if found:
            sides = _repeated(first, command), _repeated(second, command)
            return sides[1] + sides[0] if reverse else sides[0] + sides[1]
    return _repeated(command, command)


def _repeated(phrase: str, command: str) -> tuple[str, ...]:
    for word, times in (("twice", 2), ("thrice", 3)):
        if phrase.endswith(f" {word}"):
            return _directed(phrase.removesuffix(f" {word}"), command) * times
    return _directed(phrase, command)


def _directed(phrase: str, command: str) -> tuple[str, ...]:
    """A verb by itself, or with a side: once, `opposite` (turn twice first) or `around` (four times)."""
    match phrase.split():
        case [verb] if verb in VERBS:
            return (f"I_{verb.upper()}",)
        case [verb, *manner, side] if verb in (*VERBS, "turn") and side in SIDES:
            turn = (f"I_TURN_{side.upper()}",)
            act = () if verb == "turn" else (f"I_{verb.upper()}",)
            match manner:
                case []:
                    return turn + act
                case ["opposite"]:
                    return turn * 2 + act
                case ["around"]:
                    return (turn + act) * 4
    raise ValueError(f"command={command!r} is not in SCAN; one that is: 'jump around left twice and walk'.")


def scan_commands() -> Iterator[str]:
    """All commands of the language."""
    directed = (f"{verb}{manner} {side}" for verb in (*VERBS, "turn") for manner in ("", " opposite", " around")
                for side in SIDES)  # fmt: skip
    phrases = [phrase + times for phrase in (*VERBS, *directed) for times in ("", " twice", " thrice")]
    yield from phrases
    for first, word, second in product(phrases, ("and", "after"), phrases):
        yield f"{first} {word} {second}"


# --- its divisions ---------------------------------------------------------------------------------------------------


def generate_scan(division: str, split: str, seed: int = 0) -> list[ScanExample]:
    """The examples of one split of one division (Lake and Baroni 2018, arXiv 1711.00350).

    division: "length": trained on up to 22 actions, tested on 24 to 48. "add_jump": trained on everything without
        "jump" and on "jump" alone, which makes a tenth of the examples; tested on the rest. Both are example by
        example those of the paper (experiments 2 and 3). "simple": 80 % of all, drawn with `seed`; for the authors'
        own draw see `read_scan`.
    split: "train" or "test".

    Raises ValueError for another division or split.
    """
    for name, value, known in (("division", division, DIVISIONS), ("split", split, ("train", "test"))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, known))}.")
    examples = [ScanExample(tuple(command.split()), scan_actions(command)) for command in scan_commands()]
    is_trained: Sequence[bool] | np.ndarray
    if division == "simple":
        is_trained = np.random.default_rng(seed).permutation(len(examples)) < 0.8 * len(examples)
    elif division == "length":
        is_trained = [len(example.actions) <= LONGEST_IN_TRAINING for example in examples]
    else:
        is_trained = ["jump" not in example.command or len(example.command) == 1 for example in examples]
    chosen = [example for example, trained in zip(examples, is_trained, strict=True) if trained == (split == "train")]
    if division == "add_jump" and split == "train":
        chosen += [ScanExample(("jump",), ("I_JUMP",))] * (len(chosen) // (JUMP_SHARE - 1) - 1)
    return chosen


def read_scan(source: str | Path) -> Iterator[ScanExample]:
    """The examples of one of the authors' files, `IN: command OUT: actions` in a line; it may end with .gz.

    From Lake and Baroni 2018, arXiv 1711.00350.

    Raises ValueError, with file and line, for a line of another form.
    """
    for place, line in lines_of(source):
        command, found, actions = line.removeprefix("IN: ").partition(" OUT: ")
        if not found or not line.startswith("IN: "):
            raise ValueError(f"{place}: {line!r} is not `IN: command OUT: actions`.")
        yield ScanExample(tuple(command.split()), tuple(actions.split()))


def scan_features(example: ScanExample, decoder_only: bool = False) -> dict[str, Tensor]:
    """An example in the form of `sequence_pair`: the command is read, the actions are written.

    Raises ValueError for a word that SCAN does not have.
    """
    unknown = {*example.command, *example.actions}.difference(SYMBOL_IDS)
    if unknown:
        raise ValueError(f"word={unknown.pop()!r} is not a word of SCAN.")
    source, target = ([SYMBOL_IDS[word] for word in side] for side in example)
    return sequence_pair(source, target, decoder_only)
