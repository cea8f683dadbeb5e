"""What generated tasks share: an example is made when it is read, from a seed and its index."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .lanes import IGNORE

# Ids that every sequence of a generated task may hold; its symbols begin behind them.
PAD_ID = 0  # a pad
EOS_ID = 1  # the end of the sequence
NUM_RESERVED_IDS = 2


class GeneratedTask(torch.utils.data.Dataset, ABC):
    """Examples that nothing stores: item i depends on the task's settings, `seed` and i alone.

    So a task of a million examples costs no memory, workers and processes agree on it, and a run that is resumed sees
    the same data. Sub-classes write `make_example`. torch's and numpy's global generators are never touched.

    Example:

        Trainer(model, args, train_dataset=CopyTask(100_000), eval_dataset=CopyTask(1_000, seed=1))
        datasets.IterableDataset.from_generator(lambda: iter(CopyTask(100_000)))

    Raises ValueError for a count below 1 or a negative seed.
    """

    def __init__(self, num_examples: int, seed: int = 0):
        check_at_least(num_examples=(num_examples, 1), seed=(seed, 0))
        self.num_examples = num_examples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(self.num_examples)[index]
        # Not a torch.Generator: on CPUs that reads 32 bits of its seed.
        return self.make_example(np.random.default_rng((self.seed, index)))

    @abstractmethod
    def make_example(self, generator: np.random.Generator) -> dict[str, Tensor]:
        """One example; everything random in it comes from `generator`."""


def check_at_least(**arguments: tuple[int, int]) -> None:
    """Raises ValueError for the first argument, given as name=(value, least), that is below its least value."""
    for name, (value, least) in arguments.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def sequence_pair(source: ArrayLike, target: ArrayLike, decoder_only: bool = False) -> dict[str, Tensor]:
    """Two sequences of ids as a model reads them; each gets the end of sequence.

    For an encoder-decoder model:
    - "input_ids": (source + 1,) int64; "labels": (target + 1,).

    With `decoder_only`, for a causal model, which shifts the labels itself:
    - "input_ids": (source + target + 2,) source, end of sequence, target, end of sequence.
    - "labels": the same, -100 at the source and its end of sequence.
    """
    asked, answer = (torch.from_numpy(np.append(ids, EOS_ID).astype(np.int64)) for ids in (source, target))
    if not decoder_only:
        return {"input_ids": asked, "labels": answer}
    ignored = torch.full_like(asked, IGNORE)
    return {"input_ids": torch.cat([asked, answer]), "labels": torch.cat([ignored, answer])}
