"""Encoder-decoder Reformer: the reversible Transformer of the paper's translation experiments (section 5).

Encoder and decoder are reversible. A decoder layer has three half-steps, each of which adds to the stream that the one
before did not: causal self-attention, attention to the encoder's output, feed-forward. Both stacks end in the
LayerNorm of the mean of their two streams, D wide, so that the head can be the embedding's table.

Letters in shape notes: B batch, H heads, S source tokens, T target tokens, K head_dim, D hidden_size, V vocab_size.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from .cache_reformer import ReformerCache
from .chunked import chunked_apply, chunked_cross_entropy
from .configuration_reformer import ReformerConfig
from .full_attention import full_attention
from .generation_reformer import ReformerGenerationMixin
from .inputs_reformer import check_labels, check_mask, check_tokens
from .layers_reformer import (
    ReformerAttention,
    ReformerCall,
    ReformerFeedForward,
    ReformerLayer,
    ReformerLayerNorm,
    ReformerProjection,
    run_layers,
)
from .modeling_reformer import ReformerBody, ReformerEmbeddings, ReformerModelOutput, ReformerPreTrainedModel
from .reversible import ReversibleChain


@dataclass
class ReformerDecoderOutput(ReformerModelOutput):
    """Output of `ReformerDecoder`.

    Args:
        cross_attentions: on request, for every layer (B, H, T, S) probabilities.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


