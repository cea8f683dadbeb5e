"""Relative attention written from the equations, one score at a time: the truth for `relative_attention.py`."""

import math

import torch
from torch import Tensor


def sinusoid_reference(distance: int, hidden_size: int) -> Tensor:
    """R of one distance, (hidden_size,) float64: sines of all frequencies, then their cosines."""
    angles = [distance / 10000 ** (2 * k / hidden_size) for k in range(hidden_size // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def relative_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_weight: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    clamp_len: int = -1,
    window: int | None = None,
    num_dead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """O(T S) loop over the four terms of eq. 5 (Dai et al. 2019).

    Args:
        query: (B, H, T, K); key, value: (B, H, S, K).
        position_weight: (H, K, D), W_r by head.
        content_bias, position_bias: (H, K), the paper's u and v.
        clamp_len: distances are cut off here when it is positive.
        window: keys a query sees at most, itself among them.
        num_dead: (B,) leading slots that hold nothing.

    Returns:
        Output (B, H, T, K) and weights (B, H, T, S).
    """
    batch_size, num_heads, query_len, head_dim = query.shape
    key_len, hidden_size = key.shape[2], position_weight.shape[-1]
    weights = query.new_zeros(batch_size, num_heads, query_len, key_len)
    for b in range(batch_size):
        for h in range(num_heads):
            for i in range(query_len):
                live, scores = [], []
                for j in range(key_len):
                    distance = key_len - query_len + i - j
                    if distance < 0 or (window is not None and distance >= window):
                        continue
                    if num_dead is not None and j < num_dead[b]:
                        continue
                    clamped = min(distance, clamp_len) if clamp_len > 0 else distance
                    position = position_weight[h] @ sinusoid_reference(clamped, hidden_size).to(query)
                    q, k = query[b, h, i], key[b, h, j]
                    terms = q @ k + q @ position + content_bias[h] @ k + position_bias[h] @ position
                    live.append(j)
                    scores.append(terms / math.sqrt(head_dim))
                weights[b, h, i, live] = torch.stack(scores).softmax(dim=0)
    return weights @ value, weights
