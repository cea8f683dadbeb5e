"""Evolved Transformer (So et al. 2019, arXiv 1901.11117): the architecture that a search over Transformers found.

Letters in shape notes: B batch, L tokens, S tokens so far or of the source, D hidden_size, V vocab_size.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
)
from transformers.utils import can_return_tuple, logging

from .cache_evolved_transformer import check_cache, new_cache
from .configuration_evolved_transformer import EvolvedTransformerConfig
from .inputs_evolved_transformer import (
    check_encoder_states,
    check_mask,
    check_packed_texts,
    check_positions,
    check_tokens,
    check_whole_mask,
    default_positions,
    is_replica,
    wanted_reports,
)
from .layers_evolved_transformer import (
    DecoderBlockOutput,
    EncoderBlockOutput,
    EvolvedTransformerDecoderBlock,
    EvolvedTransformerEncoderBlock,
    RowConvolution,
    bidirectional_mask,
)

logger = logging.get_logger(__name__)

SINUSOID_BASE = 10000.0

# Settings of a call that go to both stacks as they are.
CALL_SETTINGS = ("output_attentions", "output_hidden_states")


# Copied from hf_efficient/models/universal_transformer/coordinates.py::sinusoid_signal
def sinusoid_signal(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """tensor2tensor's signal: all sines, then all cosines, of wavelengths from 2 pi to 2 pi 10000.

    The paper interleaves the two and counts from 1, which is an equally good model with other weights.

    Args:
        positions: (...), of any number type, from 0.
        width: of the result; an odd one ends in a zero.

    Returns:
        (..., width), computed in float32 at least.
    """
    exact = torch.promote_types(dtype, torch.float32)
    timescales = width // 2
    index = torch.arange(timescales, device=positions.device, dtype=exact)
    frequencies = torch.exp(index * (-math.log(SINUSOID_BASE) / max(timescales - 1, 1)))
    angles = positions.to(exact)[..., None] * frequencies
    signal = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(signal, (0, width % 2)).to(dtype)


class EvolvedTransformerEmbedding(nn.Embedding):
    """Token embeddings, scaled; the pad's may be zero."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.zero_id = config.pad_token_id if config.zero_pad_embedding else None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids (...) to (..., D)."""
        embeds = super().forward(input_ids) * self.scale
        return embeds if self.zero_id is None else embeds * (input_ids != self.zero_id)[..., None]


class InputBias(nn.Module):
    """One learned vector for all inputs of an encoder: the row of tensor2tensor's target space."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return embeds + self.bias


@dataclass
class Tokens:
    """The tokens of a call as the blocks of a stack are told about them.

    embeds: (B, L, D).
    position_ids: (B or 1, L).
    mask: (B, S) bool of all tokens so far, False for pads, or a mask of four dimensions; None for no pads.
    row_mask: (B, L) bool of these tokens; None for no pads.
    """

    embeds: Tensor
    position_ids: Tensor
    mask: Tensor | None
    row_mask: Tensor | None


class EvolvedTransformerStack(nn.Module):
    """What encoder and decoder share: positions, dropout of what enters, LayerNorm of what leaves."""

    def __init__(self, config: EvolvedTransformerConfig, blocks: list[nn.Module]):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def belong_to(self, model: "EvolvedTransformerModel") -> None:
        """Look ids up in this model's table."""
        # In a tuple, so that the model is not registered as a part of its part. The model rather than the table,
        # which others may replace or wrap.
        self._owner = (model,)

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        num_seen: int = 0,
    ) -> Tokens:
        """Check and look up the call's tokens, before which `num_seen` others came."""
        embeds = self._owner[0].embed(input_ids, inputs_embeds)
        if attention_mask is not None and attention_mask.ndim == 4:
            check_whole_mask(attention_mask, embeds.shape[1], num_seen + embeds.shape[1])
            tokens = Tokens(embeds, position_ids, attention_mask, None)
        else:
            mask = check_mask(attention_mask, embeds, num_seen)
            tokens = Tokens(embeds, position_ids, mask, None if mask is None else mask[:, -embeds.shape[1] :])
        if position_ids is None:
            whole = tokens.mask if tokens.row_mask is not None else None
            tokens.position_ids = default_positions(whole, embeds, num_seen)
        else:
            check_positions(position_ids, embeds)
            check_packed_texts(position_ids, tokens.row_mask)
        return tokens

    def _enter(self, tokens: Tokens) -> Tensor:
        """(B, L, D): the embeddings with their positions."""
        states = tokens.embeds
        if self.config.position_signal == "sinusoid":
            states = states + sinusoid_signal(tokens.position_ids, self.config.hidden_size, states.dtype)
        return self.dropout(states)


