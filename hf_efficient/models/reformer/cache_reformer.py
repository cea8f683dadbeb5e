"""The Reformer's cache: keys, values and buckets of all tokens so far, as a transformers `Cache`.

Letters in shape notes: B batch, H heads, S slots held, T new tokens, K head_dim, R hash rounds, F rotated directions.

Each row's tokens stand at the end of the S slots, without pads in between; the slots before a row's first token hold
nothing of meaning. Position enters a key through its token only, so keys stay valid wherever they stand.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_reformer import ReformerConfig

# A full window moves back to the front of its buffers once per this share of its length, so that a step copies
# 1 / WINDOW_SLACK tokens on average, however long the window is.
WINDOW_SLACK = 0.25
MIN_SLACK = 32
# Tokens beyond the window that a recording keeps: what assisted decoding may take back over several rounds.
RECORDED_TOKENS = 64


def shift_out_pads(states: Tensor, num_pads: Tensor) -> Tensor:
    """(B, ..., S, X) with each row moved back by its number of pads (B,), so that its last token comes last.

    Slots before a row's first one are filled with that first one.
    """
    length = states.shape[-2]
    slots = torch.arange(length, device=states.device) - num_pads.to(states.device)[:, None]
    shape = [1] * states.ndim
    shape[0], shape[-2] = slots.shape
    return states.gather(-2, slots.clamp(min=0).view(shape).expand_as(states))


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


class ReformerCacheLayer(CacheLayerMixin):
    """What one layer remembers: keys and values, for hashed layers buckets and how they were made.

    Args:
        window: tokens that a new one may look back to, itself included (`local` layers); None means all.
    """

    is_sliding = False
    is_croppable = True
    # Whether there are buckets is only known when the first tokens come.
    supports_early_init = False

    def __init__(self, window: int | None = None):
        super().__init__()
        self.max_window = window
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Back to the state before first use."""
        self.window: TokenWindow | None = None
        # Keys and values (B, H, S, K) and buckets (B, H, R, S) that attention sees: the newest tokens and what they
        # may look back to.
        self.keys = self.values = self.buckets = None
        # Rotations (H, K, R, F) or (B, H, K, R, F) and bucket factors that all buckets are made with; the model's.
        self.rotations: Tensor | None = None
        self.num_buckets: tuple[int, ...] | None = None
        # Cross-attention of a decoder: (B, H, S, K) twice, and (B, S) bool or None; the model's.
        self.cross_keys = self.cross_values = self.cross_mask = None
        self.cumulative_length = 0
        # Tokens of each row so far, (B,), no matter how many are still held; None while no row has had a pad.
        self.row_lengths: Tensor | None = None
        # The largest of them, known without a look at the tensor.
        self.max_row_length = 0
        # The last columns that held a token in every row.
        self._num_last_columns = 0
        self.dtype = self.device = None
        self.is_initialized = False

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before first use."""
        return -1 if self.window is None else self.window.buffers[0].shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor, buckets: Tensor | None = None) -> None:
        """Start from the tokens given: (B, H, S, K) twice, (B, H, R, S); S may be 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window = TokenWindow(_as_list(key_states, value_states, buckets))
        self.is_initialized = True
        self._expose(self.window.held())

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        num_pads: Tensor | None = None,
        buckets: Tensor | None = None,
        num_last_tokens: int = 0,
    ) -> None:
        """Remember new tokens: afterwards `keys`, `values` and `buckets` hold them and what they may look back to.

        The first tokens of an empty layer attend to each other without it: of them, a layer with a window keeps what
        later ones may look back to. Amortised cost O(T) per call without pads, O(S + T) with them or with gradients.

        Args:
            keys, values: (B, H, T, K). Gradients flow to them until the next call.
            num_pads: (B,) pads at each row's end, which are not remembered; None means none.
            buckets: (B, H, R, T); for all calls or for none.
            num_last_tokens: columns at the end that held tokens in every row before pads were moved there: the ones
                that `crop` can take back. Without `num_pads` these are all.

        Raises:
            ValueError: the tokens do not fit those held.
        """
        tensors = _as_list(keys, values, buckets)
        added = keys.shape[2]
        if self.window is None:
            self._count(added, num_pads, num_last_tokens)
            if num_pads is not None:
                tensors = [shift_out_pads(states, num_pads) for states in tensors]
            if self.max_window is not None and not self.record_past:
                tensors = [states[..., -self.max_window :, :] for states in tensors]
            self.lazy_initialization(*_from_list(tensors))
            return
        self._check_fits(tensors)
        self._count(added, num_pads, num_last_tokens)
        tensors = [states.to(buffer.dtype) for states, buffer in zip(tensors, self.window.buffers, strict=True)]
        if self.max_window is not None and not self.record_past:
            self.window.trim(self.max_window)
        if num_pads is None and not torch.is_grad_enabled() and self.window.is_writable:
            self.window.append(tensors)
            self._expose(self.window.held())
            return
        joined = [torch.cat(pair, dim=-2) for pair in zip(self.window.held(), tensors, strict=True)]
        if num_pads is not None:
            joined = [shift_out_pads(states, num_pads) for states in joined]
        self.window = TokenWindow(joined)
        self._expose(joined)

    def update(self, key_states: Tensor, value_states: Tensor, **kwargs: Tensor | None) -> tuple[Tensor, Tensor]:
        """`append` under the library's name: returns the keys and values (B, H, S, K) that the new tokens see."""
        self.append(key_states, value_states, **kwargs)
        return self.keys, self.values

    def _expose(self, tensors: list[Tensor]) -> None:
        self.keys, self.values, self.buckets = _from_list(tensors)

    def _check_fits(self, tensors: list[Tensor]) -> None:
        held = self.window.buffers
        if len(tensors) != len(held):
            raise ValueError(
                f"The cache was filled {'with' if len(held) == 3 else 'without'} buckets; go on with the attn_layers "
                "it was filled with, or begin with an empty one."
            )
        for name, new, old in zip(("keys", "values", "buckets"), tensors, held, strict=False):
            shapes = [(*states.shape[:-2], states.shape[-1]) for states in (new, old)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The cache holds {name} of shape {tuple(old.shape)}, tokens in the last dimension but one, which "
                    f"{tuple(new.shape)} does not continue; choose rows with batch_select_indices, repeat them with "
                    "batch_repeat_interleave, keep num_hashes, or pass a new cache."
                )

    def _count(self, added: int, num_pads: Tensor | None, num_last_tokens: int) -> None:
        if num_pads is not None and self.row_lengths is None:
            self.row_lengths = torch.full_like(num_pads, self.cumulative_length)
        self.cumulative_length += added
        self.max_row_length += added
        self._num_last_columns += added
        if self.row_lengths is not None:
            self.row_lengths = self.row_lengths + added
        if num_pads is not None:
            self.row_lengths = self.row_lengths - num_pads
            self._measure_rows()
            self._num_last_columns = num_last_tokens

    def _measure_rows(self) -> None:
        self.max_row_length = int(self.row_lengths.max()) if self.row_lengths.numel() else 0

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until the next `crop`, so that assisted decoding can take tokens back."""
        self.record_past = True

    @property
    def num_croppable(self) -> int:
        """Columns that `crop` can take back so that the layer is what it was before them."""
        if self.window is None:
            return 0
        if self.max_window is None or self.window.length == self.cumulative_length:
            return self._num_last_columns
        # The next token looks back to `max_window - 1` ones at most.
        return min(self._num_last_columns, max(self.window.length - (self.max_window - 1), 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` columns of every row back (0 or negative, as in transformers).

        Raises:
            ValueError: it is positive, or that many cannot be taken back exactly: there were pads among them, or what
                the token before them looks back to has left the window.
        """
        self.check_crop(tokens_to_remove)
        if self.window is None:
            return
        removed = -tokens_to_remove
        self.cumulative_length -= removed
        self.max_row_length -= removed
        self._num_last_columns -= removed
        if self.row_lengths is not None:
            self.row_lengths = self.row_lengths - removed
        self.window.remove_last(removed)
        if self.max_window is not None:
            self.window.trim(self.max_window + RECORDED_TOKENS if self.record_past else self.max_window)
        self._expose(self.window.held())

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would raise."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) must be 0 or negative: crop(-n) takes the last n tokens back.")
        if -tokens_to_remove > self.num_croppable:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible: only the last {self.num_croppable} tokens can be taken "
                "back, since pads came before them or older tokens have left a local layer's window; call "
                "activate_past_recording() before feeding tokens that may be taken back."
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `query_length` new tokens see, column of the first of them)."""
        held = 0 if self.window is None else self.window.length
        if self.max_window is not None:
            held = min(held, self.max_window)
        return held + query_length, self.cumulative_length - held

    def get_seq_length(self) -> int:
        """Columns fed so far, pads included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """-1: there is no end."""
        return -1

    def _map(self, transform: Callable[[Tensor], Tensor], maps_rows: bool) -> None:
        """Replace all state by `transform(state)`; tensors without rows only if it does not map rows."""
        if self.window is not None:
            self.window.map(transform)
            self._expose(self.window.held())
        for name in ("row_lengths", "cross_keys", "cross_values", "cross_mask"):
            if getattr(self, name) is not None:
                setattr(self, name, transform(getattr(self, name)))
        if self.rotations is not None and (self.rotations.ndim == 5 or not maps_rows):
            self.rotations = transform(self.rotations)
        if maps_rows and self.row_lengths is not None:
            self._measure_rows()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row `indices[b]` was; there may be fewer rows or more."""
        self._map(lambda states: states.index_select(0, indices.to(states.device)), maps_rows=True)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices` under the name that beam search calls."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self._map(lambda states: states.repeat_interleave(repeats, dim=0), maps_rows=True)

    def to(self, device: torch.device | str) -> None:
        """Move all state to `device`."""
        self._map(lambda states: states.to(device), maps_rows=False)


def _as_list(keys: Tensor, values: Tensor, buckets: Tensor | None) -> list[Tensor]:
    """The tensors with their slots in the last but one dimension."""
    return [keys, values] if buckets is None else [keys, values, buckets[..., None]]


def _from_list(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    keys, values, *buckets = tensors
    return keys, values, buckets[0][..., 0] if buckets else None


class ReformerCache(Cache):
    """Cache of all layers, updated in place by the model and returned as `past_key_values`.

    Architecture: Kitaev et al. 2020, arXiv 2001.04451.

    It takes the batch size of its first use. Pads never enter it. `local` layers hold a window of the chunks that a
    token can see, all others every token; buffers grow by doubling.

    Args:
        config: The model's configuration; the layer types (`decoder_attn_layers` of an encoder-decoder) and the sizes
            of `local` layers are read here, once.
    """

    def __init__(self, config: ReformerConfig):
        layer_types = config.attn_layers
        if config.is_encoder_decoder and config.decoder_attn_layers is not None:
            layer_types = config.decoder_attn_layers
        window = (config.local_num_chunks_before + 1) * config.local_attn_chunk_length
        layers = [ReformerCacheLayer(window if kind == "local" else None) for kind in layer_types]
        super().__init__(layers=layers)

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before first use."""
        return self.layers[0].batch_size

    @property
    def row_lengths(self) -> Tensor | None:
        """(B,) tokens of each row so far; None while no row has had a pad."""
        return self.layers[0].row_lengths

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` columns of every row back (0 or negative, as in transformers).

        Raises:
            ValueError: it is positive, or a layer cannot take them back exactly; then all are left as they are.
        """
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def to(self, device: torch.device | str) -> "ReformerCache":
        """Move all state to `device`, in place."""
        for layer in self.layers:
            layer.to(device)
        return self


__all__ = ["ReformerCache", "ReformerCacheLayer"]
