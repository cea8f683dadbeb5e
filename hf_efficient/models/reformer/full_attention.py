"""Exact attention over all keys, with the Reformer's rule for shared queries and keys (arXiv 2001.04451, section 2).

Letters in shape notes: B batch, H heads, T queries, S keys, K head_dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .blockwise_attention import SELF_SCORE, Span, blockwise_attention

IMPLEMENTATIONS = ("eager", "sdpa")
# Queries at a time: where each has a mask of its own, and where weights are dropped.
MASKED_QUERIES = 256
DROPOUT_QUERIES = 128


def check_implementation(implementation: str) -> None:
    """Refuse an unknown form of an attention.

    Raises:
        ValueError: it is neither `"eager"` nor `"sdpa"`.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r} is unknown; choose one of {known}.")


def eager_full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    attention_mask: Tensor | None,
    exclude_self: bool,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Plain form that also returns the probabilities (B, H, T, S); softmax in float32 (float64 for float64)."""
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.matmul(query * scale, key.transpose(-1, -2)).to(exact)
    query_len, key_len = scores.shape[-2:]
    masked = torch.finfo(exact).min
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, None, None], masked)
    if is_causal:
        later = torch.ones(query_len, key_len, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, masked)
    if exclude_self:
        itself = torch.eye(query_len, key_len, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(itself, SELF_SCORE)
    weights = F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
    return torch.matmul(weights, value), weights


def _score_mask(
    query: Tensor, queries: slice, key_len: int, attention_mask: Tensor | None, exclude_self: bool
) -> Tensor | None:
    """What is added to the scores (B or 1, 1, L, S) of some queries; None for nothing."""
    if attention_mask is None and not exclude_self:
        return None
    exact = torch.promote_types(query.dtype, torch.float32)
    mask = torch.zeros(1, 1, 1, key_len, dtype=exact, device=query.device)
    if attention_mask is not None:
        # A finite value: a query that sees no key gets the mean of all, not NaN.
        mask = mask.masked_fill(~attention_mask[:, None, None], torch.finfo(exact).min)
    if exclude_self:
        index = torch.arange(key_len, device=query.device)
        mask = torch.where(index == index[queries, None], SELF_SCORE, mask)
    return mask


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    attention_mask: Tensor | None,
    exclude_self: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """PyTorch's fused kernels; where a mask differs by query, `MASKED_QUERIES` at a time."""
    if is_causal:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, dropout_p=dropout)
    length, key_len = query.shape[2], key.shape[2]

    def attend(queries: slice) -> Tensor:
        mask = _score_mask(query, queries, key_len, attention_mask, exclude_self)
        return F.scaled_dot_product_attention(
            query[:, :, queries], key, value, attn_mask=mask, scale=scale, dropout_p=dropout
        )

    # An exported program would keep the number of parts, and with it the length.
    if not exclude_self or torch.compiler.is_exporting():
        return attend(slice(0, length))
    parts = [attend(slice(start, min(start + MASKED_QUERIES, length))) for start in range(0, length, MASKED_QUERIES)]
    return parts[0] if len(parts) == 1 else torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)


def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    attention_mask: Tensor | None,
    exclude_self: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """Form for dropout, which PyTorch's kernel for CPUs lacks: it would hold all T S weights."""
    length, key_len = query.shape[2], key.shape[2]
    spans = []
    for start in range(0, length, DROPOUT_QUERIES):
        stop = min(start + DROPOUT_QUERIES, length)
        spans.append(Span(start, stop - start, 0, stop if is_causal else key_len))
    return blockwise_attention(
        query,
        key,
        value,
        tuple(spans),
        scale=scale,
        is_causal=is_causal,
        exclude_self=exclude_self,
        key_mask=None if is_causal else attention_mask,
        dropout=dropout,
    )


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    attention_mask: Tensor | None = None,
    exclude_self: bool = False,
    scale: float = 1.0,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k) v of every query over all keys. The reference is `full_attention_reference.py`.

    What LSH attention approximates (Kitaev et al. 2020, arXiv 2001.04451, section 2).

    Args:
        query: (B, H, T, K), any strides.
        key, value: (B, H, S, K), S = T if `is_causal` or `exclude_self`.
        is_causal: a token sees itself and earlier ones only.
        attention_mask: (B, S) bool, True for tokens, False for pads, which must be last in their row when causal; None
            means all. Outputs at pads are finite and mean nothing.
        exclude_self: a token sees itself only if it sees nothing else, the rule for shared queries and keys.
        dropout: probability of dropping an attention weight; pass 0 outside training.
        implementation: `"sdpa"` (fused, no weights) or `"eager"` (returns the weights).

    Returns:
        The output (B, H, T, K) and the weights (B, H, T, S) or None. Time O(B H T S K); memory O(B H (T + S) K), with
        `"eager"` O(B H T S).

    Raises:
        ValueError: `implementation` is unknown.
    """
    check_implementation(implementation)
    settings = {
        "is_causal": is_causal,
        "attention_mask": attention_mask,
        "exclude_self": exclude_self,
        "scale": scale,
        "dropout": dropout,
    }
    # The fused forms need something to compute.
    if implementation == "eager" or query.numel() == 0:
        output, weights = eager_full_attention(query, key, value, **settings)
        return output, weights if implementation == "eager" else None
    attend = _blockwise if dropout > 0 and not torch.compiler.is_compiling() else _sdpa
    if not (is_causal and exclude_self):
        return attend(query, key, value, **settings), None
    # Token t sees keys 0 ... t - 1: causal attention of the queries from 1 on over the keys without the last. Only the
    # first token sees nothing else than itself.
    settings["exclude_self"] = False
    rest = attend(query[:, :, 1:], key[:, :, :-1], value[:, :, :-1], **settings)
    output = torch.cat([value[:, :, :1].transpose(1, 2), rest.transpose(1, 2)], dim=1)
    return output.transpose(1, 2), None


__all__ = ["check_implementation", "full_attention"]
