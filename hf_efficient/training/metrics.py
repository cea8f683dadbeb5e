"""Figures a run is judged by: mean loss, perplexity, bits per byte or character, peak memory, tokens per second."""

import contextlib
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

MEGABYTE = 2**20


def perplexity(loss: float) -> float:
    """exp of the mean loss in nats per token; infinity where that is beyond a double."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Bits that the model spends on one byte of the text, comparable between tokenizers.

    loss: mean nats per predicted token. num_tokens: tokens of the text, document ends included, so that what they
    cost is charged to the text. num_bytes: the text's length in UTF-8. With one token a byte this is `loss / ln 2`,
    the "bpc" of enwik8 (Dai et al. 2019, table 2).

    Raises ValueError if a count is not positive.
    """
    return _bits_per_unit(loss, num_tokens, num_bytes, "num_bytes")


def bits_per_character(loss: float, num_tokens: int, num_characters: int) -> float:
    """Bits per Unicode character of the text, as `bits_per_byte` but with the text's length in characters.

    Raises ValueError if a count is not positive.
    """
    return _bits_per_unit(loss, num_tokens, num_characters, "num_characters")


def _bits_per_unit(loss: float, num_tokens: int, num_units: int, name: str) -> float:
    for argument, count in (("num_tokens", num_tokens), (name, num_units)):
        if count <= 0:
            raise ValueError(f"{argument}={count} must be positive: count them over the text the loss is of")
    return loss * num_tokens / num_units / math.log(2)


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """The most memory this process has used so far, in MB of 2^20 bytes.

    On a CUDA device: the most that tensors took there. Otherwise: the largest resident size of the process, everything
    included; nan on a system that does not tell it (Windows).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEGABYTE
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux getrusage begins a process at the size of the one that started it.
        peak = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if peak is not None:
            return int(peak.group(1)) * 1024 / MEGABYTE
    try:
        import resource
    except ImportError:
        return math.nan
    # macOS counts in bytes, others in KB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


class LossTotals:
    """Sum of per-token losses and number of predicted tokens, over the batches of one process.

    Their quotient over all processes is the exact mean, however many tokens each batch predicts. Sums are kept on
    `device`, without waiting for it, in double precision where the device has it.
    """

    def __init__(self, device: torch.device | str):
        self.dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._nats = torch.zeros((), dtype=self.dtype, device=device)
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, losses: Tensor, shift_labels: Tensor) -> None:
        """Count one batch. losses: (batch, length), nats, 0 where `shift_labels` (batch, length) is -100."""
        self.add_sums(losses.detach().sum(dtype=self.dtype), shift_labels.ne(-100).sum())

    def add_sums(self, nats: Tensor, num_tokens: Tensor) -> None:
        """Count the sum of some losses, and the number of tokens they are of."""
        self._nats += nats
        self._num_tokens += num_tokens

    def mean(self, accelerator: Accelerator) -> float:
        """Mean nats per predicted token over all processes, each of which must call this; nan if there is none."""
        nats, num_tokens = accelerator.reduce(torch.stack([self._nats, self._num_tokens]), "sum").tolist()
        return nats / num_tokens if num_tokens else math.nan


class TokenMeter:
    """Counts tokens and the time spent on them.

    Tokens may be counted by tensors on the accelerator; they are fetched only when a figure is asked for.

    Example:

        meter = TokenMeter()
        meter.start()
        meter.add(2048)
        with meter.paused():
            evaluate()
        meter.lap()  # tokens per second since the last lap, the evaluation's time left out
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.seconds = 0.0
        self._pending: Tensor | int = 0
        self._lap_start: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Mean over all finished laps; 0 before the first."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def all_tokens(self) -> int:
        """Tokens of all laps, the running one too; waits for the accelerator."""
        return self.num_tokens + int(self._pending)

    def start(self) -> None:
        """Start the clock, if it is not running yet."""
        if self._lap_start is None:
            self._lap_start = time.perf_counter()

    def add(self, num_tokens: Tensor | int) -> None:
        """Count `num_tokens` for the running lap."""
        self._pending = self._pending + num_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out."""
        before = time.perf_counter()
        try:
            yield
        finally:
            if self._lap_start is not None:
                self._lap_start += time.perf_counter() - before

    def lap(self) -> float:
        """End the lap, begin the next, and return the ended one's tokens per second."""
        if self._lap_start is None:
            return 0.0
        num_tokens, now = int(self._pending), time.perf_counter()
        seconds = now - self._lap_start
        self._pending, self._lap_start = 0, now
        self.num_tokens += num_tokens
        self.seconds += seconds
        return num_tokens / seconds if seconds else 0.0
