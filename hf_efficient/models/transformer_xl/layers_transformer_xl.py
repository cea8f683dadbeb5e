"""Layers of Transformer-XL (Dai et al. 2019, section 3): relative attention over memory and segment, feed-forward.

Letters in shape notes: B batch, H heads, T tokens of the segment, M memory slots, S = M + T keys, K head_dim,
D hidden_size, R rows of the position table.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_transformer_xl import TransformerXLCache
from .configuration_transformer_xl import TransformerXLConfig
from .relative_attention import relative_attention


class TransformerXLAttention(nn.Module):
    """Relative multi-head attention over memory and segment, with its residual and LayerNorm."""

    def __init__(self, config: TransformerXLConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.r_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        if config.untie_r:
            self.content_bias = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
            self.position_bias = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor | None,
        attention_mask: Tensor | None,
        memory: Tensor | None = None,
        past_key_values: TransformerXLCache | None = None,
        num_pads: Tensor | None = None,
        shared_biases: tuple[Tensor, Tensor] | None = None,
        implementation: str = "sdpa",
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden_states` (B, T, D) to the memory and to themselves.

        Args:
            positions: (R, D) sinusoid table, oldest first; None when the cache holds its projection.
            attention_mask: (B or 1, 1, T, S) bool or None, see `memory_attention_mask`.
            memory: (B, M, D) hidden states that go before the segment.
            past_key_values: cache that holds or takes keys and values; without it `memory` is projected anew.
            num_pads: (B,) pads at the end of each row.
            shared_biases: u and v when all layers share them.
            implementation: `"sdpa"` or `"eager"`, see `relative_attention`.

        Returns:
            (B, T, D) and, with `"eager"`, the attention weights (B, H, T, S).
        """
        normed = self._pre_norm(hidden_states)
        query = self._split_heads(self.q_proj(normed))
        key, value = self._split_heads(self.k_proj(normed)), self._split_heads(self.v_proj(normed))
        if past_key_values is not None:
            self._fill_window(past_key_values, memory)
            key, value = past_key_values.update(key, value, self.layer_idx, num_pads=num_pads)
        elif memory is not None:
            memory_key, memory_value = self._project_memory(memory)
            key = torch.cat([memory_key, key], dim=2)
            value = torch.cat([memory_value, value], dim=2)
        content_bias, position_bias = shared_biases or (self.content_bias, self.position_bias)
        output, weights = relative_attention(
            query,
            key.to(query.dtype),
            value.to(query.dtype),
            self._position_key(positions, past_key_values).to(query.dtype),
            content_bias,
            position_bias,
            mask=attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            implementation=implementation,
        )
        output = self.dropout(self.o_proj(output.transpose(1, 2).flatten(2)))
        output = hidden_states + output
        return output if self.config.pre_norm else self.layer_norm(output), weights

    def _pre_norm(self, states: Tensor) -> Tensor:
        return self.layer_norm(states) if self.config.pre_norm else states

    def _split_heads(self, states: Tensor) -> Tensor:
        """(B, T, H K) to (B, H, T, K)."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M, K) of remembered hidden states (B, M, D), with the weights as they are now."""
        normed = self._pre_norm(memory.to(self.layer_norm.weight.dtype))
        return self._split_heads(self.k_proj(normed)), self._split_heads(self.v_proj(normed))

    def _fill_window(self, cache: TransformerXLCache, memory: Tensor | None) -> None:
        """Turn remembered hidden states into keys and values, once; position is not in them, so this is exact."""
        layer = cache.layers[self.layer_idx]
        if layer.window is not None or memory is None:
            return
        layer.lazy_initialization(*self._project_memory(memory))
        if cache.memory_init == "zeros":
            layer.initial_states = self._project_memory(memory.new_zeros(1, 1, memory.shape[-1]))

    def _position_key(self, positions: Tensor | None, cache: TransformerXLCache | None) -> Tensor:
        """W_r R by head, (H, R, K)."""
        if positions is None:
            return cache.layers[self.layer_idx].position_key
        position_key = self.r_proj(positions).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        if cache is not None and not torch.is_grad_enabled():
            cache.layers[self.layer_idx].position_key = position_key
        return position_key


class TransformerXLFeedForward(nn.Module):
    """Position-wise feed-forward network, with its residual and LayerNorm."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.config = config
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        normed = self.layer_norm(hidden_states) if self.config.pre_norm else hidden_states
        inner = self.dropout(F.relu(self.up_proj(normed)))
        output = hidden_states + self.dropout(self.down_proj(inner))
        return output if self.config.pre_norm else self.layer_norm(output)


class TransformerXLLayer(GradientCheckpointingLayer):
    """One layer: relative attention, then feed-forward."""

    def __init__(self, config: TransformerXLConfig, layer_idx: int):
        super().__init__()
        self.self_attn = TransformerXLAttention(config, layer_idx)
        self.feed_forward = TransformerXLFeedForward(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See `TransformerXLAttention.forward`."""
        hidden_states, weights = self.self_attn(hidden_states, **kwargs)
        return self.feed_forward(hidden_states), weights


__all__ = ["TransformerXLAttention", "TransformerXLFeedForward", "TransformerXLLayer"]
