"""The Evolved Transformer once more, token by token in float64: the truth that the tests hold the real one to.

Written from So, Liang and Le 2019 (arXiv 1901.11117) and a description of tensor2tensor's blocks, sharing no code
with the package. One row at a time and never a batch; vectors in Python lists, one per position; every kernel tap is
a product of its own. Autograd runs through it, so gradients come from it too.

Weights are looked up by the names of the package's state dict, without the stack's prefix. Settings are an object with
the fields of `EvolvedTransformerConfig`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Vectors = list[Tensor]


@dataclass
class Row:
    """One row of a batch as it enters a stack.

    embeds: a vector for each place, pads included.
    is_token: False for pads.
    memory: the vectors of the encoder that the row may look at, pads not among them; None without an encoder.
    """

    embeds: Vectors
    is_token: list[bool]
    memory: Vectors | None = None


def sinusoid(position: int, width: int) -> Tensor:
    """Sines of all wavelengths, then cosines."""
    count = width // 2
    angles = [position * 10000 ** (-j / max(count - 1, 1)) for j in range(count)]
    values = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles] + [0.0] * (width % 2)
    return torch.tensor(values, dtype=torch.float64)


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def widened(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last channel."""
    return torch.cat([x, torch.zeros(width - len(x), dtype=x.dtype)])


def added(states: Vectors, updates: Vectors) -> Vectors:
    return [state + update for state, update in zip(states, updates, strict=True)]


def wide_heads(settings: Any) -> int:
    """Heads of the decoder's first self-attention: twice the others', at most 16, never fewer than the others."""
    given = getattr(settings, "num_wide_attention_heads", None)
    heads = settings.num_attention_heads
    return max(min(2 * heads, 16), heads) if given is None else given


