"""Self-attention of a Reformer layer: four kinds, hashing, the cache, and what a call hands to all layers.

Letters in shape notes: B batch, H heads, T tokens, K head_dim, D hidden_size, R hash rounds, F rotated directions,
S keys.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention_recall import attention_recall
from .cache_reformer import ReformerCache
from .cached_attention import cached_attention
from .configuration_reformer import HASHED_LAYERS, ReformerConfig
from .full_attention import full_attention
from .hashing import (
    add_round_offsets,
    choose_num_buckets,
    compact_buckets,
    draw_rotations,
    fixed_rotations,
    hash_vectors,
    shared_key,
)
from .local_attention import local_attention
from .lsh_attention import lsh_attention
from .reversible import is_rebuilding, keep
from .windowed_lsh_attention import windowed_lsh_attention

# An odd number whose multiples are spread over 64 bits (2^64 over the golden ratio), to tell the layers' seeds apart.
SEED_STEP = 0x9E3779B97F4A7C15


@dataclass
class ReformerCall:
    """What all layers of one call are given alike, and what they report.

    Args:
        layer_types: type of each layer in this call.
        num_hashes: hash rounds.
        seed: where the rotations of this call come from, unless `config.hash_seed` is set.
        attention_mask: (B, T) bool, True for tokens, pads last in every row; None when there are no pads.
        num_tokens: tokens given by the caller; the rest up to T fills chunks.
        num_pads: (B,) pads among these, or None.
        num_last_tokens: columns at the end in which no row had a pad, if any had.
        rotations: for each layer rotations to use, (H, K, R, F) or (B, H, K, R, F), or None.
        cache: keys and values of earlier tokens, to be read and added to.
        is_continued: whether earlier tokens are in the cache.
        implementation: `"sdpa"` or `"eager"`.
        wanted: what is reported: `"hidden_states"`, `"attentions"`, `"buckets"`, `"attention_recall"`.
        reports: by that name, one entry per layer (and the final one of `hidden_states`).
    """

    layer_types: list[str]
    num_hashes: int
    seed: int
    attention_mask: Tensor | None
    num_tokens: int
    num_pads: Tensor | None = None
    num_last_tokens: int = 0
    rotations: list[Tensor | None] | None = None
    cache: ReformerCache | None = None
    is_continued: bool = False
    implementation: str = "sdpa"
    wanted: frozenset[str] = frozenset()
    reports: dict[str, dict[int, Any]] = field(default_factory=dict)

    def report(self, name: str, layer_idx: int, value: Any) -> None:
        """Keep what a layer has to tell; not again when the backward pass runs it a second time."""
        if name in self.wanted and not is_rebuilding():
            self.reports.setdefault(name, {})[layer_idx] = value

    def reported(self, name: str, num_entries: int) -> tuple[Any, ...] | None:
        """Hand over what the layers told, in order, None for those that did not; None when it was not wanted.

        It is held here no longer: the layers' graph refers to the call, and must not be referred to by it.
        """
        entries = self.reports.pop(name, {})
        if name not in self.wanted:
            return None
        return tuple(entries.get(i) for i in range(num_entries))


class ReformerSelfAttention(nn.Module):
    """Attention of one layer, without output projection: queries, keys and values, hashing, and the cache."""

    def __init__(self, config: ReformerConfig, layer_idx: int, layer_type: str, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        width = config.num_attention_heads * config.attention_head_size
        if layer_type == "local":
            self.query = nn.Linear(config.hidden_size, width, bias=False)
            self.key = nn.Linear(config.hidden_size, width, bias=False)
        else:
            self.query_key = nn.Linear(config.hidden_size, width, bias=False)
        self.value = nn.Linear(config.hidden_size, width, bias=False)

    def forward(self, hidden_states: Tensor, call: ReformerCall) -> Tensor:
        """(B, T, D) to (B, T, H K)."""
        value = self._split_heads(self.value(hidden_states))
        if call.layer_types[self.layer_idx] == "local":
            query, key = self._split_heads(self.query(hidden_states)), self._split_heads(self.key(hidden_states))
            output, weights = self._local(query, key, value, call)
        else:
            output, weights = self._shared(self._split_heads(self.query_key(hidden_states)), value, call)
        call.report("attentions", self.layer_idx, weights)
        return output.transpose(1, 2).flatten(2)

    def _split_heads(self, states: Tensor) -> Tensor:
        """(B, T, H K) to (B, H, T, K)."""
        return states.unflatten(-1, (-1, self.config.attention_head_size)).transpose(1, 2)

    # --- local ---

    def _local(self, query: Tensor, key: Tensor, value: Tensor, call: ReformerCall) -> tuple[Tensor, Tensor | None]:
        if call.is_continued:
            return self._continue("local", query, key, value, None, call)
        config = self.config
        if call.cache is not None:
            self._append(key, value, None, call)
        return local_attention(
            query,
            key,
            value,
            chunk_length=config.local_attn_chunk_length,
            num_chunks_before=config.local_num_chunks_before,
            num_chunks_after=config.local_num_chunks_after,
            is_causal=self.is_causal,
            attention_mask=call.attention_mask,
            dropout=config.local_attention_probs_dropout_prob if self.training else 0.0,
            implementation=call.implementation,
        )

    # --- shared queries and keys ---

    def _shared(self, query_key: Tensor, value: Tensor, call: ReformerCall) -> tuple[Tensor, Tensor | None]:
        """`lsh`, `windowed_lsh` and `full`; the hashed ones exactly where they are to be."""
        layer_type = call.layer_types[self.layer_idx]
        is_exact = self._is_exact(layer_type, call.num_tokens, query_key.shape[2])
        buckets = num_buckets = None
        if layer_type in HASHED_LAYERS and not (is_exact and call.cache is None):
            buckets, num_buckets = self._hash(query_key, layer_type, call)
        if call.is_continued:
            return self._continue(layer_type, query_key, shared_key(query_key), value, buckets, call)
        if call.cache is not None:
            self._append(shared_key(query_key), value, buckets, call)
        if is_exact:
            if layer_type in HASHED_LAYERS:
                call.report("attention_recall", self.layer_idx, query_key.new_ones(query_key.shape[:2]))
            return self._exact(query_key, value, call)
        self._report_hashing(layer_type, query_key, buckets, num_buckets, call)
        hashed = self._hashed(layer_type, query_key, value, buckets, num_buckets, call)
        if call.num_pads is None or self.config.full_attention_threshold == 0:
            return hashed
        return self._exact_in_short_rows(query_key, value, *hashed, call)

    def _is_exact(self, layer_type: str, num_tokens: int, length: int) -> bool:
        """Whether all tokens see all others: as asked for, or because one chunk holds them and what fills it up."""
        if layer_type == "full" or num_tokens <= self.config.full_attention_threshold:
            return True
        return layer_type == "lsh" and length <= self.config.lsh_attn_chunk_length

    def _exact(self, query_key: Tensor, value: Tensor, call: ReformerCall) -> tuple[Tensor, Tensor | None]:
        return full_attention(
            query_key,
            shared_key(query_key),
            value,
            is_causal=self.is_causal,
            attention_mask=call.attention_mask,
            exclude_self=True,
            dropout=self._dropout,
            implementation=call.implementation,
        )

    def _exact_in_short_rows(
        self, query_key: Tensor, value: Tensor, output: Tensor, weights: Tensor | None, call: ReformerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Exact attention for rows of no more tokens than the threshold, hashed `output` and `weights` for others.

        Pads come last, so those rows' tokens stand in the first columns: others in the batch change nothing.
        """
        limit, length = self.config.full_attention_threshold, query_key.shape[2]
        mask = call.attention_mask
        beginning = replace(call, attention_mask=mask[:, :limit])
        exact, exact_weights = self._exact(query_key[:, :, :limit], value[:, :, :limit], beginning)
        is_short = (mask.sum(dim=1) <= limit)[:, None, None, None]
        rest = length - limit
        output = torch.where(is_short, F.pad(exact, (0, 0, 0, rest)), output)
        if weights is not None:
            weights = torch.where(is_short, F.pad(exact_weights, (0, rest, 0, rest)), weights)
        return output, weights

    def _hashed(
        self,
        layer_type: str,
        query_key: Tensor,
        value: Tensor,
        buckets: Tensor,
        num_buckets: tuple[int, ...],
        call: ReformerCall,
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        settings = {
            "num_buckets": math.prod(num_buckets),
            "is_causal": self.is_causal,
            "dropout": self._dropout,
            "implementation": call.implementation,
        }
        if layer_type == "windowed_lsh":
            window = config.lsh_attn_chunk_length
            return windowed_lsh_attention(query_key, value, buckets, window=window, **settings)
        return lsh_attention(
            query_key,
            value,
            buckets,
            chunk_length=config.lsh_attn_chunk_length,
            num_chunks_before=config.lsh_num_chunks_before,
            num_chunks_after=config.lsh_num_chunks_after,
            attention_mask=call.attention_mask,
            **settings,
        )

    @property
    def _dropout(self) -> float:
        return (self.config.lsh_attention_probs_dropout_prob or 0.0) if self.training else 0.0

    # --- hashing ---

    def _hash(self, query_key: Tensor, layer_type: str, call: ReformerCall) -> tuple[Tensor, tuple[int, ...]]:
        """Bucket of every token in every round, (B, H, R, T), the same when the backward pass asks again."""
        stored = None if call.cache is None else call.cache.layers[self.layer_idx]
        if call.is_continued:
            num_buckets, rotations = stored.num_buckets, stored.rotations
        else:
            num_buckets, rotations = self._num_buckets(layer_type, query_key.shape[2]), None

        def make() -> Tensor:
            directions = self._rotations(num_buckets, query_key, call) if rotations is None else rotations
            if stored is not None:
                stored.num_buckets, stored.rotations = num_buckets, directions
            buckets = hash_vectors(query_key.detach(), directions, num_buckets, call.attention_mask)
            return compact_buckets(buckets, math.prod(num_buckets))

        # Without gradients there is no backward pass to keep them for, and a compiler can look inside.
        return keep(make) if torch.is_grad_enabled() else make(), num_buckets

    def _num_buckets(self, layer_type: str, length: int) -> tuple[int, ...]:
        config = self.config
        if config.bucket_factors is not None:
            return config.bucket_factors
        if layer_type == "lsh" and not isinstance(length, int):
            raise ValueError(
                "num_buckets=None lets the length of the input choose the number of hash buckets, but this program is "
                "exported for any length; set config.num_buckets, or leave the length out of dynamic_shapes."
            )
        # The length of this input must not decide where a token's result shall not depend on later ones.
        length = length if layer_type == "lsh" else config.num_positions
        return choose_num_buckets(length, config.lsh_attn_chunk_length, config.max_position_embeddings)

    def _rotations(self, num_buckets: tuple[int, ...], query_key: Tensor, call: ReformerCall) -> Tensor:
        """Rotations (H, K, R, F) or (B, H, K, R, F) of this layer in this call."""
        given = None if call.rotations is None else call.rotations[self.layer_idx]
        if given is not None:
            return given.to(query_key.device)
        config = self.config
        sizes = config.num_attention_heads, config.attention_head_size, call.num_hashes, num_buckets
        if config.hash_seed is not None:
            return fixed_rotations(config.hash_seed, *sizes, device=query_key.device)
        seed = (call.seed + (self.layer_idx + 1) * SEED_STEP) % 2**63
        draw = draw_rotations if self.training else fixed_rotations
        return draw(seed, *sizes, device=query_key.device)

    def check_hashing(self, hidden_states: Tensor, call: ReformerCall) -> None:
        """Refuse rotations, hash rounds and layer types that do not fit; before any layer has added to the cache.

        Raises:
            ValueError: rotations of a wrong shape; with a cache, other rotations, hash rounds or kind of layer than it
                was filled with.
        """
        layer_type = call.layer_types[self.layer_idx]
        given = None if call.rotations is None else call.rotations[self.layer_idx]
        if call.is_continued:
            self._check_continued(layer_type, given, call)
        elif given is not None and layer_type in HASHED_LAYERS:
            config, (batch_size, length) = self.config, hidden_states.shape[:2]
            num_directions = sum(self._num_buckets(layer_type, length)) // 2
            shape = (config.num_attention_heads, config.attention_head_size, call.num_hashes, num_directions)
            if tuple(given.shape) not in (shape, (batch_size, *shape)):
                raise ValueError(
                    f"rotations of layer {self.layer_idx} have shape {tuple(given.shape)}, but {shape} is needed, or "
                    "that for each row: (heads, head size, hash rounds, half the sum of the bucket factors)."
                )

    def _check_continued(self, layer_type: str, given: Tensor | None, call: ReformerCall) -> None:
        rotations = call.cache.layers[self.layer_idx].rotations
        is_hashed = layer_type in HASHED_LAYERS
        if is_hashed != (rotations is not None):
            raise ValueError(
                f"attn_layers makes layer {self.layer_idx} {layer_type!r}, but its cache was filled "
                f"{'without' if is_hashed else 'with'} hashing; go on with the types it was filled with, or begin "
                "with an empty one."
            )
        if is_hashed and call.num_hashes != rotations.shape[-2]:
            raise ValueError(
                f"num_hashes={call.num_hashes}, but the cache was filled with {rotations.shape[-2]} hash rounds; keep "
                "them, or begin with an empty cache."
            )
        if is_hashed and given is not None and not torch.equal(given.to(rotations), rotations):
            raise ValueError(
                f"rotations of layer {self.layer_idx} are not those that the cache was filled with; leave them out, "
                "or begin with an empty cache."
            )

    def _report_hashing(
        self, layer_type: str, query_key: Tensor, buckets: Tensor, num_buckets: tuple[int, ...], call: ReformerCall
    ) -> None:
        """Report buckets and recall, if they are wanted."""
        if "buckets" in call.wanted:
            has_pads = call.attention_mask is not None
            call.report("buckets", self.layer_idx, add_round_offsets(buckets, math.prod(num_buckets), has_pads))
        if "attention_recall" in call.wanted:
            config = self.config
            recall = attention_recall(
                layer_type,
                query_key.detach(),
                buckets,
                chunk_length=config.lsh_attn_chunk_length,
                num_chunks_before=config.lsh_num_chunks_before,
                num_chunks_after=config.lsh_num_chunks_after,
                is_causal=self.is_causal,
                attention_mask=call.attention_mask,
            )
            call.report("attention_recall", self.layer_idx, recall)

    # --- the cache ---

    def _append(self, key: Tensor, value: Tensor, buckets: Tensor | None, call: ReformerCall) -> None:
        """Keep the tokens of this call, without what fills chunks."""
        length = call.num_tokens
        call.cache.layers[self.layer_idx].append(
            key[:, :, :length],
            value[:, :, :length],
            num_pads=call.num_pads,
            buckets=None if buckets is None else buckets[..., :length],
            num_last_tokens=call.num_last_tokens,
        )

    def _continue(
        self,
        layer_type: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        buckets: Tensor | None,
        call: ReformerCall,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of new tokens to those in the cache and to each other."""
        self._append(key, value, buckets, call)
        return cached_attention(
            layer_type,
            query,
            call.cache.layers[self.layer_idx],
            config=self.config,
            num_pads=call.num_pads,
            implementation=call.implementation,
        )


__all__ = ["ReformerCall", "ReformerSelfAttention"]