class EvolvedTransformerEncoder(EvolvedTransformerStack):
    """The encoder: every token sees all others."""

    def __init__(self, config: EvolvedTransformerConfig):
        blocks = [EvolvedTransformerEncoderBlock(config) for _ in range(config.num_encoder_layers)]
        super().__init__(config, blocks)
        self.input_bias = InputBias(config) if config.encoder_input_bias else None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode (B, L) ids; arguments and errors as in `EvolvedTransformerModel.forward`."""
        wanted = wanted_reports(self.config, kwargs)
        tokens = self._read(input_ids, attention_mask, position_ids, inputs_embeds)
        mask = bidirectional_mask(self.config, tokens.embeds, tokens.mask)
        if self.input_bias is not None:
            tokens.embeds = self.input_bias(tokens.embeds)
        states = self._enter(tokens)
        all_states, attentions = [states], []
        for block in self.layers:
            # Some checkpointing returns a plain tuple.
            output = EncoderBlockOutput(*block(states, mask, tokens.row_mask))
            states = output.hidden_states
            all_states.append(states)
            attentions.append(output.attentions)
        all_states[-1] = states = self.final_norm(states)
        return BaseModelOutput(
            last_hidden_state=states,
            hidden_states=tuple(all_states) if "hidden_states" in wanted else None,
            attentions=_weights(attentions) if "attentions" in wanted else None,
        )


class EvolvedTransformerDecoder(EvolvedTransformerStack):
    """The decoder: every token sees itself and those before it, and the encoder's if there is one."""

    def __init__(self, config: EvolvedTransformerConfig):
        blocks = [EvolvedTransformerDecoderBlock(config, index) for index in range(config.num_decoder_layers)]
        super().__init__(config, blocks)
        self.has_cross_attention = config.is_encoder_decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run (B, L) ids after those in the cache; arguments and errors as in `EvolvedTransformerModel.forward`."""
        wanted = wanted_reports(self.config, kwargs)
        cache = self._open_cache(past_key_values, use_cache)
        own_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        num_seen = 0 if own_cache is None else own_cache.get_seq_length()
        tokens = self._read(input_ids, attention_mask, position_ids, inputs_embeds, num_seen)
        mask = create_causal_mask(self.config, tokens.embeds, tokens.mask, own_cache)
        cross_mask = None
        if self.has_cross_attention:
            batch_size = tokens.embeds.shape[0]
            check_encoder_states(encoder_hidden_states, encoder_attention_mask, batch_size, self.config)
            cross_mask = self._cross_mask(tokens.embeds, encoder_attention_mask, encoder_hidden_states)
        states = self._enter(tokens)
        all_states, attentions, cross_attentions = [states], [], []
        for block in self.layers:
            memory = (encoder_hidden_states, cross_mask) if self.has_cross_attention else (None, None)
            output = block(states, mask, tokens.row_mask, *memory, past_key_values=cache)
            # Some checkpointing returns a plain tuple.
            output = DecoderBlockOutput(*output)
            states = output.hidden_states
            all_states.append(states)
            attentions += [output.wide_attentions, output.attentions]
            cross_attentions += [output.wide_cross_attentions, output.cross_attentions]
        all_states[-1] = states = self.final_norm(states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=states,
            past_key_values=cache,
            hidden_states=tuple(all_states) if "hidden_states" in wanted else None,
            attentions=_weights(attentions) if "attentions" in wanted else None,
            cross_attentions=_weights(cross_attentions) if "cross_attentions" in wanted else None,
        )

    def _cross_mask(self, embeds: Tensor, attention_mask: Tensor | None, encoder_states: Tensor) -> Tensor | None:
        """The mask of attention from (B, L, D) to (B, S, D), of one (B, S) or of four dimensions."""
        if attention_mask is not None and attention_mask.ndim == 4:
            check_whole_mask(attention_mask, embeds.shape[1], encoder_states.shape[1])
        else:
            attention_mask = check_mask(attention_mask, encoder_states, num_seen=0)
        return bidirectional_mask(self.config, embeds, attention_mask, encoder_states)

    def _open_cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to read and add to, or None."""
        if is_replica(self, past_key_values, use_cache):
            return None
        is_checkpointing = self.training and self.layers[0].gradient_checkpointing
        if past_key_values is None:
            if use_cache is None:
                # An exported program cannot return one.
                use_cache = self.config.use_cache and not self.training and not torch.compiler.is_exporting()
            if use_cache and is_checkpointing:
                logger.warning_once("use_cache=True is ignored: gradient checkpointing keeps nothing between calls.")
                return None
            return new_cache(self.config) if use_cache else None
        if is_checkpointing:
            raise ValueError(
                "past_key_values was given, but gradient checkpointing would add every token twice; call "
                "model.gradient_checkpointing_disable(), or leave the cache out."
            )
        return check_cache(past_key_values, self.config)


