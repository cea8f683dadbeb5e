"""The Evolved Transformer's convolutional branches (So et al. 2019, arXiv 1901.11117, figure 3), and their parts.

All run over rows (B, L, C) in their usual layout. Letters in shape notes: B batch, L tokens, C channels, k width of a
convolution, D hidden_size.

Each of the two sub-layers sends its rows through two branches of unequal width, adds the narrow result to the first
channels of the wide one, normalises, and narrows the sum by a separable convolution.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# A map of rows (B, L, C) to rows (B, L', C'): a module, or a function over weights.
RowMap = Callable[[Tensor], Tensor]

# Rows that a decoder's two stages look back on, (B, 10, D) and (B, 6, 2 D).
ConvolutionState = tuple[Tensor, Tensor]

# Widths of tensor2tensor's convolutions over the tokens.
ENCODER_CONVOLUTION = 3
ENCODER_SEPARABLE = 9
DECODER_WIDE = 11
DECODER_NARROW = 7
DECODER_OUT = 7
# Rows that a decoder's stages look back on.
STATE_LENGTHS = (DECODER_WIDE - 1, DECODER_OUT - 1)

# Up to so many products, multiplying and adding by themselves are quicker than a convolution.
FEW_PRODUCTS = 2**16


def depthwise_convolution(rows: Tensor, weight: Tensor, padding: int = 0) -> Tensor:
    """A convolution over the tokens, each channel for itself: y[t, c] = sum over j of x[t + j - padding, c] w[c, j].

    Args:
        rows: (B, L, C).
        weight: (C, 1, k).
        padding: zeros on each side.

    Returns:
        (B, L + 2 * padding - k + 1, C). Cost O(B L C k).
    """
    width = weight.shape[2]
    num_products = rows.shape[0] * (rows.shape[1] - width + 1) * weight.numel()
    # A graph may be made for many lengths, so that it cannot depend on this one.
    if padding == 0 and not torch.compiler.is_compiling() and 0 < num_products <= FEW_PRODUCTS:
        return (rows.unfold(1, width, 1) * weight[:, 0]).sum(dim=-1)
    return _convolve(rows, weight, None, padding, groups=weight.shape[0])


def full_convolution(rows: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
    """An ordinary convolution over the tokens, every channel reading all.

    Args:
        rows: (B, L, C).
        weight: (C', C, k).
        bias: (C',).
        padding: zeros on each side.

    Returns:
        (B, L + 2 * padding - k + 1, C'). Cost O(B L C C' k).
    """
    return _convolve(rows, weight, bias, padding, groups=1)


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    """A convolution over rows (B, L, C) as over images of height 1.

    Rows in their usual layout are what is called "channels last" there. For channels by themselves the kernels are at
    least twice as quick on a CPU, forward and backward, as those of a one-dimensional convolution.
    """
    if rows.shape[1] + 2 * padding < weight.shape[2]:
        return rows.new_zeros(rows.shape[0], 0, weight.shape[0])
    images = rows.transpose(1, 2).unsqueeze(2)
    kernel = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    output = F.conv2d(images, kernel, bias, padding=(0, padding), groups=groups)
    return output.squeeze(2).transpose(1, 2)


def look_back(rows: Tensor, state: Tensor | None, amount: int) -> Tensor:
    """Put `amount` rows before the rows (B, L, C): the state (B, amount, C), or zeros at the start of a text."""
    if state is None:
        return F.pad(rows, (0, 0, amount, 0))
    return torch.cat([state.to(rows.dtype), rows], dim=1)


def separable_convolution(
    rows: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """A convolution over the tokens, each channel for itself, then a linear map of the channels.

    From So et al. 2019, arXiv 1901.11117, figure 3.

    Args:
        rows: (B, L, C).
        depthwise: (C, 1, k).
        pointwise: (C', C).
        bias: (C',).
        state: (B, k - 1, C), the rows before these; None: zeros. Only with `is_causal`.
        is_causal: a row sees itself and k - 1 rows before it, instead of (k - 1) / 2 on either side.

    Returns:
        (B, L, C'). Cost O(B L C (k + C')).

    Raises:
        ValueError: a state without `is_causal`, or an even width, which has no middle.
    """
    width = depthwise.shape[2]
    if is_causal:
        mixed = depthwise_convolution(look_back(rows, state, width - 1), depthwise)
    elif state is not None:
        raise ValueError("state holds earlier rows, but is_causal=False; set it to True, or leave the state out.")
    elif width % 2 == 0:
        raise ValueError(f"depthwise is {width} wide, which has no middle; use an odd width, or is_causal=True.")
    else:
        mixed = depthwise_convolution(rows, depthwise, padding=width // 2)
    return F.linear(mixed, pointwise, bias)


def add_to_first(rows: Tensor, narrow: Tensor) -> Tensor:
    """Add (B, L, C') to the first C' channels of (B, L, C)."""
    # Zeros beside it: to add to a part costs more, since the gradient of a part is a whole with zeros.
    return rows + F.pad(narrow, (0, rows.shape[-1] - narrow.shape[-1]))


def mask_rows(rows: Tensor, row_mask: Tensor | None) -> Tensor:
    """The rows (B, L, C), 0 where the mask (B, L) is False.

    Not a product: whatever a pad holds, NaN too, must not reach the tokens beside it.
    """
    return rows if row_mask is None else rows.masked_fill(~row_mask[..., None], 0)


def encoder_branches(
    rows: Tensor,
    dense: RowMap,
    convolution: RowMap,
    norm: RowMap,
    separable: RowMap,
    row_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """An encoder block's branches: separable(norm(relu(dense(n)) + relu(convolution(n)))).

    From So et al. 2019, arXiv 1901.11117, figure 3.

    Args:
        rows: (B, L, D), normed.
        dense: D to 4 D at every position.
        convolution: D to D / 2 over 3 positions.
        norm: LayerNorm over 4 D.
        separable: 4 D to D / 2 over 9 positions.
        row_mask: (B, L) bool, False for pads, which count as zeros in both stages.
        dropout: probability, of what leaves either branch.

    Returns:
        (B, L, D / 2), for the first half of the residual stream's channels.
    """
    rows = mask_rows(rows, row_mask)
    wide = _drop(F.relu(dense(rows)), dropout)
    narrow = _drop(F.relu(convolution(rows)), dropout)
    return separable(mask_rows(norm(add_to_first(wide, narrow)), row_mask))


def decoder_branches(
    rows: Tensor,
    separable_11: RowMap,
    separable_7: RowMap,
    norm: RowMap,
    separable_out: RowMap,
    state: ConvolutionState | None = None,
    row_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, ConvolutionState]:
    """A decoder block's branches: separable_out(norm(relu(separable_11(n)) + separable_7(n))), all looking back only.

    From So et al. 2019, arXiv 1901.11117, figure 3. The three convolutions get the rows that they look back on before
    their own, and so put no zeros there themselves.

    Args:
        rows: (B, L, D), normed.
        separable_11: D to 2 D over 11 positions: (B, 10 + L, D) to (B, L, 2 D).
        separable_7: D to D / 2 over 7 positions: (B, 6 + L, D) to (B, L, D / 2).
        norm: LayerNorm over 2 D.
        separable_out: 2 D to D over 7 positions: (B, 6 + L, 2 D) to (B, L, D).
        state: the last 10 rows (B, 10, D) and 6 inner rows (B, 6, 2 D) before these; None at the start of a text.
        row_mask: (B, L) bool, False for pads, which count as zeros in both stages.
        dropout: probability, of what leaves either branch.

    Returns:
        (B, L, D), and the rows (B, 10 + L, D) and inner rows (B, 6 + L, 2 D) that the convolutions ran over, whose
        ends are the next call's state.
    """
    past_rows, past_inner = (None, None) if state is None else state
    padded = look_back(mask_rows(rows, row_mask), past_rows, STATE_LENGTHS[0])
    wide = _drop(F.relu(separable_11(padded)), dropout)
    narrow = _drop(separable_7(padded[:, DECODER_WIDE - DECODER_NARROW :]), dropout)
    inner = mask_rows(norm(add_to_first(wide, narrow)), row_mask)
    padded_inner = look_back(inner, past_inner, STATE_LENGTHS[1])
    return separable_out(padded_inner), (padded, padded_inner)


def _drop(rows: Tensor, dropout: float) -> Tensor:
    return F.dropout(rows, dropout) if dropout else rows


__all__ = [
    "STATE_LENGTHS",
    "ConvolutionState",
    "decoder_branches",
    "depthwise_convolution",
    "encoder_branches",
    "full_convolution",
    "separable_convolution",
]
