"""Local attention of the Reformer: chunks of tokens that see themselves and their neighbours.

Letters in shape notes: B batch, H heads, T tokens, K head_dim, C chunk length, N chunks, W chunks that a chunk sees.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .blockwise_attention import Span, blockwise_attention
from .full_attention import check_implementation, full_attention
from .inputs_reformer import cut


def visible_chunks(num_chunks: int, num_chunks_before: int, num_chunks_after: int) -> Tensor:
    """(N, W) int64: the chunks that each chunk sees.

    The list of chunks is a circle, and an offset that does not fit into it stands for the chunk itself once more, so
    that its keys count twice: as in transformers.
    """
    offsets = torch.arange(-num_chunks_before, num_chunks_after + 1)
    offsets[offsets.abs() >= num_chunks] = 0
    return (torch.arange(num_chunks)[:, None] + offsets) % num_chunks


def plain_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    is_causal: bool,
    attention_mask: Tensor | None,
    dropout: float,
    with_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Plain form, which can also return the probabilities as a map (B, H, T, T)."""
    batch_size, num_heads, length, head_dim = query.shape
    num_chunks = -(-length // chunk_length)
    missing = num_chunks * chunk_length - length
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, length, dtype=torch.bool, device=query.device)
    live = F.pad(attention_mask, (0, missing))
    query, key, value = (F.pad(states, (0, 0, 0, missing)) for states in (query, key, value))
    query_chunks, key_chunks, value_chunks = (
        states.unflatten(2, (num_chunks, chunk_length)) for states in (query, key, value)
    )
    visible = visible_chunks(num_chunks, num_chunks_before, num_chunks_after).to(query.device)
    # Positions of the keys that each chunk sees, (N, W C).
    within = torch.arange(chunk_length, device=query.device)
    positions = (visible[:, :, None] * chunk_length + within).flatten(1)
    seen_keys, seen_values = (states[:, :, visible].flatten(3, 4) for states in (key_chunks, value_chunks))

    allowed = live[:, None, positions][:, :, :, None]  # (B, 1, N, 1, W C)
    if is_causal:
        own = torch.arange(num_chunks * chunk_length, device=query.device).view(num_chunks, chunk_length, 1)
        allowed = allowed & (positions[:, None] <= own)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.matmul(query_chunks * head_dim**-0.5, seen_keys.transpose(-1, -2)).to(exact)
    scores = scores.masked_fill(~allowed, torch.finfo(exact).min)
    weights = F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
    output = cut(torch.matmul(weights, seen_values).flatten(2, 3), 2, length)
    if not with_weights:
        return output, None
    weights_map = weights.new_zeros(batch_size, num_heads, num_chunks, chunk_length, num_chunks * chunk_length)
    weights_map = weights_map.scatter_add(-1, positions[:, None].expand_as(weights), weights).flatten(2, 3)
    return output, cut(cut(weights_map, 2, length), 3, length)


def causal_spans(length: int, chunk_length: int, num_chunks_before: int) -> tuple[Span, ...]:
    """What the tokens of each chunk see when causal: the first chunks all before them, the last may be short."""
    first = min(num_chunks_before * chunk_length, length)
    num_whole, rest = divmod(length - first, chunk_length)
    seen = first + chunk_length
    spans = [Span(0, first, 0, first)] if first else []
    if num_whole:
        spans.append(Span(first, chunk_length, 0, seen, chunk_length, num_whole))
    if rest:
        start = length - rest
        spans.append(Span(start, rest, start - first, first + rest))
    return tuple(spans)


