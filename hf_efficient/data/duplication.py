"""The duplication task: a sequence `0w0w`, of which the second `w` can only be predicted by looking back at the first.

Kitaev et al. 2020, section 2.1 (`w` of 511 symbols 1 to 127, so 1,024 tokens). A model that attends to the right token
predicts the second half perfectly; one that does not is left with one guess in 127. Made for attention that is only
approximate: a key that hashing misses costs a token.
"""

import numpy as np
import torch
from torch import Tensor

from .lanes import IGNORE


class DuplicationTask(torch.utils.data.Dataset):
    """Examples of the duplication task. Item i depends on `seed` and i alone, so there is nothing to store.

    From Kitaev et al. 2020, arXiv 2001.04451, table 2.

    - "input_ids": (2 * num_symbols + 2,) int64: 0, the symbols w, 0, the same symbols again.
    - "labels": `input_ids` at the second w, -100 elsewhere; models shift them themselves.

    num_examples: what `len()` says. num_symbols: length of w. vocab_size: symbols are 1 to `vocab_size - 1`.

    Example:

        Trainer(model, args, train_dataset=DuplicationTask(10_000), eval_dataset=DuplicationTask(100, seed=1))

    Raises ValueError for a count below 1, fewer than two symbols to choose from, or a negative seed.
    """

    def __init__(self, num_examples: int, num_symbols: int = 127, vocab_size: int = 128, seed: int = 0):
        for name, value, least in (
            ("num_examples", num_examples, 1),
            ("num_symbols", num_symbols, 1),
            ("vocab_size", vocab_size, 3),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self.num_examples = num_examples
        self.num_symbols = num_symbols
        self.vocab_size = vocab_size
        self.seed = seed

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(self.num_examples)[index]
        # Not a torch.Generator: on CPUs that reads 32 bits of its seed.
        generator = np.random.default_rng((self.seed, index))
        symbols = torch.from_numpy(generator.integers(1, self.vocab_size, self.num_symbols))
        half = torch.cat([torch.zeros(1, dtype=torch.int64), symbols])
        ignored = torch.full((self.num_symbols + 2,), IGNORE)
        return {"input_ids": half.repeat(2), "labels": torch.cat([ignored, symbols])}


def prediction_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the labelled tokens that are the likeliest prediction of the token before them.

    logits: (..., length, vocabulary), those of position t for token t + 1. labels: (..., length), -100 is not counted.
    """
    labels = labels[..., 1:]
    is_right = logits[..., :-1, :].argmax(-1) == labels
    return is_right[labels != IGNORE].float().mean().item()
