"""Adaptive input embedding and softmax (Grave et al. 2017, arXiv 1609.04309; Baevski & Auli 2019, arXiv 1809.10853).

The vocabulary is cut into bins at `cutoffs`, frequent ids first: bin 0 is the head, the others are tails. With
`div_val = d` bin i has embeddings of width `embedding_size // d**i`, projected to the model's width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_transformer_xl import TransformerXLConfig


def bin_ranges(config: TransformerXLConfig) -> list[tuple[int, int]]:
    """First id and end of every vocabulary bin."""
    ends = [0, *config.cutoffs, config.vocab_size]
    return list(zip(ends, ends[1:], strict=False))


def bin_widths(config: TransformerXLConfig) -> list[int]:
    """Embedding width of every vocabulary bin."""
    return [config.embedding_size // config.div_val**i for i in range(len(config.cutoffs) + 1)]


class Projections(nn.Module):
    """Matrices (hidden_size, width of a bin), each under its bin's number."""

    def __init__(self, hidden_size: int, widths: dict[int, int]):
        super().__init__()
        for index, width in widths.items():
            self.register_parameter(str(index), nn.Parameter(torch.empty(hidden_size, width)))

    def forward(self, states: Tensor, index: int, transposed: bool = False) -> Tensor:
        """(..., width of bin `index`) to (..., hidden_size), or with `transposed` back."""
        projection = getattr(self, str(index))
        return states @ projection if transposed else F.linear(states, projection)


class AdaptiveEmbedding(nn.Module):
    """Token embedding in bins, projected to `hidden_size`.

    `weight` is the table of the head bin, `tails[i].weight` that of tail bin i. With `div_val == 1` all bins have one
    width and `weight` holds the whole vocabulary; then the bins matter to the softmax only.

    Each weight is read in a call of the module that has it, because an offloaded weight is there only then. (The
    embedding itself is called for ids only: other tools hook into its calls, and change what it gives.)
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.ranges = bin_ranges(config) if config.div_val > 1 else [(0, config.vocab_size)]
        widths = bin_widths(config)[: len(self.ranges)]
        self.weight = nn.Parameter(torch.empty(self.ranges[0][1], widths[0]))
        self.tails = nn.ModuleDict()
        for i, (low, high) in enumerate(self.ranges[1:], start=1):
            self.tails[str(i)] = nn.Embedding(high - low, widths[i])
        self.projects = config.div_val > 1 or config.embedding_size != config.hidden_size
        self.projections = Projections(config.hidden_size, dict(enumerate(widths)) if self.projects else {})

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...,) ids to (..., hidden_size). Every bin is looked up for every id, without a data-dependent shape.

        Cost O(tokens * hidden_size * sum of the bins' widths).
        """
        embeddings = self._project(0, F.embedding(self._rows_of(0, input_ids), self.weight))
        for index in range(1, len(self.ranges)):
            tail = self._project(index, self.tails[str(index)](self._rows_of(index, input_ids)))
            in_bin = input_ids >= self.ranges[index][0]
            embeddings = torch.where(in_bin[..., None], tail, embeddings)
        return embeddings

    def project_back(self, hidden_states: Tensor, bins: Sequence[int]) -> list[Tensor]:
        """(..., hidden_size) to (..., width) for each of `bins`, for the softmax that shares the projections.

        Raises:
            ValueError: FSDP2 has sharded the embedding by itself, so that the softmax cannot read them.
        """
        # The attribute tells a DTensor, of which the import is slow.
        if bins and any(hasattr(projection, "placements") for projection in self.projections.parameters()):
            raise ValueError(
                "FSDP2 shards the embedding by itself, but the softmax shares its projections; build the model with "
                "tie_word_embeddings=True, so that both are sharded together, or with tie_projs=False for every bin."
            )
        return [self.projections(hidden_states, index, transposed=True) for index in bins]

    def _rows_of(self, index: int, input_ids: Tensor) -> Tensor:
        """Rows (...,) of a bin's table, some row for the ids of other bins."""
        low, high = self.ranges[index]
        rows = (input_ids - low).clamp(min=0)
        if index < len(self.ranges) - 1:
            # Later bins overwrite these. The last bin is open, so that an id outside the vocabulary is an error.
            rows = rows.clamp(max=high - low - 1)
        return rows

    def _project(self, index: int, rows: Tensor) -> Tensor:
        return self.projections(rows, index) if self.projects else rows

    def extra_repr(self) -> str:
        return f"ranges={self.ranges}, width={self.weight.shape[1]}"


