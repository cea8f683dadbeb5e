"""The Evolved Transformer's cache: keys and values of two self-attentions a block, and its convolutions' state.

Letters in shape notes: B batch, H heads of a slot, S tokens held, L new tokens, K head size, D hidden_size.

Decoder block i has slot 2 i for its wide self-attention, which has more heads, and slot 2 i + 1 for the other one. The
first of the two also holds the rows that the block's causal convolutions look back to: the last 10 of their inputs,
width D, and the last 6 between them, width 2 D. A block keeps 4 D floats for each token of a row, and 22 D floats for
each row however long it is; with an encoder 4 D more for each of the encoder's positions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache

from .configuration_evolved_transformer import EvolvedTransformerConfig
from .conv_branches import STATE_LENGTHS

# A window of which only a part is held moves back to the front of its buffers once per this share of its length.
WINDOW_SLACK = 0.25
MIN_SLACK = 32
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


class EvolvedTransformerCacheLayer(CacheLayerMixin):
    """One slot: keys and values (B, H, S, K), and for a wide slot what the block's convolutions look back to.

    Args:
        record_past: keep enough rows of the convolutions for `crop`.
    """

    is_sliding = False

    def __init__(self, record_past: bool = False):
        super().__init__()
        self.record_past = record_past
        self.reset()

    def reset(self) -> None:
        """Back to the state before first use."""
        self.window: TokenWindow | None = None
        self.keys = self.values = None
        # Rows that the two convolutions ran over, the newest last: (B, >= 10, D) and (B, >= 6, 2 D).
        self.convolution_rows: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before first use."""
        return -1 if self.window is None else self.window.buffers[0].shape[0]

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
            self._append(key_states.to(self.dtype), value_states.to(self.dtype))
        return self.keys, self.values

    # Copied from hf_efficient/models/universal_transformer/cache_universal_transformer.py::_append
    def _append(self, keys: Tensor, values: Tensor) -> None:
        if not torch.is_grad_enabled() and self.window.is_writable:
            self.window.append([keys, values])
            self._expose()
            return
        held = self.window.held()
        self.keys, self.values = (torch.cat(pair, dim=2) for pair in zip(held, (keys, values), strict=True))
        self.window = TokenWindow([self.keys, self.values])

    # Copied from hf_efficient/models/universal_transformer/cache_universal_transformer.py::_expose
    def _expose(self) -> None:
        self.keys, self.values = self.window.held()

    # Copied from hf_efficient/models/universal_transformer/cache_universal_transformer.py::_check_fits
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
        """(B, 10, D) and (B, 6, 2 D): the newest rows of the block's convolutions; None before the first token."""
        if self.convolution_rows is None:
            return None
        inputs, between = self.convolution_rows
        return inputs[:, -STATE_LENGTHS[0] :], between[:, -STATE_LENGTHS[1] :]

    def update_convolution_state(self, rows: tuple[Tensor, Tensor]) -> None:
        """Remember what the convolutions ran over: (B, 10 + L, D) and (B, 6 + L, 2 D), the newest rows last.

        The first 10 and 6 rows are those of `convolution_state`, or zeros at the start of a text.
        """
        inputs, between = (self._kept_rows(index, new.detach()) for index, new in enumerate(rows))
        self.convolution_rows = (inputs, between)

    def _kept_rows(self, index: int, new: Tensor) -> Tensor:
        length = STATE_LENGTHS[index]
        if not self.record_past:
            # A copy, or all the tokens of a prompt would stay in memory.
            return new[:, -length:].clone()
        num_recorded = max(RECORDED_TOKENS, new.shape[1] - length)
        if self.convolution_rows is not None:
            new = torch.cat([self.convolution_rows[index][:, :-length], new], dim=1)
        return new[:, -length - num_recorded :].clone()

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
            num_recorded = self.convolution_rows[0].shape[1] - STATE_LENGTHS[0]
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
        self._expose()
        if self.convolution_rows is not None:
            inputs, between = (rows[:, :tokens_to_remove] for rows in self.convolution_rows)
            self.convolution_rows = (inputs, between)

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
            inputs, between = (transform(rows) for rows in self.convolution_rows)
            self.convolution_rows = (inputs, between)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row `indices[b]` was; there may be fewer rows or more."""
        self.map(partial(select_rows, indices=indices))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices` for the indices of beam search, from 0."""
        self.map(partial(select_beams, beam_idx=beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self.map(partial(torch.repeat_interleave, repeats=repeats, dim=0))


# Copied from hf_efficient/models/universal_transformer/cache_universal_transformer.py::select_rows
def select_rows(states: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of `states`; a bool mask selects as well."""
    return states[indices.to(states.device)]


def select_beams(states: Tensor, beam_idx: Tensor) -> Tensor:
    """Rows `beam_idx`, whole numbers from 0, of `states`: three times as quick as `select_rows` on a CPU."""
    return states.index_select(0, beam_idx.to(states.device))


class EvolvedTransformerCache(DynamicCache):
    """Cache of a decoder, updated in place by the model and returned as `past_key_values`.

    Text may be fed in pieces of any length. It takes the batch size of its first use. Of each row a block keeps 4 D
    floats per token, and 22 D for its convolutions however long the text is.

    Architecture: So et al. 2019, arXiv 1901.11117.

    Args:
        config: The model's configuration; its number of decoder blocks is read here, once.
    """

    layers: list[EvolvedTransformerCacheLayer]

    def __init__(self, config: EvolvedTransformerConfig):
        # The base class fills itself from lists; what is inherited from it is its name, which transformers asks for
        # before it crops, repeats or selects in a cache of an encoder-decoder.
        Cache.__init__(self, layers=[EvolvedTransformerCacheLayer() for _ in range(2 * config.num_decoder_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Remember keys and values (B, H, L, K) of new tokens at one slot; returns those of all, (B, H, S + L, K)."""
        return self.layers[layer_idx].update(key_states, value_states)

    def convolution_state(self, block: int) -> tuple[Tensor, Tensor] | None:
        """(B, 10, D) and (B, 6, 2 D) that the block's convolutions look back to; None before the first token."""
        return self.layers[2 * block].convolution_state

    def update_convolution_state(self, block: int, rows: tuple[Tensor, Tensor]) -> None:
        """Remember what a block's convolutions ran over: (B, 10 + L, D) and (B, 6 + L, 2 D), the newest rows last."""
        self.layers[2 * block].update_convolution_state(rows)

    def reset(self) -> None:
        """Back to the state before first use, with any batch size."""
        for layer in self.layers:
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens of every row back (0 or negative, as in transformers).

        Raises:
            ValueError: it is positive, or a slot cannot take them back exactly; then all are left as they are.
        """
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def to(self, device: torch.device | str) -> "EvolvedTransformerCache":
        """Move all state to `device`, in place."""
        for layer in self.layers:
            layer.map(partial(torch.Tensor.to, device=device))
        return self


def new_cache(config: EvolvedTransformerConfig) -> EvolvedTransformerCache | EncoderDecoderCache:
    """An empty cache for a causal model or, with `config.is_encoder_decoder`, one with room for cross-attention."""
    cache = EvolvedTransformerCache(config)
    return EncoderDecoderCache(cache, DynamicCache()) if config.is_encoder_decoder else cache


def check_cache(cache: Cache, config: EvolvedTransformerConfig) -> Cache:
    """The cache passed by a caller, with room for cross-attention where the model has some.

    Raises:
        TypeError: it is no cache.
        ValueError: it cannot hold what this model remembers.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}, but must be an EvolvedTransformerCache(config)."
        )
    own_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(own_cache, EvolvedTransformerCache):
        raise ValueError(
            f"past_key_values is a {type(own_cache).__name__}, which has no place for what the convolutions look back "
            "to; pass EvolvedTransformerCache(config), or nothing."
        )
    if len(own_cache) != 2 * config.num_decoder_layers:
        raise ValueError(
            f"past_key_values was made for {len(own_cache) // 2} decoder blocks, but the model has "
            f"num_decoder_layers={config.num_decoder_layers}; pass EvolvedTransformerCache(config), or nothing."
        )
    if config.is_encoder_decoder and not isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(cache, DynamicCache())
    return cache


__all__ = ["EvolvedTransformerCache", "EvolvedTransformerCacheLayer"]
