"""The Universal Transformer's cache: keys and values of all tokens at every step, as a transformers `Cache`.

Letters in shape notes: B batch, H heads, S tokens held, L new tokens, K head size, D hidden_size, F intermediate_size,
T steps, G blocks in the group.

A token that runs step t attends to every earlier token's keys of step t, also to those of tokens that halted sooner.
So there is a slot for each block at each step, and each holds every token: the prelude's blocks come first, block g of
step t has slot `num_prelude_layers + t * G + g`, the coda's blocks come last. With `share_cache="last_step"` all steps
of block g have one slot, which holds what the last step wrote.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache

from .configuration_universal_transformer import UniversalTransformerConfig
from .transition import FIRST_WIDTH, SECOND_WIDTH

# A window of which only a part is held moves back to the front of its buffers once per this share of its length.
WINDOW_SLACK = 0.25
MIN_SLACK = 32
# Rows that the two convolutions of a causal transition look back to.
CONVOLUTION_WIDTHS = (FIRST_WIDTH - 1, SECOND_WIDTH - 1)
# Tokens whose convolution rows a recording keeps: what assisted decoding may take back over several rounds.
RECORDED_TOKENS = 64


# Copied from hf_efficient/models/reformer/cache_reformer.py::TokenWindow
class TokenWindow:
    """The newest tokens of several tensors (B, ..., S, X), in one preallocated buffer each.

    A token is written behind the last one. Buffers that are full double, or, if only a part of them is still held,
    that part moves back to the front.
    """

    def __init__(self, tensors: list[Tensor]):
        self.length = self.end = tensors[0].shape[-2]
        capacity = self.length + max(int(self.length * WINDOW_SLACK), MIN_SLACK)
        self.buffers = [self._buffer(tensor, capacity) for tensor in tensors]

    def _buffer(self, states: Tensor, capacity: int) -> Tensor:
        """A buffer that begins with `states`, without their gradient."""
        buffer = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
        buffer[..., : states.shape[-2], :] = states.detach()
        return buffer

    def held(self) -> list[Tensor]:
        """Views (B, ..., S, X) of the tokens held."""
        return [buffer[..., self.end - self.length : self.end, :] for buffer in self.buffers]

    def append(self, tensors: list[Tensor]) -> None:
        """Write T new tokens (B, ..., T, X) behind the last. Amortised cost O(T)."""
        added = tensors[0].shape[-2]
        if self.end + added > self.capacity:
            self._make_room(added)
        for buffer, states in zip(self.buffers, tensors, strict=True):
            buffer[..., self.end : self.end + added, :] = states
        self.end += added
        self.length += added

    def _make_room(self, added: int) -> None:
        needed = self.length + added
        if needed > self.capacity:
            # Twice what is needed, so that each token is copied O(1) times.
            self.buffers = [self._buffer(states, 2 * needed) for states in self.held()]
        else:
            for buffer, states in zip(self.buffers, self.held(), strict=True):
                # Source and target may overlap.
                buffer[..., : self.length, :] = states.clone()
        self.end = self.length

    def trim(self, length: int) -> None:
        """Forget all but the newest `length` tokens."""
        self.length = min(self.length, length)

    def remove_last(self, count: int) -> None:
        """Take the newest `count` tokens back."""
        self.end -= count
        self.length -= count

    def map(self, transform: Callable[[Tensor], Tensor]) -> None:
        """Replace all buffers by `transform(buffer)`, which may change batch size and device."""
        self.buffers = [transform(buffer) for buffer in self.buffers]

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return self.buffers[0].shape[-2]

    @property
    def is_writable(self) -> bool:
        """False for a window made in inference mode and used outside of it."""
        if torch.compiler.is_compiling():
            return True
        return torch.is_inference_mode_enabled() or not self.buffers[0].is_inference()


class UniversalTransformerCacheLayer(CacheLayerMixin):
    """One slot: keys and values (B, H, S, K) of one block at one step, and what its convolutions look back to.

    Args:
        is_shared: all steps write to this slot, and what a later one writes replaces what an earlier one of the same
            call wrote.
        record_past: keep enough rows of the convolutions for `crop`.
    """

    is_sliding = False

    def __init__(self, is_shared: bool = False, record_past: bool = False):
        super().__init__()
        self.is_shared = is_shared
        self.record_past = record_past
        self.reset()

    def reset(self) -> None:
        """Back to the state before first use."""
        self.window: TokenWindow | None = None
        self.keys = self.values = None
        # Rows that the two convolutions ran over, the newest last: (B, >= 2, D) and (B, >= 4, F), or None. Those that
        # the tokens of the running call look back to, and those with these tokens.
        self.past_rows: tuple[Tensor, Tensor] | None = None
        self.convolution_rows: tuple[Tensor, Tensor] | None = None
        # Newest tokens of a shared slot that the next step of this call replaces.
        self.num_replaceable = 0
        self.is_initialized = False

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before first use."""
        return -1 if self.window is None else self.window.buffers[0].shape[0]

    def begin(self) -> None:
        """A new call starts: what is held is the past of its tokens."""
        self.num_replaceable = 0
        self.past_rows = self.convolution_rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start from the tokens given, (B, H, S, K) twice; S may be 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window = TokenWindow([key_states, value_states])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Remember L new tokens (B, H, L, K) and return keys and values (B, H, S + L, K), the new ones last.

        Amortised cost O(L); O(S + L) where gradients are recorded, which flow to the new tokens until the next call.

        Raises:
            ValueError: the tokens do not fit those held.
        """
        if self.window is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            self._check_fits(key_states)
            self.window.remove_last(self.num_replaceable)
            self._append(key_states.to(self.dtype), value_states.to(self.dtype))
        self.num_replaceable = key_states.shape[2] if self.is_shared else 0
        return self.keys, self.values

    def _append(self, keys: Tensor, values: Tensor) -> None:
        if not torch.is_grad_enabled() and self.window.is_writable:
            self.window.append([keys, values])
            self._expose()
            return
        held = self.window.held()
        self.keys, self.values = (torch.cat(pair, dim=2) for pair in zip(held, (keys, values), strict=True))
        self.window = TokenWindow([self.keys, self.values])

    def _expose(self) -> None:
        self.keys, self.values = self.window.held()

    def _check_fits(self, keys: Tensor) -> None:
        held = self.window.buffers[0]
        if (held.shape[:2], held.shape[3]) != (keys.shape[:2], keys.shape[3]):
            raise ValueError(
                f"The cache holds {held.shape[0]} rows of {held.shape[1]} heads of size {held.shape[3]}, which keys "
                f"of shape {tuple(keys.shape)} do not continue; choose rows with batch_select_indices, repeat them "
                "with batch_repeat_interleave, or pass a new cache."
            )

    @property
    def convolution_state(self) -> tuple[Tensor, Tensor] | None:
        """(B, 2, D) and (B, 4, F): the rows before this call's tokens that the convolutions look back to."""
        if self.past_rows is None:
            return None
        inputs, hidden = (rows[:, -width:] for rows, width in zip(self.past_rows, CONVOLUTION_WIDTHS, strict=True))
        return inputs, hidden

    def update_convolution_state(self, rows: tuple[Tensor, Tensor]) -> None:
        """Remember what the convolutions ran over: (B, 2 + L, D), (B, 4 + L, F), those looked back to first."""
        kept = [self._kept_rows(index, new.detach()) for index, new in enumerate(rows)]
        self.convolution_rows = (kept[0], kept[1])

    def _kept_rows(self, index: int, new: Tensor) -> Tensor:
        width = CONVOLUTION_WIDTHS[index]
        if not self.record_past:
            # A copy, or all the tokens of a prompt would stay in memory.
            return new[:, -width:].clone()
        num_recorded = max(RECORDED_TOKENS, new.shape[1] - width)
        if self.past_rows is not None:
            new = torch.cat([self.past_rows[index][:, :-width], new], dim=1)
        return new[:, -width - num_recorded :].clone()

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` finds what it needs; convolutions keep it only after `activate_past_recording`."""
        return self.record_past or self.convolution_rows is None

    def activate_past_recording(self) -> None:
        """Keep convolution rows until the next `crop`, so that assisted decoding can take tokens back."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would raise."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) must be 0 or negative: crop(-n) takes the last n tokens back.")
        if -tokens_to_remove > self.get_seq_length():
            raise ValueError(f"crop({tokens_to_remove}) of a cache that holds {self.get_seq_length()} tokens.")
        if tokens_to_remove and self.convolution_rows is not None:
            num_recorded = self.convolution_rows[0].shape[1] - CONVOLUTION_WIDTHS[0]
            if -tokens_to_remove > num_recorded:
                raise ValueError(
                    f"crop({tokens_to_remove}) is not possible: what the convolutions look back to is kept for the "
                    f"last {num_recorded} tokens; call activate_past_recording() before feeding tokens that may be "
                    "taken back."
                )

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back (0 or negative, as in transformers).

        Raises:
            ValueError: it is positive, there are not so many tokens, or the convolutions' rows before them are gone.
        """
        self.check_crop(tokens_to_remove)
        if self.window is None or tokens_to_remove == 0:
            return
        self.window.remove_last(-tokens_to_remove)
        self.num_replaceable = 0
        self._expose()
        if self.convolution_rows is not None:
            inputs, hidden = (rows[:, :tokens_to_remove] for rows in self.convolution_rows)
            self.past_rows = self.convolution_rows = (inputs, hidden)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `query_length` new tokens see, column of the first of them)."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held, pads included."""
        return 0 if self.window is None else self.window.length

    def get_max_length(self) -> int:
        """-1: there is no end."""
        return -1

    def map(self, transform: Callable[[Tensor], Tensor]) -> None:
        """Replace all state by `transform(state)`, which may change batch size and device."""
        if self.window is not None:
            self.window.map(transform)
            self.device = self.window.buffers[0].device
            self._expose()
        if self.convolution_rows is not None:
            inputs, hidden = (transform(rows) for rows in self.convolution_rows)
            self.past_rows = self.convolution_rows = (inputs, hidden)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row `indices[b]` was; there may be fewer rows or more."""
        self.map(partial(select_rows, indices=indices))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices` under the name that beam search calls."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self.map(partial(torch.repeat_interleave, repeats=repeats, dim=0))