def _weights(attentions: list[Tensor | None]) -> tuple[Tensor, ...] | None:
    """All attention weights that were made; None if there are none."""
    made = tuple(weights for weights in attentions if weights is not None)
    return made or None


class EvolvedTransformerPreTrainedModel(PreTrainedModel):
    """What all Evolved Transformer models share: configuration, initialisation and what they support."""

    config: EvolvedTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EvolvedTransformerEncoderBlock", "EvolvedTransformerDecoderBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: EvolvedTransformerConfig, *args: Any, **kwargs: Any):
        # Settings may have been changed since the configuration was built.
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings, of both stacks if there are two."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.model.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As tensor2tensor: kernels Xavier uniform, table N(0, 1 / D), LayerNorm 1, biases 0."""
        if isinstance(module, (nn.Linear, RowConvolution)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, InputBias):
            init.zeros_(module.bias)


class EvolvedTransformerModel(EvolvedTransformerPreTrainedModel):
    """The body: embeddings, and by the configuration an encoder and a decoder, a decoder, or an encoder.

    Architecture: So et al. 2019, arXiv 1901.11117.
    """

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__(config)
        self.embed_tokens = EvolvedTransformerEmbedding(config)
        self.encoder = None if config.is_decoder else EvolvedTransformerEncoder(config)
        self.decoder = EvolvedTransformerDecoder(config) if config.has_decoder else None
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.belong_to(self)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of both stacks."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the table of both stacks."""
        self.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> EvolvedTransformerEncoder | None:
        """The encoder, which takes ids; None if there is none."""
        return self.encoder

    def get_decoder(self) -> EvolvedTransformerDecoder | None:
        """The decoder, which takes ids; None if there is none."""
        return self.decoder

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The vectors (B, L, D) of `input_ids` (B, L), or `inputs_embeds` (B, L, D) as they are."""
        check_tokens(input_ids, inputs_embeds, self.config)
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | BaseModelOutputWithPastAndCrossAttentions | Seq2SeqModelOutput:
        """Run (B, L) ids, after those in the cache if there is one.

        Args:
            input_ids: (B, L) token ids, of the encoder if there are two stacks.
            attention_mask: 1 for tokens, 0 for pads; (B, L), or with a cache (B, S) for all tokens so far. None means
                no pads. Pads between the tokens of a row are places of zeros to the convolutions; pads before and
                behind them change nothing. One of four dimensions, bool or to be added to scores, is the attention's
                alone: the convolutions then take all places for tokens.
            position_ids: (B or 1, L), rising; default: a token's index among the tokens of its row.
            decoder_input_ids: (B, L) of the decoder if there are two stacks.
            decoder_attention_mask: (B, L), or with a cache (B, S): the decoder's mask.
            encoder_outputs: what the encoder returned for these inputs before.
            past_key_values: an `EvolvedTransformerCache`, added to in place and returned.
            inputs_embeds: (B, L, D) instead of `input_ids`, scaled as `get_input_embeddings()` does.
            decoder_inputs_embeds: (B, L, D) instead of `decoder_input_ids`.
            use_cache: return a cache when none was passed; default `config.use_cache`, in evaluation only.
            output_attentions: among the keywords, return attention probabilities ("eager" attention only).
            output_hidden_states: among the keywords, return the embeddings and every block's result.
            decoder_position_ids: among the keywords, the decoder's if there are two stacks.

        Returns:
            The output of the only stack, or with two stacks `Seq2SeqModelOutput`.

        Raises:
            ValueError: inputs of a wrong shape, ids outside the vocabulary, several texts in a row, a cache that
                cannot hold what the model remembers.
        """
        settings = {name: kwargs.get(name) for name in CALL_SETTINGS}
        # Looked up here: the stacks of a copy that nn.DataParallel makes know the table of the model they came from.
        if self.encoder is not None and encoder_outputs is None:
            embeds = self.embed(input_ids, inputs_embeds)
            encoder_outputs = self.encoder(None, attention_mask, position_ids, embeds, **settings)
        if self.decoder is None:
            return encoder_outputs
        settings |= {"past_key_values": past_key_values, "use_cache": use_cache}
        if self.encoder is None:
            return self.decoder(None, attention_mask, position_ids, self.embed(input_ids, inputs_embeds), **settings)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("Give exactly one of decoder_input_ids and decoder_inputs_embeds, or labels.")
        encoder_outputs = _as_output(encoder_outputs)
        outputs = self.decoder(
            None,
            decoder_attention_mask,
            kwargs.get("decoder_position_ids"),
            self.embed(decoder_input_ids, decoder_inputs_embeds),
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            **settings,
        )
        return _join(encoder_outputs, outputs)


def _as_output(encoder_outputs: BaseModelOutput | dict | tuple) -> BaseModelOutput:
    """What somebody else kept of the encoder's output."""
    if isinstance(encoder_outputs, BaseModelOutput):
        return encoder_outputs
    if isinstance(encoder_outputs, dict):
        names = BaseModelOutput.__dataclass_fields__
        return BaseModelOutput(**{key: encoder_outputs[key] for key in encoder_outputs if key in names})
    return BaseModelOutput(last_hidden_state=encoder_outputs[0])


