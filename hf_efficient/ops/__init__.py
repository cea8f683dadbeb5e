"""The operations alone, for a model of your own. Each lives, with its reference, in its architecture's folder.

Attention of a segment of 3 tokens to 5 slots of memory and to itself, in 2 heads of width 4:

    >>> import torch
    >>> query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4)
    >>> content_bias, position_bias = torch.zeros(2, 4), torch.zeros(2, 4)
    >>> positions = sinusoid_table(8, 16, query.dtype, query.device)
    >>> position_key = torch.nn.Linear(16, 2 * 4, bias=False)(positions).unflatten(-1, (2, 4)).transpose(0, 1)
    >>> mask = memory_attention_mask(3, 5, row_lengths=None, window=None, device=query.device)
    >>> output, _ = relative_attention(query, key, value, position_key, content_bias, position_bias, mask)
    >>> output.shape
    torch.Size([1, 2, 3, 4])

Hashed attention among 100 tokens, in 2 rounds of 8 buckets, each token to the last 16 of its bucket:

    >>> query_key, value = torch.randn(1, 2, 100, 4), torch.randn(1, 2, 100, 4)
    >>> rotations = draw_rotations(seed=0, num_heads=2, head_dim=4, num_hashes=2, num_buckets=(8,))
    >>> buckets = hash_vectors(query_key, rotations, (8,))
    >>> output, _ = windowed_lsh_attention(query_key, value, buckets, num_buckets=8, window=16, is_causal=True)
    >>> output.shape
    torch.Size([1, 2, 100, 4])

A stack of 12 reversible half-layers, whose memory is that of one:

    >>> branches = [torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)) for _ in range(12)]
    >>> first, second = reversible_sequence(branches, output, output)
    >>> (first + second).sum().backward()

A step that 5 tokens take as often as each of them likes, at most 8 times, and what their thinking costs:

    >>> step, unit = torch.nn.GRUCell(4, 4), torch.nn.Linear(4, 1)
    >>> tokens = torch.randn(5, 4)
    >>> output, state = adaptive_computation(
    ...     lambda states, number: step(tokens, states),
    ...     lambda states, number: unit(states).squeeze(-1).sigmoid(),
    ...     torch.zeros(5, 4),
    ...     num_steps=8,
    ... )
    >>> output.shape, state.ponder_times.shape
    (torch.Size([5, 4]), torch.Size([5]))
    >>> (output.square().mean() + 0.01 * ponder_loss(state)).backward()

A separable convolution over 5 tokens and the 2 before them, looking back only; the same 5 again, one by one:

    >>> tokens, depthwise, pointwise = torch.randn(1, 7, 4), torch.randn(4, 1, 3), torch.randn(6, 4)
    >>> output = separable_convolution(tokens[:, 2:], depthwise, pointwise, state=tokens[:, :2], is_causal=True)
    >>> output.shape
    torch.Size([1, 5, 6])
    >>> windows = [tokens[:, start : start + 3] for start in range(5)]
    >>> steps = [
    ...     separable_convolution(window[:, 2:], depthwise, pointwise, state=window[:, :2], is_causal=True)
    ...     for window in windows
    ... ]
    >>> torch.allclose(torch.cat(steps, dim=1), output, atol=1e-5)
    True
"""

from ..models.evolved_transformer.conv_branches import decoder_branches, encoder_branches, separable_convolution
from ..models.reformer.full_attention import full_attention
from ..models.reformer.hashing import draw_rotations, hash_vectors, shared_key
from ..models.reformer.local_attention import local_attention
from ..models.reformer.lsh_attention import lsh_attention
from ..models.reformer.reversible import ReversibleChain, reversible_sequence
from ..models.reformer.windowed_lsh_attention import windowed_lsh_attention
from ..models.transformer_xl.relative_attention import memory_attention_mask, relative_attention, sinusoid_table
from ..models.universal_transformer.adaptive_computation import adaptive_computation, ponder_loss

__all__ = [
    "ReversibleChain",
    "adaptive_computation",
    "decoder_branches",
    "draw_rotations",
    "encoder_branches",
    "full_attention",
    "hash_vectors",
    "local_attention",
    "lsh_attention",
    "memory_attention_mask",
    "ponder_loss",
    "relative_attention",
    "reversible_sequence",
    "separable_convolution",
    "shared_key",
    "sinusoid_table",
    "windowed_lsh_attention",
]
