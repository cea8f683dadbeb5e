"""Universal Transformer (Dehghani et al. 2019, arXiv 1807.03819): one group of blocks, repeated over depth.

Letters in shape notes: B batch, L tokens, S tokens so far or of the source, D hidden_size, V vocab_size.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.utils import can_return_tuple

from .cache_universal_transformer import new_cache
from .configuration_universal_transformer import UniversalTransformerConfig
from .inputs_universal_transformer import (
    check_encoder_states,
    check_mask,
    check_packed_texts,
    check_positions,
    check_tokens,
    check_whole_mask,
    choose_depth,
    default_positions,
    is_replica,
    random_depth,
    wanted_reports,
)
from .layers_universal_transformer import cross_attention_mask, self_attention_mask
from .outputs_universal_transformer import (
    PonderFields,
    UniversalTransformerOutput,
    UniversalTransformerSeq2SeqOutput,
)
from .recurrence_universal_transformer import HaltingProjection, InputBias, StackCall, UniversalTransformerStack
from .sharded_blocks import agree_on, is_sharded

# Settings of a call that go to both stacks as they are.
CALL_SETTINGS = (
    "num_steps",
    "exit_threshold",
    "min_steps",
    "output_attentions",
    "output_hidden_states",
    "output_step_hidden_states",
)


class UniversalTransformerEmbedding(nn.Embedding):
    """Token embeddings, scaled; the pad's may be zero."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.zero_id = config.pad_token_id if config.zero_pad_embedding else None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids (...) to (..., D)."""
        embeds = super().forward(input_ids) * self.scale
        return embeds if self.zero_id is None else embeds * (input_ids != self.zero_id)[..., None]