def _join(encoder: BaseModelOutput, decoder: BaseModelOutputWithPastAndCrossAttentions) -> Seq2SeqModelOutput:
    """The decoder's output, and the encoder's beside it."""
    return Seq2SeqModelOutput(
        last_hidden_state=decoder.last_hidden_state,
        past_key_values=decoder.past_key_values,
        decoder_hidden_states=decoder.hidden_states,
        decoder_attentions=decoder.attentions,
        cross_attentions=decoder.cross_attentions,
        encoder_last_hidden_state=encoder.last_hidden_state,
        encoder_hidden_states=encoder.hidden_states,
        encoder_attentions=encoder.attentions,
    )


def with_stacks(
    config: EvolvedTransformerConfig, is_encoder_decoder: bool = False, is_decoder: bool = False
) -> EvolvedTransformerConfig:
    """The configuration with these stacks: itself if it has them, else a copy."""
    if (config.is_encoder_decoder, config.is_decoder) == (is_encoder_decoder, is_decoder):
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder, config.is_decoder = is_encoder_decoder, is_decoder
    return config


class EvolvedTransformerEncoderModel(EvolvedTransformerModel):
    """The body as an encoder alone, whatever stacks the configuration has.

    Architecture: So et al. 2019, arXiv 1901.11117.
    """

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__(with_stacks(config))


__all__ = [
    "EvolvedTransformerDecoder",
    "EvolvedTransformerEmbedding",
    "EvolvedTransformerEncoder",
    "EvolvedTransformerEncoderModel",
    "EvolvedTransformerModel",
    "EvolvedTransformerPreTrainedModel",
    "with_stacks",
]
