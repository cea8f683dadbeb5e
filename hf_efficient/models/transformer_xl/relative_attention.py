"""Relative attention of Transformer-XL (Dai et al. 2019, arXiv 1901.02860, section 3.3 and appendix B).

Letters in shape notes: B batch, H heads, T query length, S key length (memory + T), K head_dim, D hidden_size,
R rows of the position table.

A query i at slot `S - T + i` and a key at slot j are `distance = S - T + i - j` apart; 0 is the query itself. Position
tables hold their rows oldest first: row r of R stands for distance `R - 1 - r`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .recomputed_attention import recomputed_relative_attention


def sinusoid_table(num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Encodings of the distances `num_rows - 1 ... 0`: all sines, then all cosines (not interleaved).

    From Dai et al. 2019, arXiv 1901.02860, section 3.3.

    Computed in float32 whatever `dtype` is (float64 for float64): whole numbers above 256 do not exist in bfloat16.

    Returns:
        (num_rows, hidden_size) of `dtype`. Cost O(num_rows * hidden_size).
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = 1 / 10000 ** (torch.arange(0.0, hidden_size, 2.0, dtype=exact, device=device) / hidden_size)
    distances = torch.arange(num_rows - 1, -1, -1, dtype=exact, device=device)
    angles = torch.outer(distances, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def relative_shift(scores: Tensor) -> Tensor:
    """Turn scores by distance into scores by key: `out[..., i, j] = scores[..., i, j + T - i]`.

    Column c of the input belongs to distance `S - c`, so the output's column j belongs to `S - T + i - j`. This is the
    paper's appendix B without its padding copy: reading the same memory with rows one shorter shifts each row.
    Entries of keys after the query are meaningless and must be masked.

    Args:
        scores: (..., T, S + 1), contiguous in its last two dimensions.

    Returns:
        (..., T, S), a view.
    """
    query_len, columns = scores.shape[-2:]
    return scores.flatten(-2)[..., query_len:].unflatten(-1, (query_len, columns - 1))


def position_scores(query: Tensor, position_key: Tensor, key_len: int) -> Tensor:
    """Scores `query . position_key[distance]` of every query with every key, terms (b) and (d) of the paper's eq. 5.

    Args:
        query: (B, H, T, K), the position bias v already added.
        position_key: (H, R, K), oldest first. With `R <= key_len` larger distances share the oldest row, which is
            what `clamp_len = R - 1` means.
        key_len: S.

    Returns:
        (B, H, T, S). Cost O(B H T min(R, S) K).
    """
    batch_size, num_heads, query_len, _ = query.shape
    columns = key_len + 1
    if torch.compiler.is_exporting():
        return relative_shift(_exported_scores(query, position_key, columns))
    # One product per head for the whole batch: the table has no batch dimension to expand.
    by_head = query.transpose(0, 1).flatten(1, 2)
    scores = torch.bmm(by_head, position_key[:, -columns:].transpose(1, 2)).unflatten(1, (batch_size, query_len))
    missing = columns - scores.shape[-1]
    if missing > 0:
        scores = torch.cat([scores[..., :1].expand(*scores.shape[:-1], missing), scores], dim=-1)
    return relative_shift(scores).transpose(0, 1)


def _exported_scores(query: Tensor, position_key: Tensor, columns: int) -> Tensor:
    """Scores by distance (B, H, T, S + 1), without a branch on a length, so that one graph serves all of them.

    And without the reshaped product, of which ONNX's optimiser makes one with another head's table where B = H.
    """
    oldest_first = torch.arange(columns, device=query.device) + (position_key.shape[1] - columns)
    return torch.matmul(query, position_key[:, oldest_first.clamp(min=0)].transpose(1, 2))


def eager_relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Plain form that also returns the probabilities (B, H, T, S); softmax in float32 (float64 for float64)."""
    # Scaled first: in float16 the product alone may overflow.
    weights = torch.matmul(query * scaling, key.transpose(-1, -2)) + scores
    if mask is not None:
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
    exact = torch.float64 if weights.dtype == torch.float64 else torch.float32
    weights = weights.softmax(dim=-1, dtype=exact).to(value.dtype)
    weights = F.dropout(weights, p=dropout)
    return torch.matmul(weights, value), weights


