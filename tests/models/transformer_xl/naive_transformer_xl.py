"""Transformer-XL from the equations of the paper, one row, one query and one key at a time: the truth for the model.

It shares no code with the package but the adaptive reference, which is written the same way. A row is a list of
ids, its memory one list of vectors per layer: the inputs of that layer, as in the paper, without gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_efficient.models.transformer_xl.adaptive_softmax_reference import (
    adaptive_embedding_reference,
    adaptive_log_probs_reference,
)


@dataclass
class NaiveSegment:
    """What one segment of one row gives.

    Args:
        log_probs: (T, V), of the next token.
        hidden_states: (L + 1, T, D), the input of every layer and the final states.
        attentions: (L, H, T, S), zero where a query may not look.
        memory: the memory after the segment.
    """

    log_probs: Tensor
    hidden_states: Tensor
    attentions: Tensor
    memory: list[list[Tensor]]


class NaiveRows:
    """Rows that each go their own way, as if they were alone: the truth for a batch with pads, resets and reorderings.

    Args:
        model: the `TransformerXLForCausalLM` under test.
        num_rows: B.
    """

    def __init__(self, model: torch.nn.Module, num_rows: int):
        self.naive = NaiveTransformerXL(model)
        self.memories = [self.naive.start() for _ in range(num_rows)]

    def feed(self, ids: Tensor, mask: Tensor | None = None) -> list[NaiveSegment | None]:
        """Run the ids (B, T) where the mask (B, T) is 1; None for a row that has none."""
        segments: list[NaiveSegment | None] = []
        for row, row_ids in enumerate(ids):
            tokens = row_ids.tolist() if mask is None else row_ids[mask[row].bool()].tolist()
            segment = self.naive.segment(tokens, self.memories[row]) if tokens else None
            if segment is not None:
                self.memories[row] = segment.memory
            segments.append(segment)
        return segments

    def reset(self, rows: list[int]) -> None:
        """Begin a new stream in these rows."""
        for row in rows:
            self.memories[row] = self.naive.start()

    def select(self, rows: list[int]) -> None:
        """Row b becomes what row `rows[b]` was."""
        self.memories = [self.memories[row] for row in rows]


class NaiveTransformerXL:
    """Reads the parameters of a `TransformerXLForCausalLM`, so that gradients of both can be compared."""

    def __init__(self, model: torch.nn.Module):
        self.config = model.config
        self.weights = dict(model.named_parameters(remove_duplicate=False))

    def start(self) -> list[list[Tensor]]:
        """The memory of a new stream."""
        config = self.config
        count = config.mem_len if config.memory_init == "zeros" else 0
        zero = torch.zeros(config.hidden_size, dtype=torch.float64)
        return [[zero] * count for _ in range(config.num_hidden_layers)]

    def segment(self, token_ids: list[int], memory: list[list[Tensor]] | None = None) -> NaiveSegment:
        """Run one segment behind `memory`."""
        config = self.config
        memory = self.start() if memory is None else memory
        states = [math.sqrt(config.hidden_size) * self.embed(token) for token in token_ids]
        layer_inputs, attentions, new_memory = [], [], []
        for index in range(config.num_hidden_layers):
            layer_inputs.append(torch.stack(states))
            longer = memory[index] + [state.detach() for state in states]
            new_memory.append(longer[len(longer) - min(len(longer), config.mem_len) :])
            states, weights = self.layer(index, states, memory[index])
            attentions.append(weights)
        return NaiveSegment(
            log_probs=torch.stack([torch.stack(self.log_probs(state)) for state in states]),
            hidden_states=torch.stack([*layer_inputs, torch.stack(states)]),
            attentions=torch.stack(attentions),
            memory=new_memory,
        )

    def layer(self, index: int, states: list[Tensor], memory: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Attention and feed-forward of one layer."""
        attention, feed_forward = f"model.layers.{index}.self_attn.", f"model.layers.{index}.feed_forward."
        heads = [self.head(index, head, states, memory) for head in range(self.config.num_attention_heads)]
        outputs = []
        for i, state in enumerate(states):
            attended = torch.cat([output[i] for output, _ in heads])
            summed = state + self.weights[attention + "o_proj.weight"] @ attended
            middle = summed if self.config.pre_norm else self.layer_norm(attention, summed)
            inner = self.layer_norm(feed_forward, middle) if self.config.pre_norm else middle
            up = self.weights[feed_forward + "up_proj.weight"] @ inner + self.weights[feed_forward + "up_proj.bias"]
            down = self.weights[feed_forward + "down_proj.weight"] @ up.clamp(min=0)
            summed = middle + down + self.weights[feed_forward + "down_proj.bias"]
            outputs.append(summed if self.config.pre_norm else self.layer_norm(feed_forward, summed))
        return outputs, torch.stack([weights for _, weights in heads])

    def head(self, index: int, head: int, states: list[Tensor], memory: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """One attention head: its outputs (head_dim,) and its weights (T, S)."""
        config, prefix = self.config, f"model.layers.{index}.self_attn."
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        w_q, w_k, w_v, w_r = (self.weights[f"{prefix}{kind}_proj.weight"][rows] for kind in "qkvr")
        owner = prefix if config.untie_r else "model."
        u, v = self.weights[owner + "content_bias"][head], self.weights[owner + "position_bias"][head]
        context = [*memory, *states]
        if config.pre_norm:
            context = [self.layer_norm(prefix, state) for state in context]
        keys, values = [w_k @ state for state in context], [w_v @ state for state in context]
        positions = [w_r @ self.sinusoid(distance) for distance in range(len(context))]
        outputs, weights = [], []
        for i in range(len(states)):
            here = len(memory) + i
            query = w_q @ context[here]
            oldest = max(0, here - config.mem_len + 1) if config.same_length else 0
            scores = []
            for j in range(oldest, here + 1):
                distance = min(here - j, config.clamp_len) if config.clamp_len > 0 else here - j
                position = positions[distance]
                score = query @ keys[j] + query @ position + u @ keys[j] + v @ position
                scores.append(score / math.sqrt(config.head_dim))
            probabilities = torch.stack(scores).softmax(dim=0)
            outputs.append(sum(p * values[oldest + j] for j, p in enumerate(probabilities)))
            after = len(context) - here - 1
            weights.append(torch.nn.functional.pad(probabilities, (oldest, after)))
        return outputs, torch.stack(weights)

    def sinusoid(self, distance: int) -> Tensor:
        """All sines, then all cosines, of one distance."""
        width = self.config.hidden_size
        angles = [distance * 10000 ** (-2 * k / width) for k in range(width // 2)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)

    def layer_norm(self, prefix: str, state: Tensor) -> Tensor:
        """LayerNorm of one vector."""
        centred = state - state.mean()
        normed = centred / torch.sqrt((centred**2).mean() + self.config.layer_norm_epsilon)
        return normed * self.weights[prefix + "layer_norm.weight"] + self.weights[prefix + "layer_norm.bias"]

    def bins(self) -> tuple[list[tuple[int, int]], list[str]]:
        """(first id, end) of every bin, and the name under which its own table stands."""
        ends = [0, *self.config.cutoffs, self.config.vocab_size]
        ranges = list(zip(ends, ends[1:], strict=False))
        names = ["" if i == 0 or self.config.div_val == 1 else f"tails.{i}." for i in range(len(ranges))]
        return ranges, names

    def table(self, owner: str, kind: str) -> list[Tensor]:
        """A weight or bias of every bin; with `div_val == 1` all are cut from one table."""
        ranges, names = self.bins()
        tables = [self.weights[f"{owner}{name}{kind}"] for name in names]
        if self.config.div_val == 1:
            tables = [table[low:high] for table, (low, high) in zip(tables, ranges, strict=True)]
        return tables

    def embed(self, token: int) -> Tensor:
        """Embedding of one token."""
        projections = []
        for i in range(len(self.config.cutoffs) + 1):
            name = f"model.embed_tokens.projections.{0 if self.config.div_val == 1 else i}"
            projections.append(self.weights.get(name))
        tables = self.table("model.embed_tokens.", "weight")
        return adaptive_embedding_reference(token, tables, projections, self.config.cutoffs)

    def log_probs(self, state: Tensor) -> list[Tensor]:
        """log p of every token."""
        config = self.config
        projects = config.div_val > 1 or config.embedding_size != config.hidden_size
        projections: list[Tensor | None] = []
        for i in range(len(config.cutoffs) + 1):
            shared = f"model.embed_tokens.projections.{0 if config.div_val == 1 else i}"
            name = shared if config.tie_projs[i] else f"lm_head.projections.{i}"
            projections.append(self.weights[name] if projects else None)
        return adaptive_log_probs_reference(
            state,
            weights=self.table("lm_head.", "weight"),
            biases=self.table("lm_head.", "bias"),
            projections=projections,
            cluster_weight=self.weights.get("lm_head.cluster_weight"),
            cluster_bias=self.weights.get("lm_head.cluster_bias"),
        )