class TailWords(nn.Module):
    """Weights of the words of one tail; no `nn.Linear`, so that adapters and quantisers pass by the whole softmax."""

    def __init__(self, width: int, num_words: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_words, width))
        self.bias = nn.Parameter(torch.empty(num_words))

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) to (..., num_words)."""
        return F.linear(states, self.weight, self.bias)

    def extra_repr(self) -> str:
        num_words, width = self.weight.shape
        return f"width={width}, num_words={num_words}"


class AdaptiveSoftmax(nn.Module):
    """Softmax over vocabulary bins: the head gives its own words and one column per tail, each tail its own words.

    `weight` and `bias` belong to the head bin (with `div_val == 1` to the whole vocabulary), `cluster_weight` and
    `cluster_bias` to the tails' columns in the head, in the order of the tails. `tie_projs[i]` makes bin i use the
    embedding's projection, whose results the caller hands in, so that no parameter has two names.

    Attributes:
        shared_bins: bins of the embedding whose projections are used here.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.ranges = bin_ranges(config)
        self.is_one_table = config.div_val == 1
        widths = bin_widths(config)
        num_words = config.vocab_size if self.is_one_table else self.ranges[0][1]
        self.weight = nn.Parameter(torch.empty(num_words, widths[0]))
        self.bias = nn.Parameter(torch.empty(num_words))
        num_tails = len(self.ranges) - 1
        if num_tails:
            self.cluster_weight = nn.Parameter(torch.empty(num_tails, config.embedding_size))
            self.cluster_bias = nn.Parameter(torch.empty(num_tails))
        self.tails = nn.ModuleDict()
        if not self.is_one_table:
            for i, (low, high) in enumerate(self.ranges[1:], start=1):
                self.tails[str(i)] = TailWords(widths[i], high - low)
        self.projects = config.div_val > 1 or config.embedding_size != config.hidden_size
        self.tied_projections = [self.projects and tied for tied in config.tie_projs]
        self.shared_bins = sorted({self._bin_of_embedding(i) for i, tied in enumerate(self.tied_projections) if tied})
        own = {i: width for i, width in enumerate(widths) if self.projects and not self.tied_projections[i]}
        self.projections = Projections(config.hidden_size, own)

    def _bin_of_embedding(self, index: int) -> int:
        return 0 if self.is_one_table else index

    @property
    def last_start(self) -> int:
        """The id that the first row of the last table belongs to."""
        return 0 if self.is_one_table else self.ranges[-1][0]

    def forward(self, hidden_states: Tensor, shared: Sequence[Tensor] = (), labels: Tensor | None = None) -> Tensor:
        """Normalised log-probabilities of the whole vocabulary, (..., hidden_size) to (..., vocab_size), float32.

        Cost O(tokens * sum of the bins' words * widths), the price of a full softmax of shrunk width.

        Args:
            hidden_states: (..., hidden_size); with `labels` (tokens, hidden_size).
            shared: what the embedding makes of them for each of `shared_bins`, (..., width of the bin) each.
            labels: (tokens,), already shifted. With them negative log-likelihoods (tokens,) are returned, in token
                order and in nats, 0 where a label is -100. A tail is then evaluated for its own labels only, and
                nothing of shape (tokens, vocab_size) is built.
        """
        states = self._project(hidden_states, shared)
        head = _log_softmax(self._score_head(states[0]))
        if labels is not None:
            return self._losses(states, head, labels)
        shortlist = self.ranges[0][1]
        parts = [head[..., :shortlist]]
        for index in range(1, len(self.ranges)):
            column = shortlist + index - 1
            parts.append(head[..., column, None] + _log_softmax(self._score_tail(states[index], index)))
        return torch.cat(parts, dim=-1)

    def _project(self, hidden_states: Tensor, shared: Sequence[Tensor]) -> list[Tensor]:
        """States of the width of every bin."""
        if not self.projects:
            return [hidden_states] * len(self.ranges)
        given = dict(zip(self.shared_bins, shared, strict=True))
        return [
            given[self._bin_of_embedding(i)] if tied else self.projections(hidden_states, i, transposed=True)
            for i, tied in enumerate(self.tied_projections)
        ]

    def _score_head(self, states: Tensor) -> Tensor:
        """(..., width of the head) to (..., words of the head + tails)."""
        shortlist = self.ranges[0][1]
        weight, bias = self.weight[:shortlist], self.bias[:shortlist]
        if len(self.ranges) > 1:
            weight = torch.cat([weight, self.cluster_weight])
            bias = torch.cat([bias, self.cluster_bias])
        return F.linear(states, weight, bias)

    def _score_tail(self, states: Tensor, index: int) -> Tensor:
        """(..., width of the tail) to (..., words of the tail)."""
        if not self.is_one_table:
            return self.tails[str(index)](states)
        low, high = self.ranges[index]
        return F.linear(states, self.weight[low:high], self.bias[low:high])

    def _losses(self, states: list[Tensor], head: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihoods (tokens,), given log-probabilities of the head's words and the tails."""
        shortlist = self.ranges[0][1]
        column = labels.masked_fill(labels == -100, 0)
        for index, (low, _) in enumerate(self.ranges[1:], start=1):
            column = torch.where(labels >= low, shortlist + index - 1, column)
        log_probs = head.gather(-1, column[:, None]).squeeze(-1)
        for index, (low, high) in enumerate(self.ranges[1:], start=1):
            # The last bin is open, so that a label outside the vocabulary is an error.
            is_last = index == len(self.ranges) - 1
            in_bin = (labels >= low) if is_last else (labels >= low) & (labels < high)
            own = in_bin.nonzero().squeeze(-1)
            tail = _log_softmax(self._score_tail(states[index][own], index))
            tail = tail.gather(-1, (labels[own] - low)[:, None]).squeeze(-1)
            log_probs = log_probs.index_add(0, own, tail)
        return -log_probs.masked_fill(labels == -100, 0.0)

    def extra_repr(self) -> str:
        return f"ranges={self.ranges}, width={self.weight.shape[1]}"


def _log_softmax(logits: Tensor) -> Tensor:
    # In half precision the bins' probabilities no longer sum to one.
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


__all__ = ["AdaptiveEmbedding", "AdaptiveSoftmax", "TailWords"]