class EmbeddedStack(UniversalTransformerStack):
    """A stack that takes ids: it looks them up in the table of the model it belongs to."""

    def belong_to(self, model: "UniversalTransformerModel") -> None:
        """Look ids up in this model's table."""
        # In a tuple, so that the model is not registered as a part of its part. The model rather than the table,
        # which others may replace or wrap.
        self._owner = (model,)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        return self._owner[0].embed(input_ids, inputs_embeds)

    def _make_call(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> StackCall:
        """Masks, positions and settings of a forward pass over `embeds`."""
        config = self.config
        num_steps, threshold, min_steps = choose_depth(
            config, self.training, *(kwargs.get(name) for name in ("num_steps", "exit_threshold", "min_steps"))
        )
        own_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        num_seen = 0 if own_cache is None else own_cache.get_seq_length()
        mask = None
        if attention_mask is not None and attention_mask.ndim == 4:
            # A static cache has room for tokens to come, which its masks cover too.
            num_keys = embeds.shape[1] if own_cache is None else own_cache.get_mask_sizes(embeds.shape[1], 0)[0]
            check_whole_mask(attention_mask, embeds.shape[1], num_keys)
        else:
            attention_mask = mask = check_mask(attention_mask, embeds, num_seen)
        are_default = position_ids is None
        if are_default:
            position_ids = default_positions(mask, embeds, num_seen, config.count_padding)
        check_positions(position_ids, embeds, config, self.training)
        # Positions that start again in a row mean packed texts, but only the caller's do.
        restarts = None if are_default else position_ids
        if not are_default and attention_mask is None:
            check_packed_texts(position_ids, config)
        return StackCall(
            num_steps=num_steps,
            threshold=threshold,
            min_steps=min_steps,
            position_ids=position_ids,
            position_offset=kwargs.get("position_offset"),
            num_gradient_steps=config.backprop_steps if self.training else None,
            tokens=None if mask is None else mask[:, -embeds.shape[1] :],
            mask=self_attention_mask(config, embeds, attention_mask, restarts, own_cache, self.is_causal),
            cache=cache,
            wanted=wanted_reports(config, kwargs),
        )


class UniversalTransformerEncoder(EmbeddedStack):
    """The encoder: every token sees all others."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(config, is_causal=False, has_cross_attention=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> UniversalTransformerOutput:
        """Encode (B, L) ids; arguments and errors as in `UniversalTransformerModel.forward`."""
        embeds = self._embed(input_ids, inputs_embeds)
        return self.run(embeds, self._make_call(embeds, attention_mask, position_ids, None, kwargs))


class UniversalTransformerDecoder(EmbeddedStack):
    """The decoder: every token sees itself and those before it, and the encoder's if there is one."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(config, is_causal=True, has_cross_attention=config.is_encoder_decoder)

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
    ) -> UniversalTransformerOutput:
        """Run (B, L) ids after those in the cache; arguments and errors as in `UniversalTransformerModel.forward`."""
        embeds = self._embed(input_ids, inputs_embeds)
        cache = self._open_cache(past_key_values, use_cache)
        call = self._make_call(embeds, attention_mask, position_ids, cache, kwargs)
        if self.has_cross_attention:
            check_encoder_states(encoder_hidden_states, encoder_attention_mask, embeds.shape[0], self.config)
            call.encoder_states = encoder_hidden_states
            call.cross_mask = self._cross_mask(embeds, encoder_attention_mask, encoder_hidden_states)
        return self.run(embeds, call)

    def _cross_mask(self, embeds: Tensor, attention_mask: Tensor | None, encoder_states: Tensor) -> Tensor | None:
        """The mask of attention from (B, L, D) to (B, S, D), of one (B, S) or of four dimensions."""
        if attention_mask is not None and attention_mask.ndim == 4:
            check_whole_mask(attention_mask, embeds.shape[1], encoder_states.shape[1])
        else:
            attention_mask = check_mask(attention_mask, encoder_states, num_seen=0)
        return cross_attention_mask(self.config, embeds, encoder_states, attention_mask)

    def _open_cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to read and add to, or None."""
        if is_replica(self, past_key_values, use_cache):
            return None
        if past_key_values is None:
            if use_cache is None:
                # An exported program cannot return one.
                use_cache = self.config.use_cache and not self.training and not torch.compiler.is_exporting()
            return new_cache(self.config) if use_cache else None
        if not isinstance(past_key_values, Cache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}, but must be a Cache of transformers, such as "
                "UniversalTransformerCache(config)."
            )
        if self.has_cross_attention and not isinstance(past_key_values, EncoderDecoderCache):
            return EncoderDecoderCache(past_key_values, DynamicCache())
        return past_key_values


class UniversalTransformerPreTrainedModel(PreTrainedModel):
    """What all Universal Transformer models share: configuration, initialisation and what they support."""

    config: UniversalTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Not blocks: a stack asks them for keys beside their forward pass, and asks the same ones in every step.
    _no_split_modules = ["UniversalTransformerEncoder", "UniversalTransformerDecoder"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: UniversalTransformerConfig, *args: Any, **kwargs: Any):
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
        """As tensor2tensor: kernels Xavier uniform, tables N(0, 1 / width), LayerNorm 1, biases 0 but for halting."""
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            init.xavier_uniform_(module.weight)
            if isinstance(module, HaltingProjection):
                init.constant_(module.bias, self.config.halting_bias_init)
            elif module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, InputBias):
            init.zeros_(module.bias)


class UniversalTransformerModel(UniversalTransformerPreTrainedModel):
    """The body: embeddings, and by the configuration an encoder and a decoder, a decoder, or an encoder.

    Architecture: Dehghani et al. 2019, arXiv 1807.03819.
    """

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(config)
        self.embed_tokens = UniversalTransformerEmbedding(config)
        self.encoder = None if config.is_decoder else UniversalTransformerEncoder(config)
        has_decoder = config.is_decoder or config.is_encoder_decoder
        self.decoder = UniversalTransformerDecoder(config) if has_decoder else None
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

    def get_encoder(self, modality: str | None = None) -> UniversalTransformerEncoder | None:
        """The encoder, which takes ids; None if there is none."""
        return self.encoder

    def get_decoder(self) -> UniversalTransformerDecoder | None:
        """The decoder, which takes ids; None if there is none."""
        return self.decoder

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The vectors (B, L, D) of `input_ids` (B, L), or `inputs_embeds` (B, L, D) as they are."""
        check_tokens(input_ids, inputs_embeds, self.config)
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _draw(self, tokens: Tensor | None, num_steps: int | None) -> dict[str, Any]:
        """What is random in training, drawn once for both stacks: where positions begin, and the number of steps."""
        drawn = {}
        if tokens is not None:
            stack = self.encoder if self.decoder is None else self.decoder
            zero = torch.zeros(1, 1, dtype=torch.int64, device=tokens.device)
            drawn["position_offset"] = stack.coordinates.shift(zero, tokens.shape[0])
        if num_steps is None and self.config.random_depth:
            drawn["num_steps"] = random_depth(self.config)
            stack = self.encoder if self.decoder is None else self.decoder
            if is_sharded(stack.group[0]):
                drawn["num_steps"] = agree_on(drawn["num_steps"], self.device)
        return drawn

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: UniversalTransformerOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | None = None,
        **kwargs: Any,
    ) -> UniversalTransformerOutput | UniversalTransformerSeq2SeqOutput:
        """Run (B, L) ids, after those in the cache if there is one.

        Args:
            input_ids: (B, L) token ids, of the encoder if there are two stacks.
            attention_mask: 1 for tokens, 0 for pads, anywhere; (B, L), or with a cache (B, S) for all tokens so far.
                None means no pads.
            position_ids: (B or 1, L); default: a token's index among the tokens of its row. Where they start again
                within a row, without a mask and without a cache, another text begins that sees nothing of the last.
            decoder_input_ids: (B, L) of the decoder if there are two stacks.
            decoder_attention_mask: (B, L), or with a cache (B, S): the decoder's mask.
            encoder_outputs: what the encoder returned for these inputs before.
            past_key_values: keys and values of the tokens before, added to in place and returned.
            inputs_embeds: (B, L, D) instead of `input_ids`, scaled as `get_input_embeddings()` does.
            decoder_inputs_embeds: (B, L, D) instead of `decoder_input_ids`.
            use_cache: return a cache when none was passed; default `config.use_cache`, in evaluation only.
            num_steps: steps of this call, or with halting the limit; default `config.max_steps`.
            exit_threshold: among the keywords, the halting threshold of this call; default `config.halting_threshold`.
            min_steps: among the keywords, steps that every position takes at least; default `config.min_steps`.
            output_attentions: among the keywords, return attention probabilities ("eager" attention only).
            output_hidden_states: among the keywords, return the embeddings and every block's result. Nothing is
                skipped then, nor with `output_attentions`.
            output_step_hidden_states: among the keywords, return the states before the first step and after each.
            decoder_position_ids: among the keywords, the decoder's if there are two stacks.

        Returns:
            The output of the only stack, or with two stacks `UniversalTransformerSeq2SeqOutput`.

        Raises:
            ValueError: inputs of a wrong shape, ids outside the vocabulary, impossible settings of the depth.
        """
        settings = {name: kwargs.get(name) for name in CALL_SETTINGS} | {"num_steps": num_steps}
        if self.training:
            settings |= self._draw(inputs_embeds if input_ids is None else input_ids, num_steps)
        # Looked up here: the stacks of a copy that nn.DataParallel makes know the table of the model they came from.
        if self.encoder is not None and encoder_outputs is None:
            embeds = self.embed(input_ids, inputs_embeds)
            encoder_outputs = self.encoder(None, attention_mask, position_ids, embeds, **settings)
        if self.decoder is None:
            return self._finish(encoder_outputs)
        if self.encoder is None:
            outputs = self.decoder(
                None,
                attention_mask,
                position_ids,
                self.embed(input_ids, inputs_embeds),
                past_key_values=past_key_values,
                use_cache=use_cache,
                **settings,
            )
            return self._finish(outputs)
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
            past_key_values=past_key_values,
            use_cache=use_cache,
            **settings,
        )
        return self._finish(_join(encoder_outputs, outputs))

    def _finish(self, outputs: PonderFields) -> PonderFields:
        return outputs if self.training else outputs.hide_rowless()


