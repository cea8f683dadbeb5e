"""The segment memory of Transformer-XL as a transformers `Cache` (Dai et al. 2019, section 3.2).

Letters in shape notes: B batch, H heads, M memory slots held now, T new tokens, K head_dim, D hidden_size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_transformer_xl import TransformerXLConfig

# A full window moves back to the front of its buffer once per this share of its length, so that a step copies
# 1 / WINDOW_SLACK tokens on average, however long the memory is.
WINDOW_SLACK = 0.25
MIN_SLACK = 32
# Tokens beyond the window that a recording keeps: what assisted decoding may take back over several rounds.
RECORDED_TOKENS = 64


def keep_last(states: Tensor, length: int, dim: int, num_pads: Tensor | None = None) -> Tensor:
    """The last `length` slots of each row along `dim`, not counting the `num_pads` (B,) slots at the row's end.

    Slots before a row's first one are filled with that first one; the caller masks them by the row's real length.
    """
    total = states.shape[dim]
    length = min(length, total)
    if num_pads is None:
        return states.narrow(dim, total - length, length)
    slots = torch.arange(total - length, total, device=states.device) - num_pads.to(states.device)[:, None]
    shape = [1] * states.ndim
    shape[0], shape[dim] = slots.shape
    index = slots.clamp(min=0).view(shape)
    return states.gather(dim, index.expand(*states.shape[:dim], length, *states.shape[dim + 1 :]))


class KeyValueWindow:
    """A sliding window over keys and values (B, H, M, K) in one preallocated buffer each.

    A token is written behind the last one; when the buffer is full the window moves back to its front. Position
    enters attention only through the distance, so a key stays valid wherever it stands.
    """

    def __init__(self, keys: Tensor, values: Tensor, mem_len: int):
        length = keys.shape[2]
        capacity = max(mem_len, length) + max(int(mem_len * WINDOW_SLACK), MIN_SLACK)
        self.length, self.end = length, length
        self.buffers = []
        for states in (keys, values):
            buffer = states.new_empty(*states.shape[:2], capacity, states.shape[3])
            buffer[:, :, :length] = states.detach()
            self.buffers.append(buffer)

    def last(self, length: int) -> tuple[Tensor, Tensor]:
        """Views (B, H, length, K) of the newest keys and values."""
        keys, values = (buffer[:, :, self.end - length : self.end] for buffer in self.buffers)
        return keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write T new tokens behind the last. Amortised cost O(T)."""
        added = keys.shape[2]
        if self.end + added > self.capacity:
            self._make_room(added)
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.end : self.end + added] = states
        self.end += added
        self.length += added

    def _make_room(self, added: int) -> None:
        needed = self.length + added
        for index, live in enumerate(self.last(self.length)):
            buffer = self.buffers[index]
            if needed > buffer.shape[2]:
                # Twice what is needed, so that each token of a recording that grows is copied O(1) times.
                buffer = live.new_empty(*live.shape[:2], 2 * needed, live.shape[3])
                self.buffers[index] = buffer
                buffer[:, :, : self.length] = live
            else:
                # Source and target may overlap.
                buffer[:, :, : self.length] = live.clone()
        self.end = self.length

    def trim(self, length: int) -> None:
        """Forget all but the newest `length` tokens."""
        self.length = min(self.length, length)

    def remove_last(self, count: int) -> None:
        """Take the newest `count` tokens back."""
        self.end -= count
        self.length -= count

    def map(self, transform: Callable[[Tensor], Tensor]) -> None:
        """Replace both buffers by `transform(buffer)`, which may change batch size and device."""
        self.buffers = [transform(buffer) for buffer in self.buffers]

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return self.buffers[0].shape[2]

    @property
    def is_writable(self) -> bool:
        """False for a window made in inference mode and used outside of it."""
        if torch.compiler.is_compiling():
            return True
        return torch.is_inference_mode_enabled() or not self.buffers[0].is_inference()


