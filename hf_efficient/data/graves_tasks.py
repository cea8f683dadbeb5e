"""Parity, logic, addition and sort: the synthetic tasks of Graves 2016 (arXiv 1603.08983, section 3).

Inputs are vectors, one per time step, which differ in how much thought they need: a network with adaptive computation
time may take as many inner steps at one as it has gates to evaluate or digits to carry.

Letters in shape notes: B batch, L time steps, I width of the input vectors, K labels per step.
"""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from .generated_task import GeneratedTask, check_at_least
from .lanes import IGNORE

# The paper's ten gates in its order, each as its values at (P, Q) = (0, 0), (0, 1), (1, 0), (1, 1).
LOGIC_GATES = {
    "nor": (1, 0, 0, 0),
    "not P and Q": (0, 1, 0, 0),
    "P and not Q": (0, 0, 1, 0),
    "xor": (0, 1, 1, 0),
    "nand": (1, 1, 1, 0),
    "and": (0, 0, 0, 1),
    "xnor": (1, 0, 0, 1),
    "if P then Q": (1, 1, 0, 1),
    "if Q then P": (1, 0, 1, 1),
    "or": (0, 1, 1, 1),
}
GATE_TABLE = np.array(list(LOGIC_GATES.values())).reshape(-1, 2, 2)
BASE = 10


