"""The blocks of the Evolved Transformer, each in place of two layers of a Transformer.

Every sub-layer is x + dropout(F(LayerNorm(x))). Letters in shape notes: B batch, L tokens of the call, S keys, D
hidden_size, H heads, K head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_evolved_transformer import EvolvedTransformerConfig
from .conv_branches import (
    DECODER_NARROW,
    DECODER_OUT,
    DECODER_WIDE,
    ENCODER_CONVOLUTION,
    ENCODER_SEPARABLE,
    add_to_first,
    decoder_branches,
    depthwise_convolution,
    encoder_branches,
    full_convolution,
)

# Keys and values (B, H, S, K).
Keys = tuple[Tensor, Tensor]


class EncoderBlockOutput(NamedTuple):
    """What an encoder block returns.

    hidden_states: (B, L, D).
    attentions: weights (B, H, L, L) where the attention returns them ("eager"), else None.
    """

    hidden_states: Tensor
    attentions: Tensor | None


class DecoderBlockOutput(NamedTuple):
    """What a decoder block returns; the weights (B, H, L, S) where the attention returns them ("eager"), else None.

    hidden_states: (B, L, D).
    wide_attentions, attentions: of the two self-attentions.
    wide_cross_attentions, cross_attentions: of the attentions to the encoder beside them; None without an encoder.
    """

    hidden_states: Tensor
    wide_attentions: Tensor | None
    attentions: Tensor | None
    wide_cross_attentions: Tensor | None
    cross_attentions: Tensor | None


def bidirectional_mask(
    config: EvolvedTransformerConfig,
    embeds: Tensor,
    attention_mask: Tensor | None,
    encoder_states: Tensor | None = None,
) -> Tensor | None:
    """The mask of an attention that may look everywhere, in the form that the attention implementation reads.

    Args:
        embeds: (B, L, D) of those who look.
        attention_mask: (B, S), 1 for tokens; or a mask of four dimensions, returned as it is.
        encoder_states: (B, S, D) of those who are looked at; None: the same.

    Returns:
        (B, 1, L or 1, S), or None for no mask.
    """
    mask = create_bidirectional_mask(config, embeds, attention_mask, encoder_hidden_states=encoder_states)
    # One row is enough for all who look, unless the caller made them different.
    return mask[:, :, :1] if mask is not None and attention_mask.ndim == 2 else mask


# Copied from hf_efficient/models/universal_transformer/layers_universal_transformer.py::eager_attention_forward
def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Plain form that also returns the weights (B, H, Q, S); softmax in float32 (float64 for float64).

    A query that sees no key gets 0, as from the fused forms.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query * scaling, key.transpose(2, 3)).to(exact)
    is_visible = None
    if attention_mask is not None:
        is_visible = attention_mask
        if attention_mask.dtype != torch.bool:
            is_visible = attention_mask > torch.finfo(attention_mask.dtype).min
            scores = scores + attention_mask
        scores = scores.masked_fill(~is_visible, torch.finfo(exact).min)
    weights = scores.softmax(dim=-1).to(value.dtype)
    if is_visible is not None:
        weights = weights * is_visible
    weights = F.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class EvolvedTransformerAttention(nn.Module):
    """Attention over keys and values that somebody else put together; no projection has a bias (tensor2tensor)."""

    def __init__(self, config: EvolvedTransformerConfig, num_heads: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.head_size = config.hidden_size // num_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def project_keys(self, rows: Tensor) -> Keys:
        """Keys and values (B, H, S, K) of the rows (B, S, D)."""
        return self._split(self.k_proj(rows)), self._split(self.v_proj(rows))

    def forward(self, rows: Tensor, keys: Keys, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Every row looks at the keys.

        Args:
            rows: (B, L, D).
            keys: keys and values, each (B, H, S, K).
            mask: (B or 1, 1, L or 1, S), bool or added to the scores; None for all keys, or if causal all before.

        Returns:
            (B, L, D), and the weights (B, H, L, S) or None. Time O(B L D² + B H L S K); memory O(B H L S) where
            weights are returned, otherwise O(B H (L + S) K).
        """
        queries = self._split(self.q_proj(rows))
        # The fused forms need something to compute.
        implementation = self.config._attn_implementation if queries.numel() else "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            queries,
            *keys,
            mask,
            scaling=self.head_size**-0.5,
            dropout=self.dropout if self.training else 0.0,
            is_causal=self.is_causal,
        )
        return self.o_proj(output.flatten(-2)), weights

    def _split(self, states: Tensor) -> Tensor:
        """(B, L, D) to (B, H, L, K)."""
        return states.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)