def sdpa_relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, None]:
    """Fused form: the position scores enter `scaled_dot_product_attention` as its additive mask."""
    if mask is not None:
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    output = F.scaled_dot_product_attention(query, key, value, scores, dropout_p=dropout, scale=scaling)
    if torch.compiler.is_exporting():
        # Kernels lay the output out in different ways. An exported graph must not rely on the one of this machine.
        output = output.clone(memory_format=torch.contiguous_format)
    return output, None


RELATIVE_ATTENTION_FUNCTIONS = {"eager": eager_relative_attention, "sdpa": sdpa_relative_attention}


def _can_recompute(query: Tensor, dropout: float) -> bool:
    """Whether the form that keeps no scores for the backward pass applies.

    SDPA's kernels do half precision better. Dropped weights must not depend on whether gradients are on, or activation
    checkpointing would drop others when it runs a layer again. A compiled graph fuses the plain form by itself.
    """
    if torch.compiler.is_compiling():
        return False
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    return (needs_grad or dropout > 0) and query.dtype.itemsize >= 4 and query.numel() > 0


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_key: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """Attention whose scores are `((q + u) . k + (q + v) . p[distance]) / sqrt(K)` (eq. 5 of the paper).

    From Dai et al. 2019, arXiv 1901.02860, section 3.3.

    In the paper u is the content bias and v the position bias (`r_w_bias`, `r_r_bias` on disk). The reference is
    `relative_attention_reference.py`.

    Args:
        query: (B, H, T, K), the last T of the S slots.
        key, value: (B, H, S, K), memory first.
        position_key: (H, R, K), the projected position table, oldest first; larger distances than R - 1 use row 0.
        content_bias, position_bias: (H, K).
        mask: (B or 1, 1, T, S) bool, True where a query may attend; it must exclude the keys after the query. None is
            allowed for T = 1 only. Each query needs at least one live key.
        dropout: probability of dropping an attention weight; pass 0 outside training.
        implementation: `"sdpa"` (fused, no weights; for gradients in float32 see `recomputed_attention.py`) or
            `"eager"` (returns the weights).

    Returns:
        The output (B, H, T, K) and the weights (B, H, T, S) or None. Cost O(B H T S K).

    Raises:
        ValueError: `implementation` is unknown, or `mask` is None with more than one query.
    """
    if implementation not in RELATIVE_ATTENTION_FUNCTIONS:
        known = ", ".join(RELATIVE_ATTENTION_FUNCTIONS)
        raise ValueError(f"implementation={implementation!r} is unknown; choose one of {known}.")
    if mask is None and query.shape[-2] > 1:
        raise ValueError(
            f"mask=None with {query.shape[-2]} queries would let them see later keys; pass a causal mask."
        )
    scaling = query.shape[-1] ** -0.5
    by_content = query + content_bias[:, None].to(query.dtype)
    by_position = (query + position_bias[:, None].to(query.dtype)) * scaling
    if implementation == "sdpa" and mask is not None and _can_recompute(by_content, dropout):
        operands = (by_content, by_position, key, value, position_key, mask)
        return recomputed_relative_attention(*operands, scaling=scaling, dropout=dropout), None
    scores = position_scores(by_position, position_key, key.shape[-2])
    attend = RELATIVE_ATTENTION_FUNCTIONS[implementation]
    return attend(by_content, key, value, scores, mask, scaling=scaling, dropout=dropout)


def memory_attention_mask(
    query_len: int,
    memory_len: int,
    row_lengths: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query may attend to (Dai et al. 2019, arXiv 1901.02860, section 3.2).

    Args:
        query_len: T.
        memory_len: slots of memory in front of the queries, S = memory_len + T.
        row_lengths: (B,) how many of these slots are real for each row; the real ones are the last. None means all.
        window: keys a query sees at most, itself among them (`same_length`: mem_len); None means no limit.

    Returns:
        (B or 1, 1, T, S) bool, or None when nothing is excluded.
    """
    if query_len == 1 and row_lengths is None and (window is None or window > memory_len):
        return None
    slot = torch.arange(memory_len + query_len, device=device)
    query_slot = slot[memory_len:, None]
    mask = slot <= query_slot
    if window is not None:
        mask &= slot > query_slot - window
    if row_lengths is None:
        return mask[None, None]
    first_real = memory_len - row_lengths
    return mask & (slot >= first_real[:, None, None, None])


__all__ = [
    "RELATIVE_ATTENTION_FUNCTIONS",
    "memory_attention_mask",
    "position_scores",
    "relative_attention",
    "relative_shift",
    "sinusoid_table",
]
