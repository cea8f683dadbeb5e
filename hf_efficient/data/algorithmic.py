"""Copy, reverse and addition: the algorithmic tasks of the Universal Transformer paper.

Dehghani et al. 2019 (arXiv 1807.03819), section 3.4: trained on inputs of up to 40 symbols, tested on up to 400. The
rules are tensor2tensor's (`data_generators/algorithmic.py`): a length is drawn uniformly, ids 0 and 1 are padding and
end of sequence, symbol s has id s + 2, and input and target both end with the end of sequence. Numbers are written
with the least digit first. One error is mended: tensor2tensor's addition counts 10 symbols although its separator is
an eleventh, so its vocabulary is one id short.
"""

from abc import abstractmethod

import numpy as np
from torch import Tensor

from .generated_task import NUM_RESERVED_IDS, GeneratedTask, check_at_least, sequence_pair
from .lanes import IGNORE


class AlgorithmicTask(GeneratedTask):
    """Pairs of symbol sequences: what `make_pair` of a sub-class gives, in the form of `sequence_pair`.

    - "input_ids": the source and the end of sequence; with `decoder_only` also the target.
    - "labels": the target and the end of sequence.

    num_examples: what `len()` says. min_length, max_length: least and most symbols of the source, end of sequence not
    counted; the paper trains on 1 to 40. num_symbols: of the alphabet (10: decimal digits, 2: bits).

    Rows differ in length: batch them with `PaddingCollator`. Models need `vocab_size` ids.
    Raises ValueError for lengths that are illegal or contradict each other, and fewer than two symbols.
    """

    LEAST_LENGTH = 1
    NUM_SEPARATORS = 0

    def __init__(
        self,
        num_examples: int,
        min_length: int | None = None,
        max_length: int = 40,
        num_symbols: int = 10,
        decoder_only: bool = False,
        seed: int = 0,
    ):
        super().__init__(num_examples, seed)
        self.min_length = self.LEAST_LENGTH if min_length is None else min_length
        check_at_least(
            min_length=(self.min_length, self.LEAST_LENGTH),
            max_length=(max_length, self.min_length),
            num_symbols=(num_symbols, 2),
        )
        self.max_length = max_length
        self.num_symbols = num_symbols
        self.decoder_only = decoder_only

    @property
    def vocab_size(self) -> int:
        """Ids that occur, padding and end of sequence among them."""
        return NUM_RESERVED_IDS + self.num_symbols + self.NUM_SEPARATORS

    def make_example(self, generator: np.random.Generator) -> dict[str, Tensor]:
        """A pair as a model reads it."""
        source, target = self.make_pair(generator)
        return sequence_pair(source + NUM_RESERVED_IDS, target + NUM_RESERVED_IDS, self.decoder_only)

    @abstractmethod
    def make_pair(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Source and target as symbols from 0."""

    def _draw_source(self, generator: np.random.Generator) -> np.ndarray:
        """Symbols drawn uniformly, as many as a length drawn uniformly."""
        length = generator.integers(self.min_length, self.max_length + 1)
        return generator.integers(self.num_symbols, size=length)


class CopyTask(AlgorithmicTask):
    """The target is the source (Dehghani et al. 2019, arXiv 1807.03819, section 3.4)."""

    def make_pair(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Symbols, and the same again."""
        source = self._draw_source(generator)
        return source, source


class ReverseTask(AlgorithmicTask):
    """The target is the source, last symbol first (Dehghani et al. 2019, arXiv 1807.03819, section 3.4)."""

    def make_pair(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Symbols, and the same backwards."""
        source = self._draw_source(generator)
        return source, source[::-1]


class AdditionTask(AlgorithmicTask):
    """The source is two numbers with a separator between them, the target their sum; least digit first.

    From Dehghani et al. 2019, arXiv 1807.03819, section 3.4.

    A source of at most L symbols has a first number of 1 to L // 2 digits and a second that fits into the rest, each
    length drawn uniformly. Numbers do not end with a zero, unless they are one digit. Base `num_symbols`.
    """

    LEAST_LENGTH = 3
    NUM_SEPARATORS = 1

    def make_pair(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Two numbers, and their sum."""
        length = int(generator.integers(1, self.max_length // 2 + 1))
        room = self.max_length - length - 1
        other_length = int(generator.integers(max(1, self.min_length - length - 1), room + 1))
        first, second = (self._draw_number(n, generator) for n in (length, other_length))
        separator = [self.num_symbols]
        total = add_digits(first.tolist(), second.tolist(), self.num_symbols)
        return np.concatenate([first, separator, second]), np.array(total)

    def _draw_number(self, length: int, generator: np.random.Generator) -> np.ndarray:
        digits = generator.integers(self.num_symbols, size=length)
        if length > 1:
            digits[-1] = generator.integers(1, self.num_symbols)
        return digits


# The tasks by their names.
ALGORITHMIC_TASKS = {"copy": CopyTask, "reverse": ReverseTask, "addition": AdditionTask}


def add_digits(first: list[int], second: list[int], base: int) -> list[int]:
    """The sum of two numbers of which each is a list of digits, the least first."""
    total, carry = [], 0
    for place in range(max(len(first), len(second))):
        carry += sum(number[place] for number in (first, second) if place < len(number))
        total.append(carry % base)
        carry //= base
    return [*total, carry] if carry else total


def sequence_accuracy(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """How much of the labelled symbols is predicted, and how much of the sequences without an error.

    predictions: (..., length) ids, position by position those meant for `labels` (shift causal ones by one first; pad
    generated ones, without their start symbol, to the same length). labels: (..., length), -100 is not counted.
    Returns "symbol_accuracy" and "sequence_accuracy", the paper's char-acc and seq-acc.
    """
    is_counted = labels != IGNORE
    is_right = predictions == labels
    return {
        "symbol_accuracy": is_right[is_counted].float().mean().item(),
        "sequence_accuracy": (is_right | ~is_counted).all(-1).float().mean().item(),
    }
