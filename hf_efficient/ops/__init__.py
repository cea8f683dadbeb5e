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
"""

from ..models.transformer_xl.relative_attention import memory_attention_mask, relative_attention, sinusoid_table

__all__ = ["memory_attention_mask", "relative_attention", "sinusoid_table"]