class GatedLinearUnit(nn.Module):
    """(x W_v + b_v) * sigmoid(x W_g + b_g) at every position."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__()
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.value_proj(rows) * self.gate_proj(rows).sigmoid()


class RowConvolution(nn.Module):
    """The weights of a convolution over the tokens, for rows in their usual layout; the model initialises them.

    No `nn.Conv1d`, which tools take for one over (B, C, L).
    """

    def __init__(self, weight_shape: tuple[int, int, int], padding: int, has_bias: bool):
        super().__init__()
        self.padding = padding
        self.weight = nn.Parameter(torch.zeros(weight_shape))
        self.bias = nn.Parameter(torch.zeros(weight_shape[0])) if has_bias else None


class TokenConvolution(RowConvolution):
    """A convolution over as many tokens on both sides."""

    def __init__(self, in_channels: int, out_channels: int, width: int):
        super().__init__((out_channels, in_channels, width), padding=width // 2, has_bias=True)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L, in_channels) to (B, L, out_channels)."""
        return full_convolution(rows, self.weight, self.bias, self.padding)


class DepthwiseConvolution(RowConvolution):
    """A convolution over the tokens, each channel for itself."""

    def __init__(self, channels: int, width: int, padding: int):
        super().__init__((channels, 1, width), padding, has_bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L, channels) to (B, L + 2 * padding - width + 1, channels)."""
        return depthwise_convolution(rows, self.weight, self.padding)


class SeparableConvolution(nn.Module):
    """A depthwise convolution, then a linear map of the channels.

    A causal one gets the rows it looks back on before the others and returns nothing for them; the other puts zeros
    on both sides.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, is_causal: bool):
        super().__init__()
        self.depthwise = DepthwiseConvolution(in_channels, width, padding=0 if is_causal else width // 2)
        self.pointwise = nn.Linear(in_channels, out_channels)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L, in_channels) to (B, L, out_channels), or to (B, L - width + 1, out_channels) if causal."""
        return self.pointwise(self.depthwise(rows))


class EncoderBranches(nn.Module):
    """The weights of `encoder_branches`."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        self.dense = nn.Linear(width, 4 * width)
        self.convolution = TokenConvolution(width, width // 2, ENCODER_CONVOLUTION)
        self.norm = nn.LayerNorm(4 * width, eps=config.layer_norm_eps)
        self.separable = SeparableConvolution(4 * width, width // 2, ENCODER_SEPARABLE, is_causal=False)

    def forward(self, rows: Tensor, row_mask: Tensor | None) -> Tensor:
        """Normed rows (B, L, D) to (B, L, D / 2); `row_mask` (B, L) is False for pads."""
        dropout = self.dropout if self.training else 0.0
        return encoder_branches(rows, self.dense, self.convolution, self.norm, self.separable, row_mask, dropout)


class DecoderBranches(nn.Module):
    """The weights of `decoder_branches`."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        self.separable_11 = SeparableConvolution(width, 2 * width, DECODER_WIDE, is_causal=True)
        self.separable_7 = SeparableConvolution(width, width // 2, DECODER_NARROW, is_causal=True)
        self.norm = nn.LayerNorm(2 * width, eps=config.layer_norm_eps)
        self.separable_out = SeparableConvolution(2 * width, width, DECODER_OUT, is_causal=True)

    def forward(
        self, rows: Tensor, row_mask: Tensor | None, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Normed rows (B, L, D) to (B, L, D), and the rows that the convolutions ran over; see `decoder_branches`."""
        dropout = self.dropout if self.training else 0.0
        convolutions = (self.separable_11, self.separable_7, self.norm, self.separable_out)
        return decoder_branches(rows, *convolutions, state, row_mask, dropout)


class EncoderFeedForward(nn.Module):
    """relu(x W_1 + b_1) W_2 + b_2 at every position."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.down_proj(self.dropout(F.relu(self.up_proj(rows))))


class DecoderFeedForward(nn.Module):
    """LayerNorm(silu(x W_1 + b_1)) W_2 + b_2 at every position; the inner LayerNorm is tensor2tensor's too."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.down_proj(self.norm(self.dropout(F.silu(self.up_proj(rows)))))


def _layer_norm(config: EvolvedTransformerConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class EvolvedTransformerEncoderBlock(GradientCheckpointingLayer):
    """Gated linear unit, branches, self-attention, feed-forward."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__()
        self.glu_norm = _layer_norm(config)
        self.glu = GatedLinearUnit(config)
        self.branch_norm = _layer_norm(config)
        self.branches = EncoderBranches(config)
        self.self_attention_norm = _layer_norm(config)
        self.self_attention = EvolvedTransformerAttention(config, config.num_attention_heads, is_causal=False)
        self.feed_forward_norm = _layer_norm(config)
        self.feed_forward = EncoderFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, row_mask: Tensor | None = None
    ) -> EncoderBlockOutput:
        """One block.

        Args:
            hidden_states: (B, L, D).
            mask: of attention, (B or 1, 1, L or 1, L), bool or added to the scores; None for all keys.
            row_mask: (B, L) bool, False for pads; None for no pads.
        """
        hidden_states = hidden_states + self.dropout(self.glu(self.glu_norm(hidden_states)))
        # The branches reach only the first half of the channels.
        output = self.branches(self.branch_norm(hidden_states), row_mask)
        hidden_states = add_to_first(hidden_states, self.dropout(output))
        rows = self.self_attention_norm(hidden_states)
        output, attentions = self.self_attention(rows, self.self_attention.project_keys(rows), mask)
        hidden_states = hidden_states + self.dropout(output)
        output = self.feed_forward(self.feed_forward_norm(hidden_states))
        return EncoderBlockOutput(hidden_states + self.dropout(output), attentions)


class EvolvedTransformerDecoderBlock(GradientCheckpointingLayer):
    """Wide self-attention beside attention to the encoder, branches, self-attention, attention to the encoder,
    feed-forward.

    The attentions to the encoder are left out where there is none. Block i has the cache's slots 2 i (wide) and
    2 i + 1.
    """

    def __init__(self, config: EvolvedTransformerConfig, index: int):
        super().__init__()
        self.index = index
        self.wide_attention_norm = _layer_norm(config)
        self.wide_self_attention = EvolvedTransformerAttention(config, config.wide_heads, is_causal=True)
        self.branch_norm = _layer_norm(config)
        self.branches = DecoderBranches(config)
        self.self_attention_norm = _layer_norm(config)
        self.self_attention = EvolvedTransformerAttention(config, config.num_attention_heads, is_causal=True)
        if config.is_encoder_decoder:
            self.wide_cross_attention = EvolvedTransformerAttention(config, config.num_attention_heads, False)
            self.cross_attention = EvolvedTransformerAttention(config, config.num_attention_heads, False)
            self.cross_attention_norm = _layer_norm(config)
        self.feed_forward_norm = _layer_norm(config)
        self.feed_forward = DecoderFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        row_mask: Tensor | None = None,
        encoder_states: Tensor | None = None,
        cross_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> DecoderBlockOutput:
        """One block.

        Args:
            hidden_states: (B, L, D).
            mask: of self-attention, (B or 1, 1, L, S), bool or added to the scores; None for all earlier tokens.
            row_mask: (B, L) bool, False for pads; None for no pads.
            encoder_states: (B, S, D), for a block with cross-attention.
            cross_mask: of attention to the encoder, (B or 1, 1, 1 or L, S); None for all of its states.
            past_key_values: what earlier tokens left, and these will: an `EvolvedTransformerCache`, with an encoder
                in an `EncoderDecoderCache`. None for no cache, as always with gradient checkpointing.
        """
        has_encoder, cache = encoder_states is not None, past_key_values
        own_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        wide_cross_attentions = cross_attentions = None

        rows = self.wide_attention_norm(hidden_states)
        output, wide_attentions = self._attend_to_past(self.wide_self_attention, 2 * self.index, rows, mask, own_cache)
        hidden_states = hidden_states + self.dropout(output)
        if has_encoder:
            memory = self._memory(self.wide_cross_attention, 2 * self.index, encoder_states, cache)
            output, wide_cross_attentions = self.wide_cross_attention(rows, memory, cross_mask)
            hidden_states = hidden_states + self.dropout(output)

        output = self._branches(self.branch_norm(hidden_states), row_mask, own_cache)
        hidden_states = hidden_states + self.dropout(output)

        rows, slot = self.self_attention_norm(hidden_states), 2 * self.index + 1
        output, attentions = self._attend_to_past(self.self_attention, slot, rows, mask, own_cache)
        hidden_states = hidden_states + self.dropout(output)
        if has_encoder:
            memory = self._memory(self.cross_attention, slot, encoder_states, cache)
            rows = self.cross_attention_norm(hidden_states)
            output, cross_attentions = self.cross_attention(rows, memory, cross_mask)
            hidden_states = hidden_states + self.dropout(output)

        hidden_states = hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))
        return DecoderBlockOutput(hidden_states, wide_attentions, attentions, wide_cross_attentions, cross_attentions)

    @staticmethod
    def _attend_to_past(
        attention: EvolvedTransformerAttention, slot: int, rows: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of the rows (B, L, D) and those in the cache, which gets their keys."""
        keys = attention.project_keys(rows)
        if cache is not None:
            keys = cache.update(*keys, slot)
        return attention(rows, keys, mask)

    @staticmethod
    def _memory(
        attention: EvolvedTransformerAttention, slot: int, encoder_states: Tensor, cache: EncoderDecoderCache | None
    ) -> Keys:
        """Keys and values (B, H, S, K) of the encoder's states (B, S, D): computed once for all tokens.

        Raises:
            ValueError: the cache was begun with a source of another length.
        """
        if cache is None:
            return attention.project_keys(encoder_states)
        held = cache.cross_attention_cache
        if cache.is_updated.get(slot):
            keys, values = held.layers[slot].keys, held.layers[slot].values
            if keys.shape[2] != encoder_states.shape[1]:
                raise ValueError(
                    f"past_key_values holds keys of {keys.shape[2]} encoder positions, but the encoder's states have "
                    f"{encoder_states.shape[1]}; pass a new cache for another source."
                )
            return keys, values
        memory = held.update(*attention.project_keys(encoder_states), slot)
        cache.is_updated[slot] = True
        return memory

    def _branches(self, rows: Tensor, row_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """The branches of the rows (B, L, D), which look back on those that the cache kept."""
        state = None if cache is None else cache.convolution_state(self.index)
        output, rows_seen = self.branches(rows, row_mask, state)
        if cache is not None:
            cache.update_convolution_state(self.index, rows_seen)
        return output


__all__ = [
    "DecoderBlockOutput",
    "EncoderBlockOutput",
    "EvolvedTransformerAttention",
    "EvolvedTransformerDecoderBlock",
    "EvolvedTransformerEncoderBlock",
    "RowConvolution",
    "bidirectional_mask",
    "eager_attention_forward",
]
