"""The convolutional branches from their definition, position by position and tap by tap; imported by tests only.

Letters in shape notes: B batch, L tokens, C channels, k width of a convolution, D hidden_size. A `norm` is (scale,
shift, epsilon), a `dense` map (weight, bias), a `separable` convolution (depthwise, pointwise, bias).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def convolution_reference(rows: Tensor, weight: Tensor, bias: Tensor | None, num_before: int) -> Tensor:
    """y[t] = bias + sum over j of W_j x[t + j - num_before], where x is 0 outside of the text.

    Args:
        rows: (B, L, C).
        weight: (C', C, k).

    Returns:
        (B, L, C').
    """
    outputs = []
    for position in range(rows.shape[1]):
        total = rows.new_zeros(rows.shape[0], weight.shape[0])
        for tap in range(weight.shape[2]):
            source = position + tap - num_before
            if 0 <= source < rows.shape[1]:
                total = total + rows[:, source] @ weight[:, :, tap].T
        outputs.append(total if bias is None else total + bias)
    return torch.stack(outputs, dim=1)


def separable_convolution_reference(
    rows: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None, is_causal: bool
) -> Tensor:
    """y[t] = bias + P (sum over j of w_j * x[t + j - n]); n is k - 1 if causal, else (k - 1) / 2.

    Args:
        rows: (B, L, C), from the start of the text.
        depthwise: (C, 1, k).
        pointwise: (C', C).

    Returns:
        (B, L, C').
    """
    width = depthwise.shape[2]
    diagonal = torch.stack([torch.diag(depthwise[:, 0, tap]) for tap in range(width)], dim=-1)
    mixed = convolution_reference(rows, diagonal, None, width - 1 if is_causal else (width - 1) // 2)
    output = mixed @ pointwise.T
    return output if bias is None else output + bias


def layer_norm_reference(rows: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * scale + shift over the channels of (B, L, C)."""
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * scale + shift


def encoder_branches_reference(
    rows: Tensor,
    dense: tuple[Tensor, Tensor],
    convolution: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, float],
    separable: tuple[Tensor, Tensor, Tensor],
    row_mask: Tensor,
) -> Tensor:
    """An encoder block's branches without dropout: normed rows (B, L, D) to (B, L, D), the second half zeros.

    Args:
        row_mask: (B, L), 1 for tokens, 0 for pads.
    """
    rows = rows * row_mask[..., None]
    left = torch.relu(rows @ dense[0].T + dense[1])
    right = torch.relu(convolution_reference(rows, *convolution, num_before=1))
    right = F.pad(right, (0, left.shape[-1] - right.shape[-1]))
    inner = layer_norm_reference(left + right, *norm) * row_mask[..., None]
    output = separable_convolution_reference(inner, *separable, is_causal=False)
    return F.pad(output, (0, rows.shape[-1] - output.shape[-1]))


def decoder_branches_reference(
    rows: Tensor,
    separable_11: tuple[Tensor, Tensor, Tensor],
    separable_7: tuple[Tensor, Tensor, Tensor],
    norm: tuple[Tensor, Tensor, float],
    separable_out: tuple[Tensor, Tensor, Tensor],
    row_mask: Tensor,
) -> Tensor:
    """A decoder block's branches without dropout: normed rows (B, L, D), from the start of the text, to (B, L, D).

    Args:
        row_mask: (B, L), 1 for tokens, 0 for pads.
    """
    rows = rows * row_mask[..., None]
    left = torch.relu(separable_convolution_reference(rows, *separable_11, is_causal=True))
    right = separable_convolution_reference(rows, *separable_7, is_causal=True)
    right = F.pad(right, (0, left.shape[-1] - right.shape[-1]))
    inner = layer_norm_reference(left + right, *norm) * row_mask[..., None]
    return separable_convolution_reference(inner, *separable_out, is_causal=True)


__all__ = [
    "convolution_reference",
    "decoder_branches_reference",
    "encoder_branches_reference",
    "layer_norm_reference",
    "separable_convolution_reference",
]