class NaiveStack:
    """What the encoder and the decoder have in common."""

    is_causal: bool

    def __init__(self, settings: Any, weights: dict[str, Tensor]):
        self.settings, self.weights = settings, weights
        self.width = settings.hidden_size

    # --- small things -------------------------------------------------------------------------------------

    def linear(self, name: str, x: Tensor) -> Tensor:
        result = self.weights[f"{name}.weight"] @ x
        bias = self.weights.get(f"{name}.bias")
        return result if bias is None else result + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        deviation = torch.sqrt(((x - x.mean()) ** 2).mean() + self.settings.layer_norm_eps)
        return (x - x.mean()) / deviation * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def norms(self, name: str, rows: Vectors) -> Vectors:
        return [self.norm(name, x) for x in rows]

    def masked_norms(self, name: str, rows: Vectors, row: Row) -> Vectors:
        """Normalised, and zero at pads, where the shift of the norm would stand."""
        normed = self.norms(name, rows)
        return [x if token else torch.zeros_like(x) for x, token in zip(normed, row.is_token, strict=True)]

    # --- attention ----------------------------------------------------------------------------------------

    def attend(self, name: str, num_heads: int, query_row: Tensor, seen: Vectors) -> Tensor:
        """One token's attention to the vectors it sees; nothing seen gives zero."""
        size = self.width // num_heads
        query = self.linear(f"{name}.q_proj", query_row)
        keys = [self.linear(f"{name}.k_proj", x) for x in seen]
        values = [self.linear(f"{name}.v_proj", x) for x in seen]
        heads = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            total = torch.zeros(size, dtype=query.dtype)
            if seen:
                scores = torch.stack([(query[part] * size**-0.5) @ key[part] for key in keys])
                shares = torch.exp(scores - scores.max())
                shares = shares / shares.sum()
                for share, value in zip(shares, values, strict=True):
                    total = total + share * value[part]
            heads.append(total)
        return self.linear(f"{name}.o_proj", torch.cat(heads))

    def self_attention(self, name: str, num_heads: int, normed: Vectors, row: Row) -> Vectors:
        results = []
        for i, x in enumerate(normed):
            last = i if self.is_causal else len(normed) - 1
            seen = [normed[j] for j in range(last + 1) if row.is_token[j]]
            results.append(self.attend(name, num_heads, x, seen))
        return results

    # --- convolutions -------------------------------------------------------------------------------------

    def place(self, i: int, tap: int, num_taps: int) -> int:
        """The place that a tap of the kernel at place i sees: the last tap i itself, or the middle one."""
        return i + tap - ((num_taps - 1) if self.is_causal else (num_taps - 1) // 2)

    def separable(self, name: str, inputs: Vectors) -> Vectors:
        """Each channel by itself along the places, then a matrix; outside of the row are zeros."""
        taps = self.weights[f"{name}.depthwise.weight"]
        num_taps = taps.shape[-1]
        outputs = []
        for i in range(len(inputs)):
            total = torch.zeros_like(inputs[i])
            for tap in range(num_taps):
                j = self.place(i, tap, num_taps)
                if 0 <= j < len(inputs):
                    total = total + taps[:, 0, tap] * inputs[j]
            outputs.append(self.linear(f"{name}.pointwise", total))
        return outputs

    def convolution(self, name: str, inputs: Vectors) -> Vectors:
        """A matrix for each tap."""
        kernel = self.weights[f"{name}.weight"]
        num_taps = kernel.shape[-1]
        outputs = []
        for i in range(len(inputs)):
            total = self.weights[f"{name}.bias"]
            for tap in range(num_taps):
                j = self.place(i, tap, num_taps)
                if 0 <= j < len(inputs):
                    total = total + kernel[:, :, tap] @ inputs[j]
            outputs.append(total)
        return outputs

    # --- the stack ----------------------------------------------------------------------------------------

    def block(self, name: str, states: Vectors, row: Row) -> Vectors:
        raise NotImplementedError

    def num_blocks(self) -> int:
        raise NotImplementedError

    def run(self, row: Row) -> list[Vectors]:
        """The row's states as they come in and after each block, the last ones normalised once more."""
        reports = [row.embeds]
        for index in range(self.num_blocks()):
            reports.append(self.block(f"layers.{index}", reports[-1], row))
        reports[-1] = self.norms("final_norm", reports[-1])
        return reports


class NaiveEncoder(NaiveStack):
    """GLU, two branches, self-attention, feed-forward."""

    is_causal = False

    def num_blocks(self) -> int:
        return self.settings.num_encoder_layers

    def block(self, name: str, states: Vectors, row: Row) -> Vectors:
        states = added(states, [self.gated(f"{name}.glu", x) for x in self.norms(f"{name}.glu_norm", states)])
        states = added(states, self.branches(name, states, row))
        normed = self.norms(f"{name}.self_attention_norm", states)
        heads = self.settings.num_attention_heads
        states = added(states, self.self_attention(f"{name}.self_attention", heads, normed, row))
        normed = self.norms(f"{name}.feed_forward_norm", states)
        return added(states, [self.feed_forward(f"{name}.feed_forward", x) for x in normed])

    def gated(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.value_proj", x) * sigmoid(self.linear(f"{name}.gate_proj", x))

    def branches(self, name: str, states: Vectors, row: Row) -> Vectors:
        """A matrix beside a convolution that fills the first channels only; then a convolution, likewise."""
        normed = self.masked_norms(f"{name}.branch_norm", states, row)
        name = f"{name}.branches"
        left = [relu(self.linear(f"{name}.dense", x)) for x in normed]
        right = [relu(x) for x in self.convolution(f"{name}.convolution", normed)]
        both = added(left, [widened(x, 4 * self.width) for x in right])
        middle = self.masked_norms(f"{name}.norm", both, row)
        return [widened(x, self.width) for x in self.separable(f"{name}.separable", middle)]

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.down_proj", relu(self.linear(f"{name}.up_proj", x)))


class NaiveDecoder(NaiveStack):
    """Wide self-attention beside cross-attention, two branches, self-attention, cross-attention, feed-forward."""

    is_causal = True

    def num_blocks(self) -> int:
        return self.settings.num_decoder_layers

    def block(self, name: str, states: Vectors, row: Row) -> Vectors:
        heads = self.settings.num_attention_heads
        normed = self.norms(f"{name}.wide_attention_norm", states)
        wide = self.self_attention(f"{name}.wide_self_attention", wide_heads(self.settings), normed, row)
        states = added(states, wide)
        if row.memory is not None:  # of the same normalised rows
            states = added(states, self.cross(f"{name}.wide_cross_attention", heads, normed, row))
        states = added(states, self.branches(name, states, row))
        normed = self.norms(f"{name}.self_attention_norm", states)
        states = added(states, self.self_attention(f"{name}.self_attention", heads, normed, row))
        if row.memory is not None:
            normed = self.norms(f"{name}.cross_attention_norm", states)
            states = added(states, self.cross(f"{name}.cross_attention", heads, normed, row))
        normed = self.norms(f"{name}.feed_forward_norm", states)
        return added(states, [self.feed_forward(f"{name}.feed_forward", x) for x in normed])

    def cross(self, name: str, heads: int, normed: Vectors, row: Row) -> Vectors:
        return [self.attend(name, heads, x, row.memory) for x in normed]

    def branches(self, name: str, states: Vectors, row: Row) -> Vectors:
        """A separable convolution of 11 beside one of 7 without activation in the first channels; then one of 7."""
        normed = self.masked_norms(f"{name}.branch_norm", states, row)
        name = f"{name}.branches"
        left = [relu(x) for x in self.separable(f"{name}.separable_11", normed)]
        right = self.separable(f"{name}.separable_7", normed)
        both = added(left, [widened(x, 2 * self.width) for x in right])
        middle = self.masked_norms(f"{name}.norm", both, row)
        return self.separable(f"{name}.separable_out", middle)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.up_proj", x)
        hidden = self.norm(f"{name}.norm", hidden * sigmoid(hidden))
        return self.linear(f"{name}.down_proj", hidden)


# --- whole models -----------------------------------------------------------------------------------------


def default_positions(is_token: list[bool]) -> list[int]:
    """A token's number among those of its row; a pad's does not matter."""
    positions, seen = [], 0
    for token in is_token:
        positions.append(seen)
        seen += token
    return positions


def embed(settings: Any, weights: dict[str, Tensor], ids: list[int], is_token: list[bool], stack: str) -> Vectors:
    """Token embeddings with their positions, as they enter a stack."""
    vectors = []
    for token_id, position in zip(ids, default_positions(is_token), strict=True):
        vector = weights["embed_tokens.weight"][token_id]
        if settings.scale_embeddings:
            vector = vector * math.sqrt(settings.hidden_size)
        if settings.zero_pad_embedding and token_id == settings.pad_token_id:
            vector = torch.zeros_like(vector)
        if stack == "encoder" and settings.encoder_input_bias:
            vector = vector + weights["encoder.input_bias.bias"]
        if settings.position_signal == "sinusoid":
            vector = vector + sinusoid(position, settings.hidden_size)
        vectors.append(vector)
    return vectors


def run_stack(
    settings: Any,
    weights: dict[str, Tensor],
    stack: str,
    ids: list[list[int]],
    mask: list[list[int]],
    memories: list[Vectors] | None = None,
) -> list[list[Vectors]]:
    """The rows of a batch through `"encoder"` or `"decoder"` of a body's weights, one by one; reports as `run`'s."""
    inside = {name.removeprefix(f"{stack}."): weight for name, weight in weights.items()}
    naive = (NaiveEncoder if stack == "encoder" else NaiveDecoder)(settings, inside)
    results = []
    for index, (row_ids, row_mask) in enumerate(zip(ids, mask, strict=True)):
        tokens = [bool(token) for token in row_mask]
        embeds = embed(settings, weights, row_ids, tokens, stack)
        results.append(naive.run(Row(embeds, tokens, None if memories is None else memories[index])))
    return results


__all__ = ["NaiveDecoder", "NaiveEncoder", "Row", "run_stack", "sinusoid", "wide_heads"]