def fused_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    is_causal: bool,
    attention_mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """Form that holds a tile of scores at a time.

    There must be more chunks than `num_chunks_before` and than `num_chunks_after`, which must be 0 when causal.
    """
    length, scale = query.shape[2], query.shape[-1] ** -0.5
    if is_causal:
        # Pads are last, so that no token sees them.
        spans = causal_spans(length, chunk_length, num_chunks_before)
        return blockwise_attention(query, key, value, spans, scale=scale, is_causal=True, dropout=dropout)
    missing = -length % chunk_length
    before, after = num_chunks_before * chunk_length, num_chunks_after * chunk_length
    if missing:
        if attention_mask is None:
            attention_mask = query.new_ones(query.shape[0], length, dtype=torch.bool)
        attention_mask = F.pad(attention_mask, (0, missing))
        query, key, value = (F.pad(states, (0, 0, 0, missing)) for states in (query, key, value))
    # The circle of chunks, cut open: the last chunks once more in front, the first ones once more behind.
    key, value = (_open_circle(states, before, after, dim=2) for states in (key, value))
    if attention_mask is not None:
        attention_mask = _open_circle(attention_mask, before, after, dim=1)
    num_chunks = query.shape[2] // chunk_length
    span = Span(0, chunk_length, 0, before + chunk_length + after, chunk_length, num_chunks)
    output = blockwise_attention(
        query, key, value, (span,), scale=scale, is_causal=False, key_mask=attention_mask, dropout=dropout
    )
    return output[:, :, :length]


def _open_circle(states: Tensor, before: int, after: int, dim: int) -> Tensor:
    length = states.shape[dim]
    parts = [states.narrow(dim, length - before, before), states, states.narrow(dim, 0, after)]
    return torch.cat(parts, dim) if before + after else states


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    is_causal: bool,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k / sqrt(K)) v of every token over the tokens of its own chunk and the neighbouring ones.

    From trax, whose Reformer (Kitaev et al. 2020, arXiv 2001.04451) has it beside LSH attention.

    The chunks form a circle, in which the first one also sees the last unless `is_causal` forbids it, and up to one
    chunk of tokens is full attention: as in transformers. The reference is `local_attention_reference.py`.

    With `is_causal` this is a window into the past. There are two exceptions, which follow transformers too: with no
    more than `num_chunks_before` chunks a chunk's own keys count more than once, and with `num_chunks_after` the last
    chunks see the first ones. In both a token's output depends on how many tokens follow it.

    Args:
        query, key, value: (B, H, T, K), any strides.
        chunk_length: C, tokens per chunk; a last chunk that is shorter is filled with masked keys.
        num_chunks_before, num_chunks_after: how many neighbours a chunk sees on either side.
        is_causal: a token sees itself and earlier ones only.
        attention_mask: (B, T) bool, True for tokens, False for pads, which must be last in their row; None means all.
            Outputs at pads are finite and mean nothing.
        dropout: probability of dropping an attention weight; pass 0 outside training.
        implementation: `"sdpa"` (holds a tile of scores at a time, no weights) or `"eager"` (returns the weights).

    Returns:
        The output (B, H, T, K) and the weights (B, H, T, T) or None. Time O(B H T C W K) with W chunks seen; memory
        O(B H T K), with `"eager"` O(B H T^2).

    Raises:
        ValueError: `implementation` is unknown.
    """
    dropout_and_mask = {"is_causal": is_causal, "attention_mask": attention_mask, "dropout": dropout}
    if query.shape[2] <= chunk_length:
        scale = query.shape[-1] ** -0.5
        return full_attention(query, key, value, scale=scale, implementation=implementation, **dropout_and_mask)
    check_implementation(implementation)
    chunks = {
        "chunk_length": chunk_length,
        "num_chunks_before": num_chunks_before,
        "num_chunks_after": num_chunks_after,
    }
    # Neither chunks that count twice nor, when causal, a last chunk that sees the first one are worth a fused form.
    is_plain = implementation == "eager" or (is_causal and num_chunks_after > 0) or torch.compiler.is_compiling()
    if is_plain or query.shape[2] <= max(num_chunks_before, num_chunks_after) * chunk_length:
        with_weights = implementation == "eager"
        return plain_local_attention(query, key, value, **chunks, **dropout_and_mask, with_weights=with_weights)
    return fused_local_attention(query, key, value, **chunks, **dropout_and_mask), None


__all__ = ["local_attention"]