class ReformerCrossAttention(nn.Module):
    """The middle sub-layer of a decoder layer: LayerNorm, full attention to the source, output projection."""

    def __init__(self, config: ReformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width = config.num_attention_heads * config.attention_head_size
        self.layer_norm = ReformerLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query = nn.Linear(config.hidden_size, width, bias=False)
        self.key = nn.Linear(config.hidden_size, width, bias=False)
        self.value = nn.Linear(config.hidden_size, width, bias=False)
        self.output = ReformerProjection(width, config.hidden_size, config.hidden_dropout_prob, bias=False)

    def forward(
        self, hidden_states: Tensor, source: Tensor | None, source_mask: Tensor | None, call: ReformerCall
    ) -> Tensor:
        """(B, T, D) and the encoder's output (B, S, D), which a filled cache replaces, to (B, T, D)."""
        normed = self.layer_norm(hidden_states)
        key, value, source_mask = self._source_keys(source, source_mask, call)
        output, weights = full_attention(
            self._split_heads(self.query(normed)),
            key,
            value,
            is_causal=False,
            attention_mask=source_mask,
            scale=self.config.attention_head_size**-0.5,
            dropout=(self.config.lsh_attention_probs_dropout_prob or 0.0) if self.training else 0.0,
            implementation=call.implementation,
        )
        call.report("cross_attentions", self.layer_idx, weights)
        return self.output(output.transpose(1, 2).flatten(2))

    def _source_keys(
        self, source: Tensor | None, source_mask: Tensor | None, call: ReformerCall
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, H, S, K) and the mask (B, S); computed once for all steps of decoding."""
        stored = None if call.cache is None else call.cache.layers[self.layer_idx]
        if stored is not None and stored.cross_keys is not None:
            return stored.cross_keys, stored.cross_values, stored.cross_mask
        source = source.to(self.key.weight.dtype)
        key, value = self._split_heads(self.key(source)), self._split_heads(self.value(source))
        if stored is not None:
            stored.cross_keys, stored.cross_values, stored.cross_mask = key, value, source_mask
        return key, value, source_mask

    def _split_heads(self, states: Tensor) -> Tensor:
        """(B, S, H K) to (B, H, S, K)."""
        return states.unflatten(-1, (-1, self.config.attention_head_size)).transpose(1, 2)


class ReformerDecoderLayer(GradientCheckpointingLayer):
    """One reversible layer of three half-steps; the streams have changed places after it."""

    def __init__(self, config: ReformerConfig, layer_idx: int, layer_type: str):
        super().__init__()
        self.attention = ReformerAttention(config, layer_idx, layer_type, is_causal=True)
        self.cross_attention = ReformerCrossAttention(config, layer_idx)
        self.feed_forward = ReformerFeedForward(config)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        source: Tensor | None,
        source_mask: Tensor | None,
        call: ReformerCall,
        chain: ReversibleChain,
    ) -> tuple[Tensor, Tensor]:
        """Two streams (B, T, D) and the encoder's output (B, S, D) to two streams."""
        first, second = chain.step(self.attention, first, second, call)
        first, second = chain.step(self.cross_attention, first, second, source, source_mask, call)
        return chain.step(self.feed_forward, first, second)


class ReformerTargetEmbeddings(ReformerEmbeddings):
    """Positions of the target; its words are looked up in the source's table."""

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        del self.word_embeddings


class ReformerStack(ReformerBody):
    """Encoder or decoder: embeddings, reversible layers, and the LayerNorm of the mean of both streams."""

    embeddings: ReformerEmbeddings
    layers: nn.ModuleList
    layer_norm: ReformerLayerNorm

    def _run_layers(self, hidden_states: Tensor, call: ReformerCall, **kwargs: Any) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        extras = self._extras(**kwargs)
        first, second = run_layers(
            self.layers,
            hidden_states,
            call,
            self.config,
            lambda layer, *streams, chain: layer(*streams, *extras, call, chain),
        )
        return self.layer_norm((first + second) / 2)

    def _extras(self, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """What every layer is given beside the streams."""
        return ()


class ReformerSourceEncoder(ReformerStack):
    """The encoder: bidirectional layers. Its word embeddings are those of the decoder too."""

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.embeddings = ReformerEmbeddings(config)
        layer_types = enumerate(config.attn_layers)
        self.layers = nn.ModuleList(ReformerLayer(config, index, kind, is_causal=False) for index, kind in layer_types)
        self.layer_norm = ReformerLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()


class ReformerDecoder(ReformerStack):
    """The decoder: causal layers that also attend to the source. It is given embeddings, having no words of its own.

    `forward` takes `encoder_hidden_states` (B, S, D) and `encoder_attention_mask` (B, S) bool beside what bodies take;
    both may be left out once they are in the cache.
    """

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.embeddings = ReformerTargetEmbeddings(config)
        layer_types = enumerate(config.attn_layers)
        self.layers = nn.ModuleList(ReformerDecoderLayer(config, index, kind) for index, kind in layer_types)
        self.layer_norm = ReformerLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        """None: the words are looked up in the encoder's table."""

    def _extras(
        self,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        return encoder_hidden_states, encoder_attention_mask

    def _wanted(self, *arguments: Any) -> frozenset[str]:
        wanted = super()._wanted(*arguments)
        return wanted | {"cross_attentions"} if "attentions" in wanted else wanted

    def _output(self, hidden_states: Tensor, call: ReformerCall, order: Tensor | None) -> ReformerDecoderOutput:
        """As in every body, with the attention to the source."""
        outputs = super()._output(hidden_states, call, order)
        cross_attentions = call.reported("cross_attentions", len(self.layers))
        if cross_attentions is not None:
            cross_attentions = tuple(_queries_back(weights, call, order) for weights in cross_attentions)
        return ReformerDecoderOutput(**outputs, cross_attentions=cross_attentions)


def _queries_back(weights: Tensor, call: ReformerCall, order: Tensor | None) -> Tensor:
    """(B, H, T, S) with its queries where their tokens were, without those that filled chunks."""
    if weights.shape[2] > call.num_tokens:
        weights = weights[:, :, : call.num_tokens]
    if order is None:
        return weights
    back = order.argsort(dim=1)[:, None, :, None]
    return weights.gather(2, back.expand(-1, weights.shape[1], -1, weights.shape[3]))


def _stack_config(config: ReformerConfig, layer_types: list[str], is_decoder: bool) -> ReformerConfig:
    """The configuration of one of the two stacks, as a body has it."""
    stack = copy.deepcopy(config)
    stack.is_encoder_decoder, stack.decoder_attn_layers, stack.tie_word_embeddings = False, None, False
    stack.is_decoder = is_decoder
    stack.attn_layers, stack.num_hidden_layers = list(layer_types), len(layer_types)
    return stack


class ReformerEncoderDecoderModel(ReformerPreTrainedModel):
    """Encoder and decoder without a head."""

    base_model_prefix = "model"
    _no_split_modules = ["ReformerLayer", "ReformerDecoderLayer"]

    def __init__(self, config: ReformerConfig):
        if not config.is_encoder_decoder:
            raise ValueError(
                "is_encoder_decoder=False, but this model has an encoder and a decoder; set is_encoder_decoder=True "
                "in its configuration."
            )
        super().__init__(config)
        self.encoder = ReformerSourceEncoder(_stack_config(config, config.attn_layers, is_decoder=False))
        self.decoder = ReformerDecoder(_stack_config(config, config.decoder_attn_layers, is_decoder=True))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings of source and target."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings, perhaps by those of another number of words."""
        self.encoder.set_input_embeddings(value)
        for stack in (self.encoder, self.decoder):
            stack.config.vocab_size = value.num_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: ReformerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Encode (B, S) source tokens, unless `encoder_outputs` are given, and run (B, T) target tokens.

        Args:
            input_ids: (B, S) ids of the source.
            attention_mask: (B, S), 1 for the source's tokens, 0 for pads, anywhere.
            decoder_input_ids: (B, T) ids of the target.
            decoder_attention_mask: the same for the target, (B, T) or (B, tokens seen + T).
            encoder_outputs: what the encoder returned for this source before.
            past_key_values: cache of the decoder, which holds the source's keys and values too.
            inputs_embeds, decoder_inputs_embeds: (B, S, D) and (B, T, D) instead of the ids.
            kwargs: `use_cache`, `num_hashes`, `output_hidden_states`, `output_attentions` as in `ReformerModel`;
                `attn_layers` and `decoder_attn_layers`, the layer types of this call.
        """
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("Give exactly one of decoder_input_ids and decoder_inputs_embeds, or labels.")
        shared = {name: kwargs.get(name) for name in ("num_hashes", "output_hidden_states", "output_attentions")}
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                attn_layers=kwargs.get("attn_layers"),
                **shared,
            )
        elif not isinstance(encoder_outputs, dict):
            names = ("last_hidden_state", "hidden_states", "attentions")
            encoder_outputs = BaseModelOutput(**dict(zip(names, encoder_outputs, strict=False)))
        source = encoder_outputs["last_hidden_state"]
        target = check_tokens(decoder_input_ids, decoder_inputs_embeds, self.decoder.config)
        outputs = self.decoder(
            attention_mask=decoder_attention_mask,
            inputs_embeds=target if target.is_floating_point() else self.get_input_embeddings()(target),
            past_key_values=past_key_values,
            use_cache=kwargs.get("use_cache"),
            attn_layers=kwargs.get("decoder_attn_layers"),
            encoder_hidden_states=source,
            encoder_attention_mask=check_mask(attention_mask, source, 0),
            **shared,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=source,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
        )


def shift_tokens_right(labels: Tensor, pad_token_id: int | None, decoder_start_token_id: int | None) -> Tensor:
    """Decoder inputs (B, T) for labels (B, T): the start token, then the labels without the last; -100 becomes a pad.

    Raises:
        ValueError: one of the two ids is None.
    """
    for name, token_id in (("decoder_start_token_id", decoder_start_token_id), ("pad_token_id", pad_token_id)):
        if token_id is None:
            raise ValueError(f"{name}=None, but decoder inputs are made from labels with it; set it in the config.")
    start = labels.new_full((labels.shape[0], 1), decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad_token_id)], dim=1)


class ReformerForConditionalGeneration(ReformerPreTrainedModel, ReformerGenerationMixin):
    """Encoder, decoder and a linear layer over the vocabulary, whose table may be that of the embeddings.

    Architecture: Kitaev et al. 2020, arXiv 2001.04451.
    """

    base_model_prefix = "model"
    _no_split_modules = ["ReformerLayer", "ReformerDecoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.model = ReformerEncoderDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        # By its name transformers would take this for a model that shifts labels itself.
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings of source and target."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def create_cache(self, attn_layers: list[str] | None = None) -> ReformerCache:
        """An empty cache for the decoder, or for calls in which it has other layer types."""
        return self.model.decoder.create_cache(attn_layers)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Decoder inputs (B, T) for labels (B, T); transformers' collators call this."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: ReformerCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits of every target token's successor.

        Args:
            labels: (B, T) target tokens, -100 is ignored; without `decoder_input_ids` these are made from the labels.
            num_items_in_batch: what the sum of the losses is divided by, instead of the number of labels.
            kwargs: see `ReformerEncoderDecoderModel`, also for the other arguments.

        Returns:
            `Seq2SeqLMOutput`; in training with labels without logits, of which only pieces are held then.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if labels is not None:
            target = decoder_inputs_embeds if decoder_input_ids is None else decoder_input_ids
            check_labels("labels", labels, target.shape[:2], self.config.vocab_size)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is None or not self.training:
            logits = chunked_apply(self.lm_head, hidden_states, self.config.chunk_size_lm_head)
        if labels is not None:
            loss = self._loss(hidden_states, logits, labels.to(hidden_states.device), num_items_in_batch)
        rest = {name: outputs[name] for name in outputs if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **rest)

    def _loss(
        self, hidden_states: Tensor, logits: Tensor | None, labels: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        """Sum of the losses over the number of labels, 0 when there are none; from the logits if they are at hand."""
        if logits is None:
            chunk_size, vocab_size = self.config.chunk_size_lm_head, self.lm_head.out_features
            losses = chunked_cross_entropy(hidden_states, labels, self.lm_head, chunk_size, vocab_size)
        else:
            exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
            losses = F.cross_entropy(logits.flatten(0, 1).to(exact), labels.flatten(), reduction="none")
        if num_items is None:
            num_items = (labels != -100).sum().clamp(min=1)
        return losses.sum() / (num_items.to(losses.device) if isinstance(num_items, Tensor) else num_items)

    def _decoding_layers(self, model_kwargs: dict[str, Any]) -> list[str]:
        """Layer types of the decoder in this call of `generate`."""
        return model_kwargs.get("decoder_attn_layers") or self.model.decoder.config.attn_layers


__all__ = [
    "ReformerDecoder",
    "ReformerEncoderDecoderModel",
    "ReformerForConditionalGeneration",
    "ReformerSourceEncoder",
    "shift_tokens_right",
]
