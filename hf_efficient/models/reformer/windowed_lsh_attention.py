"""Attention to the last keys of a token's own hash bucket: LSH attention that is strictly causal.

Letters in shape notes: B batch, H heads, T tokens, K head_dim, R hash rounds, C chunk length, L slots of the sorted
list, a multiple of C, W keys that a chunk's queries look at.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .sorted_attention import SELF_STEP, Heads, Neighbourhood, no_attention, sort_by_bucket, sorted_attention

# The kernel works on blocks of as many queries: longer chunks would only look at more keys that they do not see.
CHUNK_LENGTH = 32


@dataclass(frozen=True)
class BucketWindows(Neighbourhood):
    """Every query sees as many earlier (and later) slots as its bucket holds, up to the window.

    num_earlier: (B, H, L) how many, times `2 SELF_STEP`, in floating point.
    num_later: likewise, or None for causal attention.
    distance: (C, W) of a query's slot to those that its chunk looks at, times `2 SELF_STEP`.
    """

    num_earlier: Tensor
    num_later: Tensor | None
    distance: Tensor
    own: Tensor

    def mask(self, heads: Heads, first: int, last: int, out: Tensor | None = None) -> Tensor:
        slots = slice(first * self.chunk_length, last * self.chunk_length)
        earlier = self.by_query(self.num_earlier[heads][..., slots, None])
        mask = torch.sub(earlier, self.distance, out=out).clamp_(max=0).add_(self.own)
        if self.num_later is not None:
            later = self.by_query(self.num_later[heads][..., slots, None])
            mask.add_(torch.add(later, self.distance).clamp_(max=0))
        return mask


def _bucket_ends(sorted_buckets: Tensor, num_buckets: int) -> tuple[Tensor, Tensor]:
    """Places of the first and the last token of each token's bucket, (..., T) each."""
    if torch.compiler.is_exporting():
        # ONNX knows no running maximum, and its reference counts dimensions from the front.
        numbers, last = sorted_buckets.long(), sorted_buckets.dim() - 1
        counts = numbers.new_zeros(*numbers.shape[:-1], num_buckets + 1)
        counts = counts.scatter_add(last, numbers, torch.ones_like(numbers))
        end = counts.cumsum(dim=last).gather(last, numbers) - 1
        return end + 1 - counts.gather(last, numbers), end
    places = torch.arange(sorted_buckets.shape[-1], device=sorted_buckets.device)
    changes = sorted_buckets[..., 1:] != sorted_buckets[..., :-1]
    first = F.pad(changes, (1, 0), value=True)
    last = F.pad(changes, (0, 1), value=True)
    start = torch.where(first, places, 0).cummax(dim=-1).values
    end = torch.where(last, places, places[-1]).flip(-1).cummin(dim=-1).values.flip(-1)
    return start, end


def _count_neighbours(sorted_buckets: Tensor, num_buckets: int, window: int) -> tuple[Tensor, Tensor]:
    """How many of its bucket, up to the window, stand before and after each token: (..., T) each; 0 for pads."""
    places = torch.arange(sorted_buckets.shape[-1], device=sorted_buckets.device)
    start, end = _bucket_ends(sorted_buckets, num_buckets)
    is_pad = sorted_buckets >= num_buckets
    return tuple(count.clamp_(max=window).masked_fill_(is_pad, 0) for count in (places - start, end - places))


def _find_neighbours(
    buckets: Tensor, num_buckets: int, window: int, is_causal: bool, dtype: torch.dtype
) -> BucketWindows:
    """Sort the tokens; the list's ends are filled up with slots that no query sees."""
    order, slots = sort_by_bucket(buckets, num_buckets)
    sorted_buckets = buckets.gather(-1, order)
    counts = _count_neighbours(sorted_buckets, num_buckets, window)
    before = -(-window // CHUNK_LENGTH)
    chunk_length = -(-window // before)
    after = 0 if is_causal else before
    num_slots = slots.shape[2] * slots.shape[3]
    missing = -(-num_slots // chunk_length) * chunk_length - num_slots
    earlier, later = (F.pad(count.flatten(2), (0, missing)).to(dtype).mul_(2 * SELF_STEP) for count in counts)
    query, key = torch.arange(chunk_length), torch.arange((before + 1 + after) * chunk_length)
    distance = (before * chunk_length + query[:, None] - key).to(buckets.device, dtype)
    own = torch.where(distance == 0, -SELF_STEP, 0.0).to(dtype)
    if is_causal:
        own = own.masked_fill(distance < 0, -2 * SELF_STEP)
    return BucketWindows(
        rows=F.pad(order.flatten(2), (before * chunk_length, missing + after * chunk_length)).int(),
        slots=slots.int(),
        pads=(buckets[:, :1, 0] >= num_buckets),
        alone_factors=None,
        chunk_length=chunk_length,
        before=before,
        after=after,
        is_circle=False,
        num_earlier=earlier,
        num_later=None if is_causal else later,
        distance=distance * (2 * SELF_STEP),
        own=own,
    )


def windowed_lsh_attention(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    *,
    num_buckets: int,
    window: int,
    is_causal: bool,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """Attention within hash buckets; the reference is `windowed_lsh_attention_reference.py`.

    In no paper: this package's own form of LSH attention (Kitaev et al. 2020, arXiv 2001.04451, section 2).

    In each round a token sees the last `window` tokens of its bucket before it and, if not causal, as many after it;
    itself only if nothing else in any round. That depends on nothing but the bucket's own tokens: no other token, pad
    or row of the batch changes it, and causal attention is strictly so.

    Args:
        query_key: (B, H, T, K), query and, brought to length 1, key.
        value: (B, H, T, K).
        buckets: (B, H, R, T) of any integer type, see `hashing.hash_vectors`; `num_buckets` for pads.
        num_buckets: how many there are, without that of pads.
        window: keys seen on each side in each round.
        is_causal: whether later tokens are hidden.
        dropout: probability of dropping an attention weight; pass 0 outside training.
        implementation: `"sdpa"` (no weights) or `"eager"` (returns the weights).

    Returns:
        The output (B, H, T, K), 0 at pads, and the weights (B, H, T, T) or None. Time O(B H R T K window).
    """
    if value.numel() == 0:
        return no_attention(value, implementation)
    dtype = torch.promote_types(value.dtype, torch.float32)
    plan = _find_neighbours(buckets, num_buckets, window, is_causal, dtype)
    return sorted_attention(query_key, value, plan, dropout, implementation)


__all__ = ["windowed_lsh_attention"]
