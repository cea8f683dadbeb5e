"""Relative attention for training that keeps no scores: the backward pass computes them again, tile by tile.

Ordinary autograd keeps several tensors of shape (B, H, T, S) per layer for the backward pass, and SDPA adds the
gradient of its additive mask. Here nothing of that size outlives a tile, and on a CPU a tile stays in the cache. The
gradient of the softmax needs only `sum(output * grad_output)` besides the probabilities (Dao et al. 2022,
arXiv 2205.14135, appendix B.4).

Letters in shape notes: B batch, H heads, T query length, S key length, K head_dim, R rows of the position table; and
of a tile: N heads, L queries, G = N B.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Scores of one tile: what a CPU's cache holds; what an accelerator works on at a time.
CPU_TILE_SCORES = 2**20
TILE_SCORES = 2**26
MIN_TILE_QUERIES = 32


@dataclass(frozen=True)
class Tile:
    """Heads and queries of a tile, how many keys its last query sees, and its place in the order."""

    heads: slice
    queries: slice
    num_keys: int
    index: int


@dataclass(frozen=True)
class Settings:
    """What the operation is given besides tensors; `seed` tells the dropped weights."""

    scaling: float
    dropout: float
    seed: int


def _tiles(shape: torch.Size, key_len: int, device: torch.device) -> Iterator[Tile]:
    """Cut (H, B, T, K) queries into tiles: whole heads while they fit, else blocks of one head's queries."""
    num_heads, batch_size, query_len, _ = shape
    budget = CPU_TILE_SCORES if device.type == "cpu" else TILE_SCORES
    row_scores = max(batch_size * key_len, 1)
    heads = max(1, budget // (row_scores * max(query_len, 1)))
    queries = max(MIN_TILE_QUERIES, budget // row_scores)
    index = 0
    for head in range(0, num_heads, heads):
        for start in range(0, query_len, queries):
            stop = min(start + queries, query_len)
            yield Tile(slice(head, head + heads), slice(start, stop), key_len - query_len + stop, index)
            index += 1


def _flat(states: Tensor) -> Tensor:
    """(N, B, L, K) to (G, L, K), a copy of tile size at most."""
    return states.reshape(-1, *states.shape[2:])


def _cut(tile: Tile, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tile's part of both queries, key, value, position table and mask, the first four as (G, ., K)."""
    content, position, key, value, table, dead = tensors
    queries = (_flat(t[tile.heads, :, tile.queries]) for t in (content, position))
    keys = (_flat(t[tile.heads, :, : tile.num_keys]) for t in (key, value))
    return *queries, *keys, table[tile.heads, -(tile.num_keys + 1) :], dead[:, :, tile.queries, : tile.num_keys]


def _probabilities(
    content: Tensor, position: Tensor, key: Tensor, table: Tensor, dead: Tensor, scaling: float
) -> Tensor:
    """Attention of a tile, (G, L, S).

    Args:
        content, position: (G, L, K), the latter already scaled.
        key: (G, S, K).
        table: (N, R, K), oldest first, R <= S + 1.
        dead: (1, B or 1, L, S) bool, True where a query may not attend.
    """
    num_heads, num_rows, _ = table.shape
    num_groups, query_len, head_dim = content.shape
    key_len = key.shape[1]
    by_distance = torch.bmm(position.reshape(num_heads, -1, head_dim), table.transpose(1, 2))
    missing = key_len + 1 - num_rows
    if missing > 0:
        oldest = by_distance[..., :1].expand(*by_distance.shape[:-1], missing)
        by_distance = torch.cat([oldest, by_distance], dim=-1)
    # The relative shift, see relative_attention.relative_shift.
    shifted = by_distance.view(num_groups, query_len * (key_len + 1))[:, query_len:]
    shifted = shifted.unflatten(1, (query_len, key_len))
    scores = torch.baddbmm(shifted, content, key.transpose(1, 2), alpha=scaling)
    by_head = scores.view(num_heads, num_groups // num_heads, query_len, key_len)
    by_head.masked_fill_(dead, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def _dropout_factors(like: Tensor, settings: Settings, tile: Tile) -> Tensor | None:
    """0 or 1 / (1 - dropout) for every weight of a tile, the same in both passes; None without dropout."""
    if settings.dropout == 0:
        return None
    generator = torch.Generator(like.device).manual_seed(settings.seed + tile.index)
    kept = 1 - settings.dropout
    return torch.empty_like(like).bernoulli_(kept, generator=generator).div_(kept)


class RecomputedRelativeAttention(torch.autograd.Function):
    """`recomputed_relative_attention` on tensors with heads first: (H, B, T, K), (H, B, S, K), (H, R, K)."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor) -> Tensor:
        content, key = tensors[0], tensors[2]
        output = torch.empty_like(content)
        for tile in _tiles(content.shape, key.shape[2], content.device):
            content_tile, position, key_tile, value, table, dead = _cut(tile, tensors)
            weights = _probabilities(content_tile, position, key_tile, table, dead, settings.scaling)
            factors = _dropout_factors(weights, settings, tile)
            if factors is not None:
                weights = weights.mul_(factors)
            part = output[tile.heads, :, tile.queries]
            part.copy_(torch.bmm(weights, value).view(part.shape))
        ctx.save_for_backward(*tensors, output)
        ctx.settings = settings
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output = ctx.saved_tensors
        minus_mean = -(grad_output * output).sum(dim=-1, keepdim=True)
        grads = [torch.zeros_like(tensor) for tensor in tensors[:5]]
        for tile in _tiles(output.shape, tensors[2].shape[2], output.device):
            own = (_flat(t[tile.heads, :, tile.queries]) for t in (grad_output, minus_mean))
            parts = _backward_tile(ctx.settings, tile, _cut(tile, tuple(tensors)), *own)
            where = [(tile.heads, slice(None), tile.queries)] * 2
            where += [(tile.heads, slice(None), slice(tile.num_keys))] * 2
            where.append((tile.heads, slice(-parts[4].shape[1], None)))
            for grad, part, index in zip(grads, parts, where, strict=True):
                grad[index] += part.view(grad[index].shape)
        return None, *grads, None


def _backward_tile(
    settings: Settings, tile: Tile, tensors: tuple[Tensor, ...], grad_output: Tensor, minus_mean: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a tile's two queries, keys, values (G, ., K) and position table (N, R, K)."""
    content, position, key, value, table, dead = tensors
    weights = _probabilities(content, position, key, table, dead, settings.scaling)
    factors = _dropout_factors(weights, settings, tile)
    num_groups, query_len, key_len = weights.shape
    kept = weights if factors is None else weights * factors
    grad_value = torch.bmm(kept.transpose(1, 2), grad_output)
    if factors is None:
        grad_weights = torch.baddbmm(minus_mean, grad_output, value.transpose(1, 2))
    else:
        grad_weights = torch.bmm(grad_output, value.transpose(1, 2)).mul_(factors).add_(minus_mean)
    # Scores by key written behind `query_len` zeros read as scores by distance: the relative shift backwards.
    by_distance = grad_weights.new_empty(num_groups, query_len * (key_len + 1))
    by_distance[:, :query_len] = 0
    by_key = by_distance[:, query_len:].unflatten(1, (query_len, key_len))
    torch.mul(weights, grad_weights, out=by_key)
    grad_content = torch.bmm(by_key, key).mul_(settings.scaling)
    grad_key = torch.bmm(by_key.transpose(1, 2), content).mul_(settings.scaling)

    num_heads, num_rows, head_dim = table.shape
    by_distance = by_distance.view(num_heads, num_groups // num_heads * query_len, key_len + 1)
    beyond = key_len + 1 - num_rows
    if beyond > 0:
        by_distance[..., beyond] += by_distance[..., :beyond].sum(dim=-1)
        by_distance = by_distance[..., beyond:]
    grad_position = torch.bmm(by_distance, table).view(position.shape)
    grad_table = torch.bmm(by_distance.transpose(1, 2), position.reshape(num_heads, -1, head_dim))
    return grad_content, grad_position, grad_key, grad_value, grad_table


def recomputed_relative_attention(
    content_query: Tensor,
    position_query: Tensor,
    key: Tensor,
    value: Tensor,
    position_key: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with scores `content_query . key * scaling + position_query . position_key[distance]`.

    Args:
        content_query: (B, H, T, K), q + u.
        position_query: (B, H, T, K), (q + v) * scaling.
        key, value: (B, H, S, K).
        position_key: (H, R, K), oldest first; larger distances than R - 1 use row 0.
        mask: (B or 1, 1, T, S) bool, True where a query may attend.
        dropout: probability of dropping an attention weight. The dropped ones are drawn from a generator of their own,
            seeded by one number of the ordinary one, so that both passes drop the same.

    Returns:
        (B, H, T, K). Time as `relative_attention` plus two of its products in the backward pass; memory kept for it
        O(B H (T + S) K) instead of O(B H T S).
    """
    by_head = (t.transpose(0, 1) for t in (content_query, position_query, key, value))
    seed = int(torch.randint(2**62, ())) if dropout > 0 else 0
    dead = ~mask.transpose(0, 1)
    output = RecomputedRelativeAttention.apply(Settings(scaling, dropout, seed), *by_head, position_key, dead)
    return output.transpose(0, 1)


__all__ = ["recomputed_relative_attention"]
