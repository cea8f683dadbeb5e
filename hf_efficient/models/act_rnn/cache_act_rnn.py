"""The recurrent state as a transformers `Cache`.

Letters in shape notes: B batch, S width of a layer's state (output, and an LSTM's memory cell beside it).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_act_rnn import ActRnnConfig


class ActRnnCacheLayer(CacheLayerMixin):
    """State of one layer, (B, S), without gradient; None before first use."""

    is_sliding = False
    # A state cannot be taken back.
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Back to the state before first use."""
        self.state: Tensor | None = None
        self.keys = self.values = None
        self.cumulative_length = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated before the first state is known."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a recurrent network has neither keys nor values."""
        raise TypeError("A recurrent network has no keys and values; its state is set with update_state().")

    def update_state(self, state: Tensor, num_tokens: int) -> None:
        """Take over the state (B, S) after `num_tokens` more columns."""
        self.state = state.detach()
        self.cumulative_length += num_tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Columns fed so far, pads included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns up to the end of a segment of `query_length`, position of the first of them)."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: a stream has no end."""
        return -1

    def map_states(self, transform: Callable[[Tensor], Tensor]) -> None:
        """Replace the state by `transform(state)`, which may change batch size and device."""
        if self.state is not None:
            self.state = transform(self.state)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row `indices[b]` was; there may be fewer rows or more."""
        self.map_states(lambda state: state.index_select(0, indices.to(state.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices` under the name that beam search calls."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self.map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """A state is too small to be worth moving."""

    def prefetch(self) -> None:
        """A state is too small to be worth moving."""


class ActRnnCache(Cache):
    """Recurrent state of all layers, updated in place by the model and returned as `past_key_values`.

    Architecture: Graves 2016, arXiv 1603.08983.

    It starts from zeros and takes the batch size of its first use. Its size does not depend on how much was read.
    Gradient ends at it: training piece by piece with it is truncated back-propagation through time.
    """

    def __init__(self, config: ActRnnConfig):
        super().__init__(layers=[ActRnnCacheLayer() for _ in range(config.num_hidden_layers)])
        self.state_size = config.state_size

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before first use."""
        state = self.layers[0].state
        return -1 if state is None else state.shape[0]

    def check_fits(self, batch_size: int, config: ActRnnConfig) -> None:
        """Refuse the state of another batch or model.

        Raises:
            ValueError: batch size, number of layers or a width differs.
        """
        if self.batch_size not in (-1, batch_size):
            raise ValueError(
                f"past_key_values holds the state of {self.batch_size} rows, but the input has {batch_size}; choose "
                "rows with batch_select_indices, repeat them with batch_repeat_interleave, or pass a new cache."
            )
        for name, value in (("num_hidden_layers", len(self.layers)), ("state_size", self.state_size)):
            if getattr(config, name) != value:
                raise ValueError(
                    f"past_key_values is the state of a model with {name}={value}, but this one has "
                    f"{name}={getattr(config, name)}; pass a cache made by this model's create_cache()."
                )

    def states(self) -> tuple[Tensor, ...] | None:
        """(B, S) per layer, None before first use."""
        return None if self.batch_size == -1 else tuple(layer.state for layer in self.layers)

    def update_states(self, states: tuple[Tensor, ...], num_tokens: int) -> None:
        """Take over the states after `num_tokens` more columns."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.update_state(state, num_tokens)

    def reset_rows(self, rows: Tensor) -> None:
        """Begin a new stream in the rows where the bool tensor `rows` (B,) is true; the others go on.

        Raises:
            ValueError: `rows` has another shape or dtype.
        """
        if self.batch_size == -1:
            return
        if rows.shape != (self.batch_size,) or rows.dtype != torch.bool:
            raise ValueError(
                f"rows must be a bool tensor of shape ({self.batch_size},), one entry per row of the state, but is "
                f"{rows.dtype} of shape {tuple(rows.shape)}."
            )
        for layer in self.layers:
            layer.map_states(lambda state: state.masked_fill(rows.to(state.device)[:, None], 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in this order."""
        self.reorder_cache(indices)

    def to(self, device: torch.device | str) -> "ActRnnCache":
        """Move all state to `device`, in place."""
        for layer in self.layers:
            layer.map_states(lambda state: state.to(device))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of contiguous tensors, ready for safetensors."""
        tensors = {"seq_length": torch.tensor(self.get_seq_length())}
        for index, layer in enumerate(self.layers):
            if layer.state is not None:
                tensors[f"layers.{index}.state"] = layer.state.clone(memory_format=torch.contiguous_format)
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over the state that `state_dict` gave.

        Raises:
            ValueError: it belongs to a network with another number of layers, or to none.
        """
        names = [f"layers.{index}.state" for index in range(len(self.layers))]
        if set(tensors) not in ({"seq_length"}, {"seq_length", *names}):
            raise ValueError(
                f"The state holds {sorted(tensors)}, but this cache has {len(self.layers)} layers; load what "
                "state_dict() of a cache of the same model returned."
            )
        self.reset()
        if len(tensors) > 1:
            self.update_states(tuple(tensors[name].clone() for name in names), int(tensors["seq_length"]))


__all__ = ["ActRnnCache", "ActRnnCacheLayer"]
