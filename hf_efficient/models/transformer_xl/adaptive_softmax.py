"""Adaptive input embedding and softmax (Grave et al. 2017, arXiv 1609.04309; Baevski & Auli 2019, arXiv 1809.10853).

The vocabulary is cut into bins at `cutoffs`, frequent ids first: bin 0 is the head, the others are tails. With
`div_val = d` bin i has embeddings of width `embedding_size // d**i`, projected to the model's width.
"""

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


class AdaptiveEmbedding(nn.Embedding):
    """Token embedding in bins, projected to `hidden_size`.

    `weight` is the table of the head bin, `tails[i].weight` that of tail bin i. With `div_val == 1` all bins have one
    width and `weight` holds the whole vocabulary; then the bins matter to the softmax only.
    """

    def __init__(self, config: TransformerXLConfig):
        self.ranges = bin_ranges(config) if config.div_val > 1 else [(0, config.vocab_size)]
        widths = bin_widths(config)[: len(self.ranges)]
        super().__init__(self.ranges[0][1], widths[0])
        self.tails = nn.ModuleDict()
        for i, (low, high) in enumerate(self.ranges[1:], start=1):
            self.tails[str(i)] = nn.Embedding(high - low, widths[i])
        self.projections = nn.ParameterDict()
        if config.div_val > 1 or config.embedding_size != config.hidden_size:
            for i, width in enumerate(widths):
                self.projections[str(i)] = nn.Parameter(torch.empty(config.hidden_size, width))

    @property
    def last_table(self) -> nn.Embedding:
        """The module that holds the last bin's rows."""
        return self.tails[str(len(self.ranges) - 1)] if self.tails else self

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...,) ids to (..., hidden_size). Every bin is looked up for every id, without a data-dependent shape.

        Cost O(tokens * hidden_size * sum of the bins' widths).
        """
        embeddings = self._embed_bin(0, input_ids, self.weight)
        for name, table in self.tails.items():
            in_bin = input_ids >= self.ranges[int(name)][0]
            tail = self._embed_bin(int(name), input_ids, table.weight)
            embeddings = torch.where(in_bin[..., None], tail, embeddings)
        return embeddings

    def _embed_bin(self, index: int, input_ids: Tensor, table: Tensor) -> Tensor:
        low, high = self.ranges[index]
        local_ids = (input_ids - low).clamp(min=0)
        if index < len(self.ranges) - 1:
            # Later bins overwrite these. The last bin is open, so that an id outside the vocabulary is an error.
            local_ids = local_ids.clamp(max=high - low - 1)
        rows = F.embedding(local_ids, table)
        if str(index) not in self.projections:
            return rows
        return F.linear(rows, self.projections[str(index)])

    def extra_repr(self) -> str:
        return f"ranges={self.ranges}, width={self.embedding_dim}"


class AdaptiveSoftmax(nn.Linear):
    """Softmax over vocabulary bins: the head gives its own words and one column per tail, each tail its own words.

    `weight` and `bias` belong to the head bin (with `div_val == 1` to the whole vocabulary), `cluster_weight` and
    `cluster_bias` to the tails' columns in the head, in the order of the tails. `tie_projs[i]` makes bin i use the
    embedding's projection, which the caller hands in, so that no parameter has two names.
    """

    def __init__(self, config: TransformerXLConfig):
        self.ranges = bin_ranges(config)
        self.is_one_table = config.div_val == 1
        widths = bin_widths(config)
        super().__init__(widths[0], config.vocab_size if self.is_one_table else self.ranges[0][1])
        num_tails = len(self.ranges) - 1
        if num_tails:
            self.cluster_weight = nn.Parameter(torch.empty(num_tails, config.embedding_size))
            self.cluster_bias = nn.Parameter(torch.empty(num_tails))
        self.tails = nn.ModuleDict()
        if not self.is_one_table:
            for i, (low, high) in enumerate(self.ranges[1:], start=1):
                self.tails[str(i)] = nn.Linear(widths[i], high - low)
        self.projects = config.div_val > 1 or config.embedding_size != config.hidden_size
        self.tied_projections = [self.projects and tied for tied in config.tie_projs]
        self.projections = nn.ParameterDict()
        for i, width in enumerate(widths):
            if self.projects and not self.tied_projections[i]:
                self.projections[str(i)] = nn.Parameter(torch.empty(config.hidden_size, width))

    @property
    def last_table(self) -> nn.Linear:
        """The module that holds the last bin's words."""
        return self.tails[str(len(self.ranges) - 1)] if self.tails else self

    @property
    def last_start(self) -> int:
        """The id that the first row of `last_table` belongs to."""
        return self.ranges[-1][0] if self.tails else 0

    def _project(self, hidden_states: Tensor, index: int, embedding: AdaptiveEmbedding) -> Tensor:
        """(..., hidden_size) to (..., width of bin `index`)."""
        if not self.projects:
            return hidden_states
        if self.tied_projections[index]:
            shared = embedding.projections["0" if self.is_one_table else str(index)]
        else:
            shared = self.projections[str(index)]
        return hidden_states @ shared

    def _head_log_probs(self, hidden_states: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """(..., words of the head + tails), normalised, float32."""
        shortlist = self.ranges[0][1]
        weight, bias = self.weight[:shortlist], self.bias[:shortlist]
        if len(self.ranges) > 1:
            weight = torch.cat([weight, self.cluster_weight])
            bias = torch.cat([bias, self.cluster_bias])
        return _log_softmax(F.linear(self._project(hidden_states, 0, embedding), weight, bias))

    def _tail_log_probs(self, hidden_states: Tensor, index: int, embedding: AdaptiveEmbedding) -> Tensor:
        """(..., words of tail `index`), normalised within the tail, float32."""
        if self.is_one_table:
            low, high = self.ranges[index]
            weight, bias = self.weight[low:high], self.bias[low:high]
        else:
            weight, bias = self.tails[str(index)].weight, self.tails[str(index)].bias
        return _log_softmax(F.linear(self._project(hidden_states, index, embedding), weight, bias))

    def forward(self, hidden_states: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Normalised log-probabilities of the whole vocabulary, (..., hidden_size) to (..., vocab_size), float32.

        Cost O(tokens * sum of the bins' words * widths), the price of a full softmax of shrunk width.
        """
        shortlist = self.ranges[0][1]
        head = self._head_log_probs(hidden_states, embedding)
        parts = [head[..., :shortlist]]
        for index in range(1, len(self.ranges)):
            column = shortlist + index - 1
            parts.append(head[..., column, None] + self._tail_log_probs(hidden_states, index, embedding))
        return torch.cat(parts, dim=-1)

    def losses(self, hidden_states: Tensor, labels: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Negative log-likelihoods in token order, 0 where a label is -100.

        A tail is evaluated for its own labels only, so nothing of shape (tokens, vocab_size) is ever built.

        Args:
            hidden_states: (tokens, hidden_size).
            labels: (tokens,), already shifted.
            embedding: the input embedding, for tied projections.

        Returns:
            (tokens,) float32, in nats.
        """
        shortlist = self.ranges[0][1]
        head = self._head_log_probs(hidden_states, embedding)
        column = labels.masked_fill(labels == -100, 0)
        for index, (low, _) in enumerate(self.ranges[1:], start=1):
            column = torch.where(labels >= low, shortlist + index - 1, column)
        log_probs = head.gather(-1, column[:, None]).squeeze(-1)
        for index, (low, high) in enumerate(self.ranges[1:], start=1):
            # The last bin is open, so that a label outside the vocabulary is an error.
            is_last = index == len(self.ranges) - 1
            in_bin = (labels >= low) if is_last else (labels >= low) & (labels < high)
            own = in_bin.nonzero().squeeze(-1)
            tail = self._tail_log_probs(hidden_states[own], index, embedding)
            tail = tail.gather(-1, (labels[own] - low)[:, None]).squeeze(-1)
            log_probs = log_probs.index_add(0, own, tail)
        return -log_probs.masked_fill(labels == -100, 0.0)

    def extra_repr(self) -> str:
        return f"ranges={self.ranges}, width={self.in_features}"


def _log_softmax(logits: Tensor) -> Tensor:
    # In half precision the bins' probabilities no longer sum to one.
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


__all__ = ["AdaptiveEmbedding", "AdaptiveSoftmax"]
