"""Attention among neighbours of a list sorted by bucket: what `lsh` and `windowed_lsh` have in common.

Letters in shape notes: B batch, H heads, T tokens, K head_dim, R hash rounds, C chunk length, N chunks, L = N C slots
of the sorted list, W keys that a chunk's queries look at (C per chunk looked at), E slots of the list together with
those outside of it that its first and last chunks look at; and of a tile: G lists, n chunks of each, which look at e
slots.

All rounds of a head form one list, round after round, in each the tokens by bucket, in each bucket by position. The
list is cut into chunks of C slots; a chunk's queries look at the keys of some chunks before it, its own and some after
it. A mask says which of these they see. Each round gives an output and the logarithm of its sum of exponentials; the
rounds are one softmax over all keys seen, a key counting as often as it is seen.

The plain form runs anywhere and differentiates as often as wanted. The fused form is for CPUs: it works through the
list in tiles that stay in the cache, keeps no scores, and computes them again in the backward pass.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .hashing import key_scale, shared_key

# A token sees itself only where it sees nothing else: with a shared query and key its own score would win otherwise.
# A power of two: whole numbers times the step are exact in float32.
SELF_STEP = 2.0**17
# Numbers in the queries of a tile, per thread: with its other operands and its scores the tile fills a core's cache.
TILE_NUMBERS = 2**17

# Both also take and return logarithms of sums of exponentials, which the public function does not.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Heads = tuple[slice, slice] | EllipsisType


def sort_by_bucket(buckets: Tensor, num_buckets: int) -> tuple[Tensor, Tensor]:
    """Sort each round's tokens by bucket, then position.

    Args:
        buckets: (B, H, R, T) of any integer type, at most `num_buckets`.

    Returns:
        The tokens in sorted order (B, H, R, T), and the slot of each token in its head's list (B, H, R, T); int64.
    """
    num_rounds, length = buckets.shape[2:]
    num_lists = buckets.shape[0] * buckets.shape[1] * num_rounds
    fits = num_lists * (num_buckets + 1) <= torch.iinfo(torch.int32).max
    # One long list, for which the library has a radix sort, instead of many short ones.
    first = torch.arange(num_lists, dtype=torch.int32 if fits else torch.int64, device=buckets.device)
    keys = buckets.reshape(num_lists, length).to(first.dtype) + first[:, None] * (num_buckets + 1)
    if torch.compiler.is_exporting():
        # ONNX knows no stable sort: no two keys are alike.
        keys = keys.long() * length + torch.arange(length, device=buckets.device)
        order = torch.sort(keys.flatten()).indices
    else:
        order = torch.sort(keys.flatten(), stable=True).indices
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return (order % length).view(buckets.shape), (slots % (num_rounds * length)).view(buckets.shape)


@dataclass(frozen=True)
class Neighbourhood(ABC):
    """Which keys the chunks of a sorted list look at, and what of it their queries see.

    rows: (B, H, E) int, the token in each slot; a filler, which no query sees, may name any token.
    slots: (B, H, R, T) int, the slot of each token, counted from the list's first slot (`before` chunks into `rows`).
    pads: (B, 1, T) bool or None; the output is 0 there.
    alone_factors: (B, H, T) by what the output of a token that sees only itself is multiplied, or None for 1.
    is_circle: whether the slots outside of the list stand for slots inside of it (else they are fillers).
    """

    rows: Tensor
    slots: Tensor
    pads: Tensor | None
    alone_factors: Tensor | None
    chunk_length: int
    before: int
    after: int
    is_circle: bool

    def without_tensors(self) -> tuple["Neighbourhood", dict[str, Tensor]]:
        """Its settings alone, and its tensors by name, with which `dataclasses.replace` completes it again."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        return replace(self, **dict.fromkeys(tensors)), tensors

    @property
    def num_looks(self) -> int:
        """Chunks that a chunk looks at."""
        return self.before + 1 + self.after

    @property
    def num_chunks(self) -> int:
        """N."""
        return self.rows.shape[-1] // self.chunk_length - self.before - self.after

    def slots_of(self, first: int, last: int) -> slice:
        """The slots that the queries of chunks `first` to `last` (exclusive) stand in."""
        return slice((first + self.before) * self.chunk_length, (last + self.before) * self.chunk_length)

    def slots_seen(self, first: int, last: int) -> slice:
        """The slots that these chunks look at."""
        return slice(first * self.chunk_length, (last + self.num_looks - 1) * self.chunk_length)

    def slots_within(self, num_seen: int) -> slice:
        """Of `num_seen` slots that some chunks look at, those that their queries stand in."""
        return slice(self.before * self.chunk_length, num_seen - self.after * self.chunk_length)

    def by_query(self, states: Tensor) -> Tensor:
        """Cut what stands in the slots of some chunks into these chunks: (..., l, K) to (..., l / C, C, K)."""
        return states.unflatten(-2, (-1, self.chunk_length))

    def by_look(self, states: Tensor) -> Tensor:
        """For each chunk what stands in the slots that it looks at, a view: (..., e, K) to (..., n, W, K)."""
        return states.unfold(-2, self.num_looks * self.chunk_length, self.chunk_length).transpose(-1, -2)

    @abstractmethod
    def mask(self, heads: Heads, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """To add to the scores of chunks `first` to `last`, (..., n, C, W).

        0 where a query sees a key, `-SELF_STEP` where the key is its own, `-2 SELF_STEP` or less elsewhere. The memory
        of `out` is used if given.
        """


def circle(rows: Tensor, chunk_length: int, before: int, after: int) -> Tensor:
    """Continue a list at both ends as if it were a circle: (B, H, L) to (B, H, E)."""
    num_slots = rows.shape[-1]
    slots = torch.arange(-before * chunk_length, num_slots + after * chunk_length, device=rows.device)
    return rows[..., slots % num_slots]


def _lonely_tokens(log_sums: Tensor, plan: Neighbourhood, heads: Heads = ...) -> tuple[Tensor, Tensor]:
    """Which tokens see only themselves or are pads, and the factors of all outputs.

    Args:
        log_sums: (B, H, T) of all rounds, or of some rows and heads.

    Returns:
        bool and floating point of the same shape.
    """
    lonely = log_sums < -SELF_STEP / 2
    factors = torch.ones_like(log_sums)
    if plan.alone_factors is not None:
        factors = torch.where(lonely, plan.alone_factors[heads], factors)
    if plan.pads is not None:
        pads = plan.pads.expand(plan.slots.shape[0], plan.slots.shape[1], -1)[heads]
        lonely, factors = lonely | pads, factors.masked_fill(pads, 0)
    return lonely, factors


# --- the plain form -----------------------------------------------------------------------------------------


def _take(states: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, H, m) of `states` (B, H, ., K): (B, H, m, K)."""
    return states.gather(2, index.long()[..., None].expand(*index.shape, states.shape[-1]))


def _dense_weights(probabilities: Tensor, share: Tensor, plan: Neighbourhood) -> Tensor:
    """The probability each token gives each other, all rounds together, (B, H, T, T).

    Args:
        probabilities: (B, H, N, C, W), as one round counts them.
        share: (B, H, R, T), what the rounds count.
    """
    length = share.shape[-1]
    by_slot = share.new_zeros(*share.shape[:2], plan.num_chunks * plan.chunk_length)
    by_slot = plan.by_query(by_slot.scatter(2, plan.slots.flatten(2).long(), share.flatten(2))[..., None])
    rows = plan.rows.long()[..., None]
    pairs = plan.by_query(rows[:, :, plan.slots_of(0, plan.num_chunks)]) * length + plan.by_look(rows).transpose(
        -1, -2
    )
    dense = share.new_zeros(*share.shape[:2], length * length)
    dense = dense.scatter_add(2, pairs.flatten(2), (probabilities * by_slot).flatten(2))
    return dense.unflatten(2, (length, length))


def plain_sorted_attention(
    query_key: Tensor, value: Tensor, plan: Neighbourhood, dropout: float, with_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """`sorted_attention` for every device and any dropout; memory O(B H R T W)."""
    rows = _take(query_key, plan.rows)
    query = plan.by_query(rows[:, :, plan.slots_of(0, plan.num_chunks)])
    scores = torch.matmul(query, plan.by_look(shared_key(rows)).transpose(-1, -2))
    exact = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(exact) + plan.mask(..., 0, plan.num_chunks)
    log_sums, probabilities = scores.logsumexp(dim=-1), scores.softmax(dim=-1)
    kept = F.dropout(probabilities, p=dropout).to(value.dtype)
    output = torch.matmul(kept, plan.by_look(_take(value, plan.rows))).flatten(2, 3)

    slots = plan.slots.flatten(2)
    log_sums = log_sums.flatten(2).gather(2, slots.long()).view(plan.slots.shape)
    # Rounds in which a token sees only itself count alike: so large, their sums are coarsely rounded.
    share = log_sums.masked_fill(log_sums < -SELF_STEP / 2, -SELF_STEP).softmax(dim=2)
    weights = _dense_weights(probabilities, share, plan) if with_weights else None
    _, factors = _lonely_tokens(log_sums.detach().amax(dim=2), plan)
    by_round = _take(output, slots).unflatten(2, plan.slots.shape[2:])
    share = (share * factors[:, :, None]).to(output.dtype)
    return (by_round * share[..., None]).sum(dim=2), weights


# --- the fused form -----------------------------------------------------------------------------------------


class _Tiling:
    """How the work is cut into tiles, and the memory of one, used again for every tile: it stays in the cache.

    A tile is some chunks of one head's list or, where lists are shorter than a tile, the lists of several heads.
    """

    def __init__(self, plan: Neighbourhood, width: int, value: Tensor):
        """`width` is how many states of K numbers a token has, `value` a tensor (B, H, ., K) of the memory's type."""
        self.plan = plan
        self.batch_size, self.num_heads, _, self.head_dim = value.shape
        capacity = max(1, TILE_NUMBERS * torch.get_num_threads() // (plan.chunk_length * self.head_dim))
        self.num_chunks = min(plan.num_chunks, capacity)
        lists = max(1, capacity // plan.num_chunks)
        self.group_heads = min(lists, self.num_heads)
        self.group_rows = min(max(1, lists // self.num_heads), self.batch_size)
        self.num_lists = self.group_rows * self.group_heads
        num_seen = self.num_lists * (self.num_chunks + plan.num_looks - 1) * plan.chunk_length
        self.states = value.new_empty(num_seen, width * self.head_dim)
        self.key = value.new_empty(num_seen, self.head_dim)
        num_queries = self.num_lists * self.num_chunks * plan.chunk_length
        self.mask = value.new_empty(num_queries * plan.num_looks * plan.chunk_length)

    def groups(self) -> Iterator[Heads]:
        """Rows and heads whose lists are worked on together."""
        for row in range(0, self.batch_size, self.group_rows):
            for head in range(0, self.num_heads, self.group_heads):
                yield slice(row, row + self.group_rows), slice(head, head + self.group_heads)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) chunk of each tile of a group."""
        for first in range(0, self.plan.num_chunks, self.num_chunks):
            yield first, min(first + self.num_chunks, self.plan.num_chunks)

    def gather(self, table: Tensor, scale: Tensor, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """The states of slots, each (G, e, K), the key among them second, and its scale (G, e, 1).

        Args:
            table: (G T, width K) states of the group's tokens, their query first.
            scale: (G T, 1), see `hashing.key_scale`.
            rows: (G, e) the slots' rows of the table.
        """
        states = torch.index_select(table, 0, rows.flatten(), out=self.states[: rows.numel()])
        query, *others = states.view(*rows.shape, -1).split(self.head_dim, dim=-1)
        scale = scale.index_select(0, rows.flatten()).view(*rows.shape, 1)
        key = torch.mul(query, scale, out=self.key[: rows.numel()].view(query.shape))
        return [query, key, *others], scale

    def operands(self, states: list[Tensor], group: Heads, first: int, last: int) -> tuple[list[Tensor], Tensor]:
        """The kernel's: query (n, G, C, K), key and value (n, G, W, K), others that go with queries; and the mask."""
        plan = self.plan
        query, key, value, *others = states
        own = plan.slots_within(query.shape[1])
        query, *others = (plan.by_query(rows[:, own]).transpose(0, 1) for rows in (query, *others))
        key, value = (plan.by_look(rows).transpose(0, 1) for rows in (key, value))
        # One cut of (rows, heads, n, C, W) numbers of the memory.
        shape = (*plan.slots[group].shape[:2], last - first, plan.chunk_length, plan.num_looks * plan.chunk_length)
        mask = plan.mask(group, first, last, out=self.mask[: math.prod(shape)].view(shape))
        return [query, key, value, *others], mask.flatten(0, 1).transpose(0, 1)


def _number_through(index: Tensor, per_list: int) -> Tensor:
    """Index into the lists of a group put one behind the other: (rows, heads, ...) to (G, ...)."""
    index = index.flatten(0, 1)
    start = torch.arange(len(index), dtype=index.dtype) * per_list
    return index + start.view(-1, *[1] * (index.dim() - 1))


def _add_rounds(rows: Tensor, slots: Tensor, share: Tensor | None = None) -> Tensor:
    """Sum over the rounds of the rows (., K) that stand in `slots` (G, R, T), times `share`: (G, T, K)."""
    bags = slots.transpose(1, 2).flatten(0, 1)
    share = None if share is None else share.transpose(1, 2).flatten(0, 1)
    return F.embedding_bag(bags, rows, mode="sum", per_sample_weights=share).view(len(slots), -1, rows.shape[-1])


class FusedSortedAttention(torch.autograd.Function):
    """The fused form, for CPUs: see `sorted_attention`."""

    @staticmethod
    def forward(ctx: Any, query_key: Tensor, value: Tensor, plan: Neighbourhood) -> Tensor:
        batch_size, num_heads, length, head_dim = value.shape
        scale = key_scale(query_key)
        # In memory as the layer's next product reads it.
        output = value.new_empty(batch_size, length, num_heads, head_dim).transpose(1, 2)
        log_sums = scale.new_empty(batch_size, num_heads, length)
        tiling = _Tiling(plan, 2, scale.expand(value.shape))
        chunks = scale.new_empty(tiling.num_lists, plan.num_chunks, plan.chunk_length, head_dim)
        chunk_sums = chunks.new_empty(chunks.shape[:-1])
        for group in tiling.groups():
            states = torch.cat([query_key[group], value[group]], dim=-1).to(scale.dtype).flatten(0, 2)
            scales, rows = scale[group].reshape(-1, 1), _number_through(plan.rows[group], length)
            num_lists = len(rows)
            for first, last in tiling.chunks():
                seen, _ = tiling.gather(states, scales, rows[:, plan.slots_seen(first, last)])
                operands, mask = tiling.operands(seen, group, first, last)
                tile, sums = FLASH(*operands, attn_mask=mask, scale=1.0)
                chunks[:num_lists, first:last], chunk_sums[:num_lists, first:last] = (
                    tile.transpose(0, 1),
                    sums.transpose(0, 1),
                )
            slots = _number_through(plan.slots[group], plan.num_chunks * plan.chunk_length)
            by_round = chunk_sums.flatten()[slots]
            log_sums[group] = by_round.logsumexp(dim=1).view(log_sums[group].shape)
            _, factors = _lonely_tokens(log_sums[group], plan, group)
            share = by_round.softmax(dim=1) * factors.flatten(0, 1)[:, None]
            output[group] = _add_rounds(chunks.view(-1, head_dim), slots, share).view(output[group].shape)
        # Through the hooks of saved tensors goes all that is large, the plan's part too.
        ctx.plan, tensors = plan.without_tensors()
        ctx.tensor_names = list(tensors)
        ctx.save_for_backward(query_key, value, output, log_sums, *tensors.values())
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        query_key, value, output, log_sums, *tensors = ctx.saved_tensors
        plan = replace(ctx.plan, **dict(zip(ctx.tensor_names, tensors, strict=True)))
        if torch.is_grad_enabled():
            # The gradient is itself to be differentiated.
            output, _ = plain_sorted_attention(query_key, value, plan, dropout=0.0, with_weights=False)
            return *torch.autograd.grad(output, (query_key, value), grad_output, create_graph=True), None
        return *_fused_backward(plan, query_key, value, output, log_sums, grad_output), None


def _fused_backward(
    plan: Neighbourhood, query_key: Tensor, value: Tensor, output: Tensor, log_sums: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query_key and value."""
    scale = key_scale(query_key)
    num_slots, head_dim = plan.rows.shape[-1], value.shape[-1]
    grad_query_key, grad_value = torch.empty_like(query_key), torch.empty_like(value)
    tiling = _Tiling(plan, 4, scale.expand(value.shape))
    by_slot = scale.new_empty(2, tiling.num_lists, num_slots, head_dim)
    for group in tiling.groups():
        lonely, factors = _lonely_tokens(log_sums[group], plan, group)
        # What sees only itself has no scores to learn: its gradient goes to its value alone.
        given = grad_output[group] * ~lonely[..., None]
        states = torch.cat([query_key[group], value[group], given, output[group]], dim=-1).to(scale.dtype)
        scales, sums = scale[group].reshape(-1, 1), log_sums[group].flatten()
        _slot_gradients(by_slot, tiling, group, states.flatten(0, 2), scales, sums)
        slots = _number_through(plan.slots[group] + plan.before * plan.chunk_length, num_slots)
        by_token = (_add_rounds(rows.flatten(0, 1), slots).view(value[group].shape) for rows in by_slot)
        grad_query_key[group], grads = by_token
        grad_value[group] = grads.addcmul_(grad_output[group], torch.where(lonely, factors, 0)[..., None])
    return grad_query_key, grad_value


def _slot_gradients(
    by_slot: Tensor, tiling: _Tiling, group: Heads, table: Tensor, scale: Tensor, log_sums: Tensor
) -> None:
    """Write the gradients of query_key and value in each slot of a group's lists, (2, G, E, K).

    The kernel gets the output and log sum of all rounds, not of one: it then returns the share of the one.
    """
    plan = tiling.plan
    length = plan.slots.shape[-1]
    rows = _number_through(plan.rows[group], length)
    by_slot = by_slot[:, : len(rows)]
    shared = (plan.num_looks - 1) * plan.chunk_length
    by_slot[:, :, :shared] = 0
    for first, last in tiling.chunks():
        states, scales = tiling.gather(table, scale, rows[:, plan.slots_seen(first, last)])
        operands, mask = tiling.operands(states, group, first, last)
        query, key, value, given, output = operands
        sums = log_sums.index_select(0, rows[:, plan.slots_of(first, last)].flatten())
        sums = sums.view(query.transpose(0, 1).shape[:-1]).transpose(0, 1)
        arguments = (given, query, key, value, output, sums, 0.0, False)
        grads = FLASH_BACKWARD(*arguments, attn_mask=mask, scale=1.0)
        grad_query, grad_key, grad_value = (grad.transpose(0, 1) for grad in grads)
        grad_key, grad_value = _add_looks(grad_key, plan), _add_looks(grad_value, plan)
        # Through the scaling of the key to length 1.
        key = states[1]
        along = (key * grad_key).sum(dim=-1, keepdim=True)
        grad_key.addcmul_(key, along, value=-1).mul_(scales)
        plan.by_query(grad_key[:, plan.slots_within(key.shape[1])]).add_(grad_query)
        seen = by_slot[:, :, plan.slots_seen(first, last)]
        for target, grad in zip(seen, (grad_key, grad_value), strict=True):
            target[:, :shared] += grad[:, :shared]
            target[:, shared:] = grad[:, shared:]
    if plan.is_circle:
        _close_circle(by_slot, plan)


def _add_looks(part: Tensor, plan: Neighbourhood) -> Tensor:
    """Gradients of keys from those of the keys that chunks look at: (G, n, W, K) to (G, e, K)."""
    num_lists, num_chunks, _, head_dim = part.shape
    chunks = part.new_empty(num_lists, num_chunks + plan.num_looks - 1, plan.chunk_length, head_dim)
    looks = part.unflatten(2, (plan.num_looks, -1)).unbind(2)
    chunks[:, :num_chunks] = looks[0]
    chunks[:, num_chunks:] = 0
    for offset, look in enumerate(looks[1:], start=1):
        chunks[:, offset : offset + num_chunks] += look
    return chunks.flatten(1, 2)


def _close_circle(by_slot: Tensor, plan: Neighbourhood) -> None:
    """Add what stands in the slots outside of the list, (., G, E, K), to the slots that they stand for."""
    before, after = plan.before * plan.chunk_length, plan.after * plan.chunk_length
    num_slots = by_slot.shape[2] - before - after
    outside = torch.cat([torch.arange(before), torch.arange(before + num_slots, before + num_slots + after)])
    by_slot.index_add_(2, (outside - before) % num_slots + before, by_slot[:, :, outside])


def no_attention(value: Tensor, implementation: str) -> tuple[Tensor, Tensor | None]:
    """What attention returns for a batch without rows or tokens."""
    weights = value.new_zeros(*value.shape[:3], value.shape[2])
    return value.clone(), weights if implementation == "eager" else None


def sorted_attention(
    query_key: Tensor, value: Tensor, plan: Neighbourhood, dropout: float = 0.0, implementation: str = "sdpa"
) -> tuple[Tensor, Tensor | None]:
    """Attention of each token to the keys that a neighbourhood shows it, itself only where it sees no other.

    The key is the query brought to length 1 (`hashing.shared_key`); scores are not scaled further.

    Args:
        query_key, value: (B, H, T, K) of any strides.
        dropout: probability of dropping an attention weight; pass 0 outside training.
        implementation: `"sdpa"` (no weights; fused on a CPU without dropout) or `"eager"` (returns the weights).

    Returns:
        The output (B, H, T, K), 0 at pads, and the weights (B, H, T, T), whose rows sum to 1, or None. Time
        O(B H R T W K); the fused form keeps O(B H R T) besides its operands and needs O(R T K) while it runs.

    Raises:
        ValueError: `implementation` is unknown.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"implementation={implementation!r} is unknown; choose one of sdpa, eager.")
    is_fused = implementation == "sdpa" and dropout == 0 and value.device.type == "cpu"
    if is_fused and not torch.compiler.is_compiling():
        return FusedSortedAttention.apply(query_key, value, plan), None
    return plain_sorted_attention(query_key, value, plan, dropout, with_weights=implementation == "eager")


__all__ = ["Neighbourhood", "circle", "no_attention", "sort_by_bucket", "sorted_attention"]
