"""A corpus as lanes of segments: the order in which a model with memory reads it.

    stream of all documents   t0 t1 t2 ....................................................... tN
    cut into lanes            |------- lane 0 ------|------- lane 1 ------|------- lane 2 ------|
    each lane in segments     |seg 0|seg 1|seg 2|.. |seg 0|seg 1|seg 2|.. |seg 0|seg 1|seg 2|..

A batch is one segment of each lane. Row b of step n + 1 continues row b of step n, so what a model remembers of a row
is what stands before it in the text.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

# The label that counts for no loss, as everywhere in transformers.
IGNORE = -100
DOCUMENT_BOUNDARIES = ("ignore", "reset")


# --- the stream ------------------------------------------------------------------------------------------------------


class TokenStream:
    """All tokens of a table end to end, read from its memory-mapped record batches.

    tokens: table with the column "input_ids" (lists of integers), and perhaps "num_bytes" and "ends_document".
    It holds the offsets of the record batches, nothing per token. Pickled, a table on disk travels as its path.
    """

    def __init__(self, tokens: Dataset):
        # `select`, `shuffle` and `filter` keep a list of rows beside the table as it was; make that the table.
        self._tokens = tokens if tokens._indices is None else tokens.flatten_indices()
        self._batches = self._column("input_ids")
        lengths = [len(batch.flatten()) for batch in self._batches.chunks]
        self._batch_starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._batch_starts[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_batches": None}  # pickling Arrow arrays would copy the corpus

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._batches = self._column("input_ids")

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._tokens.data.column(name)

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text, None if the table does not tell."""
        return pc.sum(self._column("num_bytes")).as_py() if "num_bytes" in self._tokens.column_names else None

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop), int64."""
        token_ids = np.empty(stop - start, dtype=np.int64)
        index = int(np.searchsorted(self._batch_starts, start, side="right")) - 1
        filled = 0
        while filled < len(token_ids):
            offset = start + filled - int(self._batch_starts[index])
            part = self._batches.chunk(index).flatten()[offset : offset + len(token_ids) - filled]
            token_ids[filled : filled + len(part)] = part.to_numpy()
            filled += len(part)
            index += 1
        return token_ids

    def document_bounds(self) -> np.ndarray:
        """Where documents begin and the last one ends: (documents + 1,) int64. Those without tokens are left out."""
        row_ends = np.cumsum(pc.list_value_length(self._batches).to_numpy(), dtype=np.int64)
        if "ends_document" in self._tokens.column_names:
            row_ends = row_ends[self._column("ends_document").to_numpy()]
        return np.unique(np.concatenate(([0], row_ends, [len(self)])))


# --- where the segments lie in it ------------------------------------------------------------------------------------


class Span(NamedTuple):
    """A segment: the tokens [start, stop). What it belongs to, a lane or a document, goes on up to `end`."""

    start: int
    stop: int
    end: int
    reset: bool


class StreamPlan:
    """One stream in equal lanes, whatever its documents.

    num_segments: per lane. num_starts: tokens that nothing predicts, since a lane begins with them.
    """

    def __init__(self, stream: TokenStream, num_lanes: int, segment_length: int):
        self.lane_bounds = np.arange(num_lanes + 1) * len(stream) // num_lanes
        self.segment_length = segment_length
        self.num_segments = _ceil_div(_ceil_div(len(stream), num_lanes), segment_length)
        self.num_starts = num_lanes

    def span(self, step: int, lane: int) -> Span:
        """Segment `step` of `lane`; empty where the lane ends one segment before the longest."""
        lane_start, end = self.lane_bounds[lane : lane + 2].tolist()
        start = min(lane_start + step * self.segment_length, end)
        return Span(start, min(start + self.segment_length, end), end, reset=step == 0)


class DocumentPlan:
    """Documents in segments of their own, and these segments in equal lanes; a lane may begin inside a document.

    num_segments: per lane. num_starts: tokens that nothing predicts, since a document or a lane begins with them.
    """

    def __init__(self, stream: TokenStream, num_lanes: int, segment_length: int):
        self.token_bounds = stream.document_bounds()
        self.segment_bounds = np.cumsum([0, *_ceil_div(np.diff(self.token_bounds), segment_length)])
        self.lane_bounds = np.arange(num_lanes + 1) * self.segment_bounds[-1] // num_lanes
        self.segment_length = segment_length
        self.num_segments = int(np.diff(self.lane_bounds).max())
        self.num_starts = len(np.union1d(self.segment_bounds[:-1], self.lane_bounds[:-1]))

    def span(self, step: int, lane: int) -> Span:
        """Segment `step` of `lane`; empty where the lane ends one segment before the longest."""
        lane_start, lane_end = self.lane_bounds[lane : lane + 2].tolist()
        segment = lane_start + step
        if segment >= lane_end:
            return Span(0, 0, 0, reset=False)
        document = int(np.searchsorted(self.segment_bounds, segment, side="right")) - 1
        begins, end = self.token_bounds[document : document + 2].tolist()
        index = segment - int(self.segment_bounds[document])
        start = begins + index * self.segment_length
        stop = min(start + self.segment_length, end)
        return Span(start, stop, stop if segment + 1 == lane_end else end, reset=step == 0 or index == 0)


def _ceil_div(number, divisor: int):
    """`number / divisor`, rounded up."""
    return -(-number // divisor)


# --- the segments ----------------------------------------------------------------------------------------------------


class SegmentLanes(torch.utils.data.Dataset):
    """Item i is segment `i // num_lanes` of lane `i % num_lanes`: a dictionary of tensors, T = `segment_length`.

    - "input_ids": (T,) int64.
    - "shift_labels": (T,) the next token of the lane, or of its document if documents are kept apart, also where that
      stands in the next segment; -100 where there is none.
    - "labels": (T,) `input_ids` again, for models that shift the labels themselves; -100 where there is padding.
    - "attention_mask": (T,) 1 for tokens, 0 for padding. Padded ids are 0.
    - "reset": () bool, whether a lane or a document starts here, so that nothing before belongs to the context.

    Every token of the corpus appears exactly once. Lanes are equally long, up to one token (one segment where
    documents are kept apart), so the last segments are padded on the right, and one may be padding altogether. Read it
    with a sequential sampler and `num_lanes` rows a step; with several processes, accelerate's `BatchSamplerShard`
    gives each its own lanes in order. An item costs one read of the memory-mapped table; nothing is held but the
    offsets of its record batches and, with documents kept apart, 16 bytes per document. Copies for worker processes
    share the mapping.

    Attributes:
        num_lanes, segment_length, document_boundaries: as given to `segment_lanes`.
        num_segments: per lane; `len()` is `num_segments * num_lanes`.
        num_tokens, num_bytes: of the corpus. `num_bytes` is None if the table does not tell.
        num_predictions: how many "shift_labels" there are: the tokens less the first of each lane and kept-apart
            document.
    """

    def __init__(self, tokens: Dataset, num_lanes: int, segment_length: int, document_boundaries: str = "ignore"):
        _check_arguments(tokens, num_lanes, segment_length, document_boundaries)
        self.num_lanes = num_lanes
        self.segment_length = segment_length
        self.document_boundaries = document_boundaries
        self._stream = TokenStream(tokens)
        self.num_tokens = len(self._stream)
        self.num_bytes = self._stream.num_bytes
        if self.num_tokens < num_lanes * segment_length:
            raise ValueError(
                f"tokens holds {self.num_tokens} tokens, fewer than num_lanes={num_lanes} lanes of one segment of "
                f"segment_length={segment_length}; use fewer lanes, shorter segments or more text."
            )
        make_plan = StreamPlan if document_boundaries == "ignore" else DocumentPlan
        self._plan = make_plan(self._stream, num_lanes, segment_length)
        self.num_segments = self._plan.num_segments
        self.num_predictions = self.num_tokens - self._plan.num_starts

    def __len__(self) -> int:
        return self.num_segments * self.num_lanes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, lane = divmod(range(len(self))[index], self.num_lanes)
        start, stop, end, reset = self._plan.span(step, lane)
        token_ids = torch.from_numpy(self._stream.read(start, min(stop + 1, end)))
        num_tokens, next_tokens = stop - start, token_ids[1:]
        item = {
            "input_ids": torch.zeros(self.segment_length, dtype=torch.int64),
            "shift_labels": torch.full((self.segment_length,), IGNORE),
            "labels": torch.full((self.segment_length,), IGNORE),
            "attention_mask": torch.zeros(self.segment_length, dtype=torch.int64),
            "reset": torch.tensor(reset),
        }
        item["input_ids"][:num_tokens] = token_ids[:num_tokens]
        item["shift_labels"][: len(next_tokens)] = next_tokens
        item["labels"][:num_tokens] = token_ids[:num_tokens]
        item["attention_mask"][:num_tokens] = 1
        return item


def _check_arguments(tokens: Dataset, num_lanes: int, segment_length: int, document_boundaries: str) -> None:
    """Raises TypeError or ValueError for the first argument that is not what `segment_lanes` takes."""
    if not isinstance(tokens, Dataset):
        raise TypeError(
            f"tokens must be a datasets.Dataset, not {type(tokens).__name__}; make it with tokenize_documents."
        )
    if "input_ids" not in tokens.column_names:
        raise ValueError(
            f"tokens must have the column 'input_ids', it has {tokens.column_names}; make it with tokenize_documents."
        )
    for name, value in {"num_lanes": num_lanes, "segment_length": segment_length}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be an integer.")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if document_boundaries not in DOCUMENT_BOUNDARIES:
        raise ValueError(f"document_boundaries={document_boundaries!r} is none of 'ignore', 'reset'.")


def segment_lanes(
    tokens: Dataset, num_lanes: int, segment_length: int, document_boundaries: str = "ignore"
) -> SegmentLanes:
    """Cut tokenized documents into lanes of segments, of which each token belongs to exactly one.

    From Dai et al. 2019, arXiv 1901.02860, section 3.2.

    Args:
        tokens: table with the column "input_ids"; also "num_bytes" and "ends_document" if there
            (`tokenize_documents`).
        num_lanes: rows of a step over all processes: per-device batch size times number of processes.
        segment_length: tokens that the model reads at once.
        document_boundaries: "ignore" reads all documents as one stream, as Dai et al. 2019 do; "reset" starts each
            document at a segment's start with "reset" set, and pads its last segment.

    Raises ValueError (TypeError for a wrong type) for an illegal argument, and for a corpus with fewer tokens than one
    segment per lane.
    """
    return SegmentLanes(tokens, num_lanes, segment_length, document_boundaries)