def select_rows(states: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of `states`; a bool mask selects as well."""
    return states[indices.to(states.device)]


class UniversalTransformerCache(DynamicCache):
    """Cache of all steps of all blocks, updated in place by the model and returned as `past_key_values`.

    Architecture: Dehghani et al. 2019, arXiv 1807.03819.

    Slots are made when they are first written, so a call may take more steps than `config.max_steps`. All calls with
    one cache take the same number of steps, since its tokens have keys for that many. It takes the batch size of its
    first use.

    Args:
        config: The model's configuration; where the steps' slots lie and whether they are one is read here, once.

    Attributes:
        num_steps: Steps of the calls that filled it, None before the first.
    """

    def __init__(self, config: UniversalTransformerConfig):
        # The base class fills itself from lists; what is inherited from it is its name, which transformers asks for
        # before it crops, repeats or selects in a cache of an encoder-decoder.
        Cache.__init__(self, layers=[])
        self.shares_slots = config.share_cache is not None
        self.num_steps: int | None = None
        self.record_past = False
        self._ponder_times: TokenWindow | None = None

    def begin(self, num_steps: int) -> None:
        """A call of the model starts, which takes `num_steps` steps.

        Raises:
            ValueError: the tokens held took another number of steps.
        """
        if self.get_seq_length() == 0:
            self.reset()
        elif self.num_steps not in (None, num_steps):
            raise ValueError(
                f"num_steps={num_steps} cannot continue a cache that was begun with num_steps={self.num_steps}: its "
                "tokens have keys for that many steps. Keep num_steps, or begin with an empty cache."
            )
        self.num_steps = num_steps
        for layer in self.layers:
            layer.begin()

    def _layer(self, slot: int) -> UniversalTransformerCacheLayer:
        while len(self.layers) <= slot:
            self.layers.append(UniversalTransformerCacheLayer(self.shares_slots, self.record_past))
        return self.layers[slot]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Remember keys and values (B, H, L, K) of new tokens at one slot; returns those of all, (B, H, S + L, K)."""
        return self._layer(layer_idx).update(key_states, value_states)

    def convolution_state(self, slot: int) -> tuple[Tensor, Tensor] | None:
        """(B, 2, D) and (B, 4, F) that the slot's convolutions look back to; None before the first token."""
        return self._layer(slot).convolution_state

    def update_convolution_state(self, slot: int, rows: tuple[Tensor, Tensor]) -> None:
        """Remember what a slot's convolutions ran over: (B, 2 + L, D), (B, 4 + L, F), those looked back to first."""
        self._layer(slot).update_convolution_state(rows)

    def record_ponder_times(self, ponder_times: Tensor) -> None:
        """Add the ponder times (B, L) of new tokens to `ponder_times`."""
        ponder_times = ponder_times.detach()[..., None]
        if self._ponder_times is None:
            self._ponder_times = TokenWindow([ponder_times])
        elif self._ponder_times.is_writable:
            self._ponder_times.append([ponder_times])
        else:
            self._ponder_times = TokenWindow([torch.cat([*self._ponder_times.held(), ponder_times], dim=1)])

    @property
    def ponder_times(self) -> Tensor | None:
        """(B, S): steps that each token held took, pads included; None for a model without halting."""
        return None if self._ponder_times is None else self._ponder_times.held()[0][..., 0]

    def reset(self) -> None:
        """Back to the state before first use, with any number of steps."""
        self.layers = []
        self.num_steps = None
        self._ponder_times = None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` finds what it needs; convolutions keep it only after `activate_past_recording`."""
        return all(layer.is_croppable for layer in self.layers)

    def activate_past_recording(self) -> None:
        """Keep convolution rows until the next `crop`, so that assisted decoding can take tokens back."""
        self.record_past = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens of every row back (0 or negative, as in transformers).

        Raises:
            ValueError: it is positive, or a slot cannot take them back exactly; then all are left as they are.
        """
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        if self._ponder_times is not None:
            self._ponder_times.remove_last(-tokens_to_remove)

    def _map(self, transform: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.map(transform)
        if self._ponder_times is not None:
            self._ponder_times.map(transform)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row `indices[b]` was; there may be fewer rows or more."""
        self._map(partial(select_rows, indices=indices))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices` under the name that beam search calls."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self._map(partial(torch.repeat_interleave, repeats=repeats, dim=0))

    def to(self, device: torch.device | str) -> "UniversalTransformerCache":
        """Move all state to `device`, in place."""
        self._map(partial(torch.Tensor.to, device=device))
        return self


def new_cache(config: UniversalTransformerConfig) -> UniversalTransformerCache | EncoderDecoderCache:
    """An empty cache for a causal model or, with `config.is_encoder_decoder`, one with room for cross-attention."""
    cache = UniversalTransformerCache(config)
    return EncoderDecoderCache(cache, DynamicCache()) if config.is_encoder_decoder else cache


def begin_call(cache: Cache, config: UniversalTransformerConfig, num_steps: int) -> None:
    """Tell the cache of self-attention that a call of `num_steps` steps starts; any transformers cache may serve.

    Raises:
        ValueError: the cache was begun with another number of steps, has too few slots, or is of a kind that cannot
            hold what this model remembers.
    """
    if isinstance(cache, UniversalTransformerCache):
        cache.begin(num_steps)
        return
    kind = type(cache).__name__
    for field, reason in (("transition", "separable_convolution"), ("share_cache", "last_step")):
        if getattr(config, field) == reason:
            raise ValueError(
                f"{kind} cannot be used with {field}={reason!r}; pass UniversalTransformerCache(config), or nothing."
            )
    num_slots = config.num_prelude_layers + num_steps * config.num_layers_in_group + config.num_coda_layers
    if cache.layer_class_to_replicate is None and len(cache) < num_slots:
        raise ValueError(
            f"num_steps={num_steps} needs a cache of {num_slots} slots, and this {kind} has {len(cache)}; pass "
            "UniversalTransformerCache(config), DynamicCache() without a config, or nothing."
        )
    if not torch.compiler.is_compiling():
        _check_slots(cache, num_slots)


def _check_slots(cache: Cache, num_slots: int) -> None:
    num_used = sum(int(cache.get_seq_length(slot)) > 0 for slot in range(len(cache)))
    if num_used not in (0, num_slots):
        raise ValueError(
            f"This {type(cache).__name__} was begun with another num_steps: {num_used} of its slots are in use, and "
            f"this call needs {num_slots}. Keep num_steps, or begin with an empty cache."
        )


__all__ = ["UniversalTransformerCache", "UniversalTransformerCacheLayer"]
