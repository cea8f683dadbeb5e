"""Angular locality-sensitive hashing (Andoni et al. 2015, arXiv 1509.02897; Kitaev et al. 2020, section 2).

Letters in shape notes: B batch, H heads, T tokens, K head_dim, R hash rounds, F rotated directions, which are half of
the sum of the bucket factors.

A vector's bucket is the direction, of F random ones and their opposites, that it points to most. With several factors
each has directions of its own, and the bucket is the number whose digits they are, the first factor lowest.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Rotated vectors held at a time, in numbers: what a CPU's cache holds.
BLOCK_NUMBERS = 2**19


def draw_rotations(
    seed: int,
    num_heads: int,
    head_dim: int,
    num_hashes: int,
    num_buckets: tuple[int, ...],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random directions of every head and round, standard normal (Kitaev et al. 2020, arXiv 2001.04451, section 2).

    Drawn in float32 on the CPU from a generator of their own: a seed gives the same numbers everywhere (those that
    transformers' Reformer draws for `hash_seed`), and the ordinary generator stays as it is.

    Returns:
        (H, K, R, F).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_heads, head_dim, num_hashes, sum(num_buckets) // 2)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def fixed_rotations(seed: int, *sizes: int | tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """`draw_rotations` for a seed that is always the same: compiled and exported programs hold them as a constant.

    `torch.export` would record how they are drawn, but the generator's seed only once: the second call of the program
    would draw others.
    """
    if torch.compiler.is_compiling():
        # A copy, because a cache may take it out of the graph, which a constant cannot leave.
        return _constant_rotations(seed, *sizes, device=device).clone()
    return draw_rotations(seed, *sizes, device=device)


@torch.compiler.assume_constant_result
def _constant_rotations(seed: int, *sizes: int | tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """`draw_rotations` where `torch.export` does not see it: it watches one thread."""
    with ThreadPoolExecutor(max_workers=1) as other_thread:
        return other_thread.submit(draw_rotations, seed, *sizes, device=device).result()


def _digit(rotated: Tensor) -> Tensor:
    """argmax of `[x, -x]` along the last dimension, the first of equals: (..., f) to (...), int64.

    Written with sums and largest values, which are quick along a row; finding their place is not.
    """
    num_directions = rotated.shape[-1]
    largest, smallest = rotated.amax(dim=-1), rotated.amin(dim=-1)
    is_opposite = largest < -smallest
    extreme = torch.where(is_opposite, smallest, largest)
    places = torch.arange(num_directions, 0, -1, dtype=rotated.dtype, device=rotated.device)
    # At least 1: NaN equals nothing, and its bucket must be one of the ordinary ones too.
    matches = torch.eq(rotated, extreme[..., None], out=torch.empty_like(rotated))
    from_the_end = matches.mul_(places).amax(dim=-1).clamp_(min=1)
    return (num_directions - from_the_end).long() + is_opposite * num_directions


def _bucket_numbers(rotated: Tensor, num_buckets: tuple[int, ...]) -> Tensor:
    """Number whose digits are the nearest directions of each factor: (..., F) to (...), int64."""
    numbers, place = None, 1
    for factor, directions in zip(
        num_buckets, rotated.split([factor // 2 for factor in num_buckets], dim=-1), strict=True
    ):
        digit = _digit(directions)
        numbers = digit if numbers is None else numbers.add_(digit, alpha=place)
        place *= factor
    return numbers


@torch.no_grad()
def hash_vectors(
    vectors: Tensor,
    rotations: Tensor,
    num_buckets: tuple[int, ...],
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Bucket of every vector in every round. Its length does not matter, so shared keys and queries agree.

    From Andoni et al. 2015, arXiv 1509.02897, as Kitaev et al. 2020, arXiv 2001.04451, section 2, use it.

    Half precision is hashed in float32, also under autocast: a bucket is an argmax, and rounding would move vectors.

    Args:
        vectors: (B, H, T, K).
        rotations: (H, K, R, F), or (B, H, K, R, F) for directions of each row's own; see `draw_rotations`.
        num_buckets: even factors whose product is the number of buckets; `sum(num_buckets) == 2 F`.
        attention_mask: (B, T) bool, True for tokens; pads go to the extra bucket `prod(num_buckets)`.

    Returns:
        (B, H, R, T) int64. Time O(B H T K R F); the rotated vectors are held for a block of tokens only.
    """
    batch_size, num_heads, length, _ = vectors.shape
    *_, num_hashes, num_directions = rotations.shape
    exact = torch.promote_types(vectors.dtype, torch.float32)
    rotations = rotations.to(exact).flatten(-2)

    def of_block(block: Tensor) -> Tensor:
        """(B, H, t, K) to (B, H, R, t)."""
        rotated = torch.matmul(block.to(exact), rotations).unflatten(-1, (num_hashes, num_directions))
        return _bucket_numbers(rotated, num_buckets).transpose(2, 3)

    with torch.autocast(vectors.device.type, enabled=False):
        if torch.compiler.is_exporting():
            # The number of blocks would be recorded, and with it the length.
            buckets = of_block(vectors)
        else:
            size = max(1, BLOCK_NUMBERS // max(1, batch_size * num_heads * num_hashes * num_directions))
            buckets = torch.empty(batch_size, num_heads, num_hashes, length, dtype=torch.int64, device=vectors.device)
            for start in range(0, length, size):
                buckets[..., start : start + size] = of_block(vectors[:, :, start : start + size])
    if attention_mask is not None:
        buckets.masked_fill_(~attention_mask[:, None, None], math.prod(num_buckets))
    return buckets


def add_round_offsets(buckets: Tensor, num_buckets_total: int, has_pads: bool) -> Tensor:
    """Number the buckets of all rounds through, as transformers' Reformer reports them: (B, H, R, T) int64.

    Args:
        buckets: (B, H, R, T), as `hash_vectors` returns them.
        num_buckets_total: how many there are in a round, without the pads'.
        has_pads: whether the pads' bucket is counted.
    """
    per_round = num_buckets_total + has_pads
    offsets = torch.arange(buckets.shape[2], device=buckets.device) * per_round
    return buckets.long() + offsets[:, None]


def compact_buckets(buckets: Tensor, num_buckets_total: int) -> Tensor:
    """The same numbers in the smallest of int16 and int32 that holds them and the pads' bucket, to be kept."""
    return buckets.to(torch.int16 if num_buckets_total <= torch.iinfo(torch.int16).max else torch.int32)


def choose_num_buckets(length: int, chunk_length: int, max_position_embeddings: int) -> tuple[int, ...]:
    """Number of buckets for `num_buckets=None`: about two for each chunk, a power of two (transformers' rule).

    Returns:
        One factor, or two when one would need more directions than about a chunk has tokens. At least 2.
    """
    exponent = max(1, (2 * (length // chunk_length)).bit_length() - 1)
    limit = 2 * max(math.isqrt(max_position_embeddings // chunk_length), chunk_length)
    if 2**exponent <= limit:
        return (2**exponent,)
    return 2 ** (exponent // 2), 2 ** (exponent - exponent // 2)


def key_scale(query_key: Tensor) -> Tensor:
    """What brings a vector that is query and key at once to length 1, up to an epsilon: (..., K) to (..., 1).

    In float32 for half precision.
    """
    exact = query_key.to(torch.promote_types(query_key.dtype, torch.float32))
    return torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + 1e-6) / math.sqrt(query_key.shape[-1])


def shared_key(query_key: Tensor) -> Tensor:
    """Key of a vector that is query and key at once (Kitaev et al. 2020, arXiv 2001.04451, section 2).

    query_key: (..., K). Returns (..., K) of length 1, in the same dtype.
    """
    return (query_key * key_scale(query_key)).to(query_key.dtype)


__all__ = [
    "add_round_offsets",
    "choose_num_buckets",
    "compact_buckets",
    "draw_rotations",
    "fixed_rotations",
    "hash_vectors",
    "key_scale",
    "shared_key",
]