def _as_output(encoder_outputs: UniversalTransformerOutput | dict | tuple) -> UniversalTransformerOutput:
    """What somebody else kept of the encoder's output."""
    if isinstance(encoder_outputs, UniversalTransformerOutput):
        return encoder_outputs
    if isinstance(encoder_outputs, dict):
        names = UniversalTransformerOutput.__dataclass_fields__
        return UniversalTransformerOutput(**{key: encoder_outputs[key] for key in encoder_outputs if key in names})
    return UniversalTransformerOutput(last_hidden_state=encoder_outputs[0])


def _join(
    encoder: UniversalTransformerOutput, decoder: UniversalTransformerOutput
) -> UniversalTransformerSeq2SeqOutput:
    """The decoder's output, and the encoder's beside it."""
    ponder_loss = decoder.ponder_loss
    if ponder_loss is not None and encoder.ponder_loss is not None:
        # In generation with beams the encoder's output has been repeated, its scalars too.
        ponder_loss = ponder_loss + encoder.ponder_loss.mean()
    return UniversalTransformerSeq2SeqOutput(
        last_hidden_state=decoder.last_hidden_state,
        past_key_values=decoder.past_key_values,
        decoder_hidden_states=decoder.hidden_states,
        decoder_attentions=decoder.attentions,
        cross_attentions=decoder.cross_attentions,
        encoder_last_hidden_state=encoder.last_hidden_state,
        encoder_hidden_states=encoder.hidden_states,
        encoder_attentions=encoder.attentions,
        ponder_times=decoder.ponder_times,
        remainders=decoder.remainders,
        halting_probabilities=decoder.halting_probabilities,
        ponder_loss=ponder_loss,
        step_hidden_states=decoder.step_hidden_states,
        encoder_ponder_times=encoder.ponder_times,
        encoder_remainders=encoder.remainders,
        encoder_halting_probabilities=encoder.halting_probabilities,
        encoder_step_hidden_states=encoder.step_hidden_states,
    )


def with_stacks(
    config: UniversalTransformerConfig, is_encoder_decoder: bool = False, is_decoder: bool = False
) -> UniversalTransformerConfig:
    """The configuration with these stacks: itself if it has them, else a copy."""
    if (config.is_encoder_decoder, config.is_decoder) == (is_encoder_decoder, is_decoder):
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder, config.is_decoder = is_encoder_decoder, is_decoder
    return config


class UniversalTransformerEncoderModel(UniversalTransformerModel):
    """The body (Dehghani et al. 2019, arXiv 1807.03819) as an encoder alone, whatever stacks the configuration has."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(with_stacks(config))


__all__ = [
    "UniversalTransformerDecoder",
    "UniversalTransformerEmbedding",
    "UniversalTransformerEncoder",
    "UniversalTransformerEncoderModel",
    "UniversalTransformerModel",
    "UniversalTransformerPreTrainedModel",
    "with_stacks",
]