class GravesTask(GeneratedTask):
    """Sequences of vectors with one label per step, or several: what `make_batch` of a sub-class gives.

    From Graves 2016, arXiv 1603.08983, section 3.

    - "inputs_embeds": (L, I) float32.
    - "labels": (L,) int64 or (L, K), -100 where a step has no target.

    Beside single examples there are batches, which cost less: `task.batch(i, size)` depends on the task's settings,
    `seed`, i and `size` alone, and holds other examples than the items do. It has a first dimension B, zeros and -100
    behind the rows that end sooner, and then an "attention_mask" (B, L).

    Attributes for a model's configuration: `input_size`, `num_labels`, `num_label_groups`.
    """

    input_size: int
    num_labels: int
    num_label_groups: int = 1

    def make_example(self, generator: np.random.Generator) -> dict[str, Tensor]:
        """The one row of a batch of one."""
        inputs, labels, _ = self.make_batch(generator, 1)
        return {"inputs_embeds": torch.from_numpy(inputs[0]), "labels": torch.from_numpy(labels[0])}

    def batch(self, index: int, size: int) -> dict[str, Tensor]:
        """Batch number `index`, from 0 and without end, of `size` rows."""
        check_at_least(index=(index, 0), size=(size, 1))
        # The last number tells batches from items, and keeps them apart.
        generator = np.random.default_rng((self.seed, index, size, 1))
        inputs, labels, lengths = self.make_batch(generator, size)
        batch = {"inputs_embeds": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        if lengths.min() < lengths.max():
            batch["attention_mask"] = torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))
        return batch

    def batches(self, size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """An endless stream of batches, from number `start`."""
        return (self.batch(index, size) for index in count(start))

    @abstractmethod
    def make_batch(self, generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs (B, L, I) float32, labels (B, L) or (B, L, K) int64, both filled up behind the rows, lengths (B,)."""

    @abstractmethod
    def difficulty(self, inputs_embeds: Tensor) -> Tensor:
        """What there is to do at each step, inputs (..., L, I) to (..., L): the paper plots ponder time over it."""


class ParityTask(GravesTask):
    """Is the number of ones odd? One vector, of which 1 to `num_bits` random entries are 1 or -1 and the others 0.

    From Graves 2016, arXiv 1603.08983, section 3.

    Paper: 64 bits.
    """

    num_labels = 2

    def __init__(self, num_examples: int, num_bits: int = 64, seed: int = 0):
        super().__init__(num_examples, seed)
        check_at_least(num_bits=(num_bits, 1))
        self.num_bits = self.input_size = num_bits

    def make_batch(self, generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Vectors (B, 1, bits), labels (B, 1)."""
        num_set = generator.integers(1, self.num_bits + 1, size=(size, 1))
        order = generator.random((size, self.num_bits)).argsort(axis=1)
        signs = generator.integers(2, size=(size, self.num_bits)) * 2 - 1
        vectors = signs * (order < num_set)
        labels = (vectors == 1).sum(axis=1) % 2
        return vectors[:, None].astype(np.float32), labels[:, None], np.ones(size, dtype=np.int64)

    def difficulty(self, inputs_embeds: Tensor) -> Tensor:
        """Entries that are not 0."""
        return (inputs_embeds != 0).sum(-1)


class LogicTask(GravesTask):
    """Apply a chain of logic gates to two bits, at each of 1 to `max_length` steps.

    From Graves 2016, arXiv 1603.08983, section 3.

    A vector has two bits b_0 and b_1, and 1 to `max_gates` gates T_1, T_2, ... as one-hot chunks of 10, zeros behind
    them. b_{i+1} = T_i(b_i, b_{i-1}), and the target is the last of these. From the second step on, b_0 is the
    target of the step before and given as 0, so that the network must remember it. Paper: 10 steps, 10 gates.
    """

    num_labels = 2

    def __init__(self, num_examples: int, max_length: int = 10, max_gates: int = 10, seed: int = 0):
        super().__init__(num_examples, seed)
        check_at_least(max_length=(max_length, 1), max_gates=(max_gates, 1))
        self.max_length = max_length
        self.max_gates = max_gates
        self.input_size = 2 + len(LOGIC_GATES) * max_gates

    def make_batch(self, generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits and gates (B, L, 2 + 10 gates), last bits (B, L)."""
        lengths = generator.integers(1, self.max_length + 1, size)
        longest = lengths.max()
        bits = generator.integers(2, size=(size, longest, 2))
        bits[:, 1:, 0] = 0
        gates = generator.integers(len(LOGIC_GATES), size=(size, longest, self.max_gates))
        num_gates = generator.integers(1, self.max_gates + 1, size=(size, longest))
        is_used = np.arange(self.max_gates) < num_gates[..., None]
        is_step = np.arange(longest) < lengths[:, None]
        labels = np.where(is_step, self._targets(bits, gates, is_used), IGNORE)
        chunks = np.eye(len(LOGIC_GATES))[gates] * is_used[..., None]
        inputs = np.concatenate([bits, chunks.reshape(size, longest, -1)], axis=2) * is_step[..., None]
        return inputs.astype(np.float32), labels, lengths

    @staticmethod
    def _targets(bits: np.ndarray, gates: np.ndarray, is_used: np.ndarray) -> np.ndarray:
        """Bits (B, L, 2), gates (B, L, gates) and which are there to the last bit of each step, (B, L)."""
        # First the answers of all steps at once for both bits that b_0 may be, (B, L, 2), then which it is.
        newer = np.broadcast_to(bits[..., 1:], bits.shape)
        older = np.broadcast_to(np.arange(2), bits.shape)
        for index in range(gates.shape[-1]):
            gate, used = gates[..., index, None], is_used[..., index, None]
            older, newer = np.where(used, newer, older), np.where(used, GATE_TABLE[gate, newer, older], newer)
        rows, targets = np.arange(len(bits)), [bits[:, 0, 0]]
        for step in range(bits.shape[1]):
            targets.append(newer[rows, step, targets[-1]])
        return np.stack(targets[1:], axis=1)

    def difficulty(self, inputs_embeds: Tensor) -> Tensor:
        """Gates."""
        return inputs_embeds[..., 2:].sum(-1).long()


class AdditionVectorsTask(GravesTask):
    """Add up 1 to `max_length` numbers of 1 to `max_digits` digits, one number per step.

    From Graves 2016, arXiv 1603.08983, section 3.

    A number is one-hot digits, the most significant first, zeros behind its end. From the second step on the target is
    the sum so far: as many digits as the largest sum has, one label each, with class 10 for every place behind its
    end. A number of several digits does not begin with 0. Paper: 5 numbers of 5 digits, so 6 labels.
    """

    num_labels = BASE + 1

    def __init__(self, num_examples: int, max_length: int = 5, max_digits: int = 5, seed: int = 0):
        super().__init__(num_examples, seed)
        # Sums must fit into int64.
        check_at_least(max_length=(max_length, 1), max_digits=(max_digits, 1))
        if max_digits > 15 or max_length > 1000:
            raise ValueError(
                f"max_digits={max_digits}, max_length={max_length}: at most 15 and 1000 fit into 64 bits."
            )
        self.max_length = max_length
        self.max_digits = max_digits
        self.input_size = BASE * max_digits
        self.num_label_groups = len(str(max_length * (BASE**max_digits - 1)))

    def make_batch(self, generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers (B, L, 10 digits), digits of the sums (B, L, K)."""
        lengths = generator.integers(1, self.max_length + 1, size)
        longest = lengths.max()
        num_digits = generator.integers(1, self.max_digits + 1, size=(size, longest))
        least = np.where(num_digits > 1, BASE ** (num_digits - 1), 0)
        numbers = generator.integers(least, BASE**num_digits)
        is_step = np.arange(longest) < lengths[:, None]
        digits = _written(numbers, self.max_digits)
        one_hot = np.eye(BASE + 1, BASE)[digits] * is_step[..., None, None]
        labels = np.where(is_step[..., None], _written(numbers.cumsum(axis=1), self.num_label_groups), IGNORE)
        labels[:, 0] = IGNORE
        if self.num_label_groups == 1:
            labels = labels[..., 0]
        return one_hot.reshape(size, longest, -1).astype(np.float32), labels, lengths

    def difficulty(self, inputs_embeds: Tensor) -> Tensor:
        """Digits."""
        return inputs_embeds.sum(-1).long()


class SortTask(GravesTask):
    """Sort 2 to `max_length` normal numbers: read them one by one, then name them in ascending order.

    From Graves 2016, arXiv 1603.08983, section 3.

    A vector is a number and a flag, 1 at the last number. Then come as many steps with zeros; the target of the first
    is the position, from 0, of the least number, and so on. Paper: 15 numbers.
    """

    input_size = 2

    def __init__(self, num_examples: int, max_length: int = 15, seed: int = 0):
        super().__init__(num_examples, seed)
        check_at_least(max_length=(max_length, 2))
        self.max_length = self.num_labels = max_length

    def make_batch(self, generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers and flags (B, 2 L, 2), positions in ascending order of the numbers (B, 2 L)."""
        lengths = generator.integers(2, self.max_length + 1, size)
        longest = lengths.max()
        values = generator.standard_normal((size, longest)).astype(np.float32)
        position = np.arange(longest)
        is_number = position < lengths[:, None]
        inputs = np.zeros((size, 2 * longest, 2), dtype=np.float32)
        inputs[:, :longest, 0] = values * is_number
        inputs[np.arange(size), lengths - 1, 1] = 1
        order = np.where(is_number, values, np.inf).argsort(axis=1, kind="stable")
        labels = np.full((size, 2 * longest), IGNORE)
        rows, places = is_number.nonzero()
        labels[rows, lengths[rows] + places] = order[rows, places]
        return inputs, labels, 2 * lengths

    def difficulty(self, inputs_embeds: Tensor) -> Tensor:
        """Numbers in the sequence, at each of its steps."""
        is_last = inputs_embeds[..., 1]
        return (is_last.argmax(-1, keepdim=True) + 1).expand(is_last.shape)


# The tasks by their names.
GRAVES_TASKS = {"parity": ParityTask, "logic": LogicTask, "addition": AdditionVectorsTask, "sort": SortTask}


def sequence_error_rate(logits: Tensor, labels: Tensor) -> float:
    """Share of the sequences with any mistake, the paper's measure.

    logits: (B, ..., classes). labels: (B, ...), -100 is not counted; a sequence without a label is right.
    """
    is_wrong = (logits.argmax(-1) != labels) & (labels != IGNORE)
    return is_wrong.flatten(1).any(1).float().mean().item()


def _written(numbers: np.ndarray, num_places: int) -> np.ndarray:
    """Numbers (...) as digits, (..., places), the most significant first; 10 behind the end."""
    num_digits = 1 + (numbers[..., None] >= BASE ** np.arange(1, num_places)).sum(axis=-1)
    power = num_digits[..., None] - 1 - np.arange(num_places)
    digits = numbers[..., None] // BASE ** np.maximum(power, 0) % BASE
    return np.where(power >= 0, digits, BASE)