class TransformerXLMemoryLayer(CacheLayerMixin):
    """Memory of one layer: hidden states (B, M, D) in training, a `KeyValueWindow` in evaluation.

    Training must remember hidden states, because the paper projects them anew in each segment, so that W_k and W_v
    receive gradient through the memory positions too.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, mem_len: int):
        super().__init__()
        self.mem_len = mem_len
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Back to the state before first use."""
        self.hidden_states: Tensor | None = None
        self.window: KeyValueWindow | None = None
        self.keys = self.values = None
        # Keys and values of a zero vector, (1, H, 1, K): what a row starts from when the memory starts from zeros.
        self.initial_states: tuple[Tensor, Tensor] | None = None
        self.position_key: Tensor | None = None
        self.cumulative_length = 0
        # The newest tokens that `crop` can take back so that the memory is what it was before them.
        self.num_croppable = 0
        self.is_initialized = False

    @property
    def memory_length(self) -> int:
        """Slots that attention sees, at most `mem_len`."""
        if self.window is not None:
            return min(self.window.length, self.mem_len)
        return 0 if self.hidden_states is None else self.hidden_states.shape[1]

    @property
    def state(self) -> Tensor | None:
        """A tensor that tells batch size and device of the memory, None before first use."""
        return self.hidden_states if self.window is None else self.window.buffers[0]

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before first use."""
        return -1 if self.state is None else self.state.shape[0]

    def append_hidden_states(self, hidden_states: Tensor, num_pads: Tensor | None = None) -> None:
        """Remember a layer's input (B, T, D), without gradient and without the `num_pads` (B,) pads at its end."""
        states = hidden_states.detach()
        if self.hidden_states is not None:
            states = torch.cat([self.hidden_states.to(states.dtype), states], dim=1)
        kept = keep_last(states, self.mem_len, dim=1, num_pads=num_pads)
        # A copy: a view would keep the longer tensor alive, and the caller may still write into its own.
        self.hidden_states = kept.clone()
        self._count(hidden_states.shape[1], evicted=states.shape[1] > self.mem_len or num_pads is not None)

    def _count(self, added: int, evicted: bool) -> None:
        self.cumulative_length += added
        self.num_croppable = 0 if evicted else self.num_croppable + added

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start the window from the keys and values (B, H, M, K) of the memory so far; M may be 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.hidden_states = None
        self.window = KeyValueWindow(key_states, value_states, self.mem_len)
        self.is_initialized = True
        self._expose()

    def _expose(self) -> None:
        self.keys, self.values = self.window.last(self.memory_length)

    def update(
        self, key_states: Tensor, value_states: Tensor, num_pads: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Remember keys and values (B, H, T, K) and return them behind the memory, (B, H, M + T, K) each.

        `num_pads` (B,) counts the pads at each row's end, which are returned but not remembered. Amortised cost O(T)
        per step without pads, O(M + T) with them.
        """
        if self.window is None:
            self.lazy_initialization(key_states[:, :, :0], value_states[:, :, :0])
        added = key_states.shape[2]
        key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        if num_pads is None and self._can_write(added):
            visible = self.memory_length + added
            self.window.append(key_states, value_states)
            keys, values = self.window.last(visible)
            evicted = not self.record_past and self.window.length > self.mem_len
        else:
            keys = torch.cat([self.keys, key_states], dim=2)
            values = torch.cat([self.values, value_states], dim=2)
            kept = [keep_last(states, self.mem_len, dim=2, num_pads=num_pads) for states in (keys, values)]
            self.window = KeyValueWindow(*kept, self.mem_len)
            evicted = num_pads is not None or keys.shape[2] > self.mem_len
        if not self.record_past:
            self.window.trim(self.mem_len)
        self._count(added, evicted)
        self._expose()
        return keys, values

    def _can_write(self, added: int) -> bool:
        """Whether new tokens may be written into the window's buffers in place."""
        # A segment far longer than the window would only blow the buffers up.
        fits = self.record_past or self.memory_length + added <= self.window.capacity
        return fits and not torch.is_grad_enabled() and self.window.is_writable

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until the next `crop`, so that assisted decoding can take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back.

        Raises:
            ValueError: that many cannot be taken back exactly, because older ones have left the window since.
        """
        remove = abs(tokens_to_remove)
        if remove > self.num_croppable:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible: only the last {self.num_croppable} tokens can be taken "
                f"back, since older ones have left the memory of mem_len={self.mem_len}; call "
                "activate_past_recording() before feeding tokens that may be taken back."
            )
        self.cumulative_length -= remove
        self.num_croppable -= remove
        if self.window is not None:
            self.window.remove_last(remove)
            if self.window.length > self.mem_len:
                self.window.trim(self.mem_len + RECORDED_TOKENS if self.record_past else self.mem_len)
                self.num_croppable = min(self.num_croppable, self.window.length - self.mem_len)
            self._expose()
        elif remove:
            self.hidden_states = self.hidden_states[:, :-remove]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a segment of `query_length` sees, position of the first of them)."""
        return self.memory_length + query_length, self.cumulative_length - self.memory_length

    def get_seq_length(self) -> int:
        """Columns fed so far, pads included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """-1: a stream has no end."""
        return -1

    def map_states(self, transform: Callable[[Tensor], Tensor]) -> None:
        """Replace the memory by `transform(memory)`, which may change batch size and device."""
        if self.window is not None:
            self.window.map(transform)
            self._expose()
        elif self.hidden_states is not None:
            self.hidden_states = transform(self.hidden_states)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row `indices[b]` was; there may be fewer rows or more."""
        self.map_states(lambda states: states.index_select(0, indices.to(states.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices` under the name that beam search calls."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self.map_states(lambda states: states.repeat_interleave(repeats, dim=0))

    def restart_rows(self, rows: Tensor) -> None:
        """Give the rows where `rows` (B,) is true the zero vectors that their memory starts from."""
        if self.window is not None:
            rows = rows.to(self.state.device)[:, None, None, None]
            self.window.buffers = [
                torch.where(rows, initial.to(buffer), buffer)
                for initial, buffer in zip(self.initial_states, self.window.buffers, strict=True)
            ]
            self._expose()
        elif self.hidden_states is not None:
            rows = rows.to(self.state.device)[:, None, None]
            self.hidden_states = self.hidden_states.masked_fill(rows, 0)

    def to(self, device: torch.device | str) -> None:
        """Move the memory and its tables to `device`."""
        self.map_states(lambda states: states.to(device, non_blocking=True))
        if self.initial_states is not None:
            keys, values = self.initial_states
            self.initial_states = keys.to(device), values.to(device)
        if self.position_key is not None:
            self.position_key = self.position_key.to(device, non_blocking=True)

    def offload(self) -> None:
        """Move keys and values to the CPU until `prefetch`."""
        if self.is_initialized:
            self.to("cpu")

    def prefetch(self) -> None:
        """Bring offloaded keys and values back to the device they are used on."""
        if self.is_initialized and self.state.device != self.device:
            self.to(self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The memory as plain contiguous tensors."""
        if self.window is not None:
            tensors = {"keys": self.keys, "values": self.values}
            if self.initial_states is not None:
                tensors |= dict(zip(("initial_keys", "initial_values"), self.initial_states, strict=True))
        else:
            tensors = {} if self.hidden_states is None else {"hidden_states": self.hidden_states}
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}

    def load_state_dict(self, tensors: dict[str, Tensor], cumulative_length: int) -> None:
        """Take over what `state_dict` gave, as much of it as the memory holds."""
        self.reset()
        if "keys" in tensors:
            self.lazy_initialization(*(keep_last(tensors[name], self.mem_len, dim=2) for name in ("keys", "values")))
            if "initial_keys" in tensors:
                self.initial_states = tensors["initial_keys"].clone(), tensors["initial_values"].clone()
        elif "hidden_states" in tensors:
            self.hidden_states = keep_last(tensors["hidden_states"], self.mem_len, dim=1).clone()
        self.cumulative_length = cumulative_length


class TransformerXLCache(Cache):
    """Memory of all layers, updated in place by the model and returned as `past_key_values`.

    Architecture: Dai et al. 2019, arXiv 1901.02860.

    It starts without rows and takes the batch size of its first use. Pads never enter it: each row's real tokens stand
    at the end of its slots, and `row_lengths` counts them. Every tensor in it is detached.

    Args:
        config: The model's configuration; `mem_len` and `memory_init` are read here, once.
        offloading: Keep all layers but the one in use on the CPU (accelerators only).
    """

    def __init__(self, config: TransformerXLConfig, offloading: bool = False):
        layers = [TransformerXLMemoryLayer(config.mem_len) for _ in range(config.num_hidden_layers)]
        offloading = offloading and torch.accelerator.is_available()
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)
        self.mem_len = config.mem_len
        self.memory_init = config.memory_init
        self.clamp_len: int | None = None
        # Real tokens fed to each row, (B,), not cut at the length of the memory; None while no row has had a pad.
        self._row_tokens: Tensor | None = None

    @property
    def memory_length(self) -> int:
        """Slots of memory in front of the next token, at most `mem_len`."""
        return self.layers[0].memory_length

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before first use."""
        return self.layers[0].batch_size

    @property
    def holds_keys(self) -> bool:
        """Whether the memory is projected keys and values (evaluation) rather than hidden states (training)."""
        return self.layers[0].window is not None

    @property
    def row_lengths(self) -> Tensor | None:
        """(B,) int64, real slots of each row, the last of its `memory_length` ones; None before first use."""
        state = self.layers[0].state
        if state is None:
            return None
        if self._row_tokens is None:
            return torch.full((self.batch_size,), self.memory_length, device=state.device)
        return self._row_tokens.clamp(max=self.memory_length)

    @property
    def padded_row_lengths(self) -> Tensor | None:
        """`row_lengths`, or None while every slot of every row is real."""
        return None if self._row_tokens is None else self.row_lengths

    @property
    def num_position_rows(self) -> int:
        """Rows of the projected position tables kept for decoding, 0 when there are none."""
        table = self.layers[0].position_key
        return 0 if table is None else table.shape[1]

    def check_fits(self, batch_size: int, config: TransformerXLConfig) -> None:
        """Refuse the memory of another batch or model.

        Raises:
            ValueError: batch size, number of layers or a width differs.
        """
        if self.batch_size not in (-1, batch_size):
            raise ValueError(
                f"past_key_values holds the memory of {self.batch_size} rows, but the input has {batch_size}; choose "
                "rows with batch_select_indices, repeat them with batch_repeat_interleave, or pass a new cache."
            )
        held = {"num_hidden_layers": len(self.layers)}
        layer = self.layers[0]
        if layer.window is not None:
            _, held["num_attention_heads"], _, held["head_dim"] = layer.state.shape
        elif layer.state is not None:
            held["hidden_size"] = layer.state.shape[-1]
        for name, value in held.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"past_key_values is the memory of a model with {name}={value}, but this one has "
                    f"{name}={getattr(config, name)}; pass a cache made by this model's create_cache()."
                )

    def start(self, hidden_states: Tensor) -> None:
        """Give an unused memory what it starts from, in the kind of `hidden_states` (B, T, D)."""
        if self.memory_init != "zeros" or self.mem_len == 0 or self.layers[0].state is not None:
            return
        batch_size, _, hidden_size = hidden_states.shape
        for layer in self.layers:
            layer.hidden_states = hidden_states.new_zeros(batch_size, self.mem_len, hidden_size)

    @property
    def _initial_length(self) -> int:
        return self.mem_len if self.memory_init == "zeros" else 0

    def count_tokens(self, length: int, num_pads: Tensor | None) -> None:
        """Note that every row was given `length` columns, of which `num_pads` (B,) were pads."""
        if self._row_tokens is not None:
            self._row_tokens = self._row_tokens + length
        elif num_pads is not None:
            self._row_tokens = torch.full_like(num_pads, self._initial_length + self.get_seq_length())
        if num_pads is not None:
            self._row_tokens = self._row_tokens - num_pads

    def check_mask(self, past_mask: Tensor) -> None:
        """Refuse a mask (B, tokens seen), bool, of the columns fed so far that contradicts the memory.

        Raises:
            ValueError: a row's number of tokens is not the number of those that were not masked then.
        """
        tokens = past_mask.sum(dim=1)
        fed = self.get_seq_length() if self._row_tokens is None else self._row_tokens - self._initial_length
        differs = (tokens != fed).nonzero()
        if differs.numel():
            row = int(differs[0])
            raise ValueError(
                f"attention_mask says that row {row} had {int(tokens[row])} tokens before this segment, but its "
                "memory took in another number; mask a pad when it is fed, or pass the segment's mask alone (generate "
                "masks no pads behind rows that have ended: choose the others with batch_select_indices)."
            )

    def reset(self) -> None:
        """Forget everything, the batch size too."""
        super().reset()
        self._row_tokens = None

    def reset_rows(self, rows: Tensor) -> None:
        """Begin a new stream in the rows where the bool tensor `rows` (B,) is true; the others go on.

        Raises:
            ValueError: `rows` has another shape or dtype.
        """
        if self.batch_size == -1:
            return
        if rows.shape != (self.batch_size,) or rows.dtype != torch.bool:
            raise ValueError(
                f"rows must be a bool tensor of shape ({self.batch_size},), one entry per row of the memory, but is "
                f"{rows.dtype} of shape {tuple(rows.shape)}."
            )
        for layer in self.layers:
            layer.num_croppable = 0
        if self.mem_len == 0:
            return
        if self.memory_init == "zeros":
            for layer in self.layers:
                layer.restart_rows(rows)
        counts = self._row_tokens
        if counts is None:
            counts = torch.full_like(rows, self._initial_length + self.get_seq_length(), dtype=torch.long)
        self._row_tokens = counts.masked_fill(rows.to(counts.device), self._initial_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` columns of every row back (0 or negative, as in transformers).

        Raises:
            ValueError: it is positive, or the memory before these columns is no longer held.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) must be 0 or negative: crop(-n) takes the last n tokens back.")
        super().crop(tokens_to_remove)
        if self._row_tokens is not None:
            self._row_tokens = self._row_tokens + tokens_to_remove

    def _map_rows(self, transform: Callable[[Tensor], Tensor]) -> None:
        if self._row_tokens is not None:
            self._row_tokens = transform(self._row_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda counts: counts.index_select(0, beam_idx.to(counts.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda counts: counts.repeat_interleave(repeats))

    def to(self, device: torch.device | str) -> "TransformerXLCache":
        """Move all state to `device`, in place."""
        for layer in self.layers:
            layer.to(device)
        self._map_rows(lambda counts: counts.to(device))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of contiguous tensors, ready for safetensors."""
        tensors = {"seq_length": torch.tensor(self.get_seq_length())}
        if self._row_tokens is not None:
            tensors["row_tokens"] = self._row_tokens.contiguous()
        for index, layer in enumerate(self.layers):
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over the state that `state_dict` gave.

        Raises:
            ValueError: it belongs to a memory with another number of layers, or to no memory.
        """
        if "seq_length" not in tensors:
            raise ValueError(
                f"The state holds {sorted(tensors)}, which is no memory; give what state_dict() returned."
            )
        indices = {int(name.split(".")[1]) for name in tensors if name.startswith("layers.")}
        if indices and indices != set(range(len(self.layers))):
            raise ValueError(
                f"The saved memory has {max(indices) + 1} layers, but this cache has {len(self.layers)}; load it "
                "into a cache made by the model that saved it."
            )
        seq_length = int(tensors["seq_length"])
        for index, layer in enumerate(self.layers):
            prefix = f"layers.{index}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            layer.load_state_dict(own, seq_length)
        row_tokens = tensors.get("row_tokens")
        self._row_tokens = None if row_tokens is None else row_tokens.clone()


__all__ = ["TransformerXLCache", "TransformerXLMemoryLayer"]
