"""Attention among chunks of a list sorted by hash bucket (Kitaev et al. 2020, arXiv 2001.04451, section 2).

Letters in shape notes: B batch, H heads, T tokens, K head_dim, R hash rounds, N chunks of C slots of the sorted list,
E slots with those that the first and last chunks look at outside of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .sorted_attention import SELF_STEP, Heads, Neighbourhood, circle, no_attention, sort_by_bucket, sorted_attention

# Behind any token, times the step still exact in float32.
PAD_PLACE = 2.0**24


@dataclass(frozen=True)
class BucketChunks(Neighbourhood):
    """Every query sees all (if causal, earlier) tokens of the chunks that it looks at, whatever their bucket.

    places: (B, H, E) position of each slot times `SELF_STEP`, in floating point; `PAD_PLACE` times it for pads.
    """

    places: Tensor
    is_causal: bool
    has_pads: bool

    def mask(self, heads: Heads, first: int, last: int, out: Tensor | None = None) -> Tensor:
        places = self.places[heads][..., None]
        query = self.by_query(places[..., self.slots_of(first, last), :])
        key = self.by_look(places[..., self.slots_seen(first, last), :]).transpose(-1, -2)
        if self.is_causal:
            # As a key a pad stands behind all tokens, as a query before them: it neither is seen nor sees.
            query = query.remainder(PAD_PLACE * SELF_STEP) if self.has_pads else query
            return torch.sub(query - SELF_STEP, key, out=out).clamp_(max=0)
        mask = (query == key).to(key.dtype) if out is None else torch.eq(query, key, out=out)
        mask.mul_(-SELF_STEP)
        if self.has_pads:
            for places in (query, key):
                mask.add_((PAD_PLACE / 2 * SELF_STEP - places).clamp_(max=0))
        return mask


def _alone_factors(slots: Tensor, num_chunks: int, chunk_length: int, looks: tuple[int, int]) -> Tensor:
    """What float32 makes of the weights, in exact numbers 1, of tokens that see only themselves: (B, H, T).

    The checkpoints' own code computes `exp(score - logsumexp(scores))`, and the same over the rounds. These tokens'
    scores are -1e5, where float32 has steps of 1/128: with 2 rounds each counts 0.4989, not a half. Checkpoints were
    trained with that. A round sees a token as often as the chunks that its chunk looks at hold it.
    """
    before, after = looks
    chunk = slots // chunk_length
    distance = (chunk[:, :, None] - chunk[:, :, :, None] + before) % num_chunks
    times_seen = (torch.div(before + after - distance, num_chunks, rounding_mode="floor") + 1).sum(dim=3).float()
    own_score = -1e5
    log_sums = times_seen.log() + own_score
    outputs = times_seen * (own_score - log_sums).exp()
    return (outputs * (log_sums - log_sums.logsumexp(dim=2, keepdim=True)).exp()).sum(dim=2)


def _find_neighbours(
    buckets: Tensor,
    num_buckets: int,
    chunk_length: int,
    looks: tuple[int, int],
    is_causal: bool,
    attention_mask: Tensor | None,
    dtype: torch.dtype,
) -> BucketChunks:
    """Sort the tokens and cut them into chunks; what the last chunk lacks is filled with pads."""
    num_rounds, length = buckets.shape[2:]
    chunks_per_round = -(-length // chunk_length)
    missing = chunks_per_round * chunk_length - length
    order, slots = sort_by_bucket(F.pad(buckets, (0, missing), value=num_buckets), num_buckets)
    order, slots = circle(order.flatten(2), chunk_length, *looks), slots[..., :length]
    places = order.to(dtype)
    if attention_mask is not None:
        is_token = F.pad(attention_mask, (0, missing))[:, None].expand(-1, order.shape[1], -1)
        places = torch.where(is_token.gather(2, order), places, PAD_PLACE)
    elif missing > 0:
        places = torch.where(order < length, places, PAD_PLACE)
    num_chunks = num_rounds * chunks_per_round
    return BucketChunks(
        rows=order.clamp_(max=length - 1).int(),
        slots=slots.int(),
        pads=None if attention_mask is None else ~attention_mask[:, None],
        alone_factors=_alone_factors(slots, num_chunks, chunk_length, looks) if dtype == torch.float32 else None,
        chunk_length=chunk_length,
        before=looks[0],
        after=looks[1],
        is_circle=True,
        places=places.mul_(SELF_STEP),
        is_causal=is_causal,
        has_pads=attention_mask is not None or missing > 0,
    )


def lsh_attention(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    *,
    num_buckets: int,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    is_causal: bool,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """LSH attention as Reformer checkpoints know it; the reference is `lsh_attention_reference.py`.

    From Kitaev et al. 2020, arXiv 2001.04451, section 2.

    In each round the tokens are sorted by bucket and position and cut into chunks. A token sees the tokens of its own
    chunk, of some before and of some after it, whatever their bucket; the first chunk's neighbour is the last. It sees
    itself only if nothing else. Not strictly causal: a later token may move the chunks' borders.

    Args:
        query_key: (B, H, T, K), query and, brought to length 1, key.
        value: (B, H, T, K).
        buckets: (B, H, R, T) of any integer type, see `hashing.hash_vectors`; `num_buckets` for pads.
        num_buckets: how many there are, without that of pads.
        chunk_length: tokens of a chunk; with T not above it use `full_attention`.
        num_chunks_before, num_chunks_after: chunks looked at on either side.
        is_causal: whether later tokens are hidden.
        attention_mask: (B, T) bool, True for tokens; pads are seen by nobody and stand last in their row.
        dropout: probability of dropping an attention weight; pass 0 outside training.
        implementation: `"sdpa"` (no weights) or `"eager"` (returns the weights).

    Returns:
        The output (B, H, T, K), 0 at pads, and the weights (B, H, T, T) or None. Time
        O(B H R T C K) for chunks of C.
    """
    looks = (num_chunks_before, num_chunks_after)
    if value.numel() == 0:
        return no_attention(value, implementation)
    dtype = torch.promote_types(value.dtype, torch.float32)
    plan = _find_neighbours(buckets, num_buckets, chunk_length, looks, is_causal, attention_mask, dtype)
    return sorted_attention(query_key, value, plan, dropout, implementation)


__all__ = ["lsh_attention"]
