"""Language models of the Evolved Transformer: a decoder alone, and encoder-decoder.

Letters in shape notes: B batch, L tokens of the call, T target tokens, D hidden_size, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .configuration_evolved_transformer import EvolvedTransformerConfig
from .generation_evolved_transformer import EvolvedTransformerGenerationMixin
from .inputs_evolved_transformer import check_labels
from .losses_evolved_transformer import IGNORED, count_labels, mean_loss, token_losses
from .modeling_evolved_transformer import (
    EvolvedTransformerEncoder,
    EvolvedTransformerModel,
    EvolvedTransformerPreTrainedModel,
    with_stacks,
)
from .outputs_evolved_transformer import EvolvedTransformerCausalLMOutput, EvolvedTransformerSeq2SeqLMOutput


class EvolvedTransformerLanguageModel(EvolvedTransformerPreTrainedModel):
    """A body and a linear layer over the vocabulary, which may be the embeddings' table."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__(config)
        self.model = EvolvedTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def _predict(
        self,
        states: Tensor,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """The output's logits, and with labels its fields about the loss.

        Args:
            states: (B, L, D).
            labels: (B, L), or (B, L - 1) where the last position has none; -100 is ignored.
            logits_to_keep, num_items_in_batch: see `forward`.
        """
        if labels is None:
            return {"logits": self.lm_head(slice_logits_to_keep(states, logits_to_keep))}
        logits = self.lm_head(states)
        predicted = logits if labels.shape[1] == logits.shape[1] else logits[:, : labels.shape[1]]
        losses = token_losses(predicted, labels, self.config.label_smoothing if self.training else 0.0)
        num_items = count_labels(labels) if num_items_in_batch is None else num_items_in_batch
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            logits = slice_logits_to_keep(logits, logits_to_keep)
        return {"logits": logits, "loss": mean_loss(losses, num_items), "losses": losses}


class EvolvedTransformerForCausalLM(
    EvolvedTransformerGenerationMixin, EvolvedTransformerLanguageModel, GenerationMixin
):
    """Language model: a decoder alone, whatever stacks the configuration has.

    Architecture: So et al. 2019, arXiv 1901.11117.
    """

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__(with_stacks(config, is_decoder=True))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> EvolvedTransformerCausalLMOutput:
        """Predict the next token of every position; arguments of `EvolvedTransformerModel.forward` and these.

        Args:
            labels: (B, L) ids, shifted by one in here; -100 is ignored.
            shift_labels: (B, L), already shifted: entry t is token t + 1. Used instead of `labels` when both are
                given. (Among the keywords, because the Trainer would demand every named argument with "label" in it
                from each data set.)
            logits_to_keep: return logits for the last so many positions, or for these indices; 0 means all.
            num_items_in_batch: predicted tokens of the whole (accumulated) batch, by which the summed loss is divided.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        tokens = inputs_embeds if input_ids is None else input_ids
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and tokens is not None:
                check_labels(name, given, tokens.shape[:2], self.config.vocab_size)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if shift_labels is None and labels is not None:
            shift_labels = labels[:, 1:]
        return EvolvedTransformerCausalLMOutput(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **self._predict(outputs.last_hidden_state, shift_labels, logits_to_keep, num_items_in_batch),
        )


# The Trainer asks this table of names whether labels are shifted in the model, for label smoothing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[EvolvedTransformerConfig.model_type] = EvolvedTransformerForCausalLM.__name__


# Copied from hf_efficient/models/reformer/encoder_decoder_reformer.py::shift_tokens_right
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


def mask_before_last_label(labels: Tensor) -> Tensor:
    """(B, L), 1 up to the last label of a row: the decoder's inputs behind it are pads."""
    return (labels != IGNORED).flip(1).cummax(dim=1).values.flip(1).long()


class EvolvedTransformerForConditionalGeneration(
    EvolvedTransformerGenerationMixin, EvolvedTransformerLanguageModel, GenerationMixin
):
    """Encoder, decoder and a linear layer over the vocabulary (So et al. 2019, arXiv 1901.11117)."""

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__(with_stacks(config, is_encoder_decoder=True))
        # By its name transformers would take this for a model that shifts labels itself.
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> EvolvedTransformerEncoder:
        """The encoder, which takes ids."""
        return self.model.get_encoder()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Decoder inputs (B, L) for labels (B, L); transformers' collators call this."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> EvolvedTransformerSeq2SeqLMOutput:
        """Logits of every target token's successor; arguments of `EvolvedTransformerModel.forward` and these.

        Args:
            labels: (B, L) target tokens, -100 is ignored; without `decoder_input_ids` these are made from the labels,
                and so is the mask, which ends with a row's last label.
            logits_to_keep: return logits for the last so many positions, or for these indices; 0 means all.
            num_items_in_batch: among the keywords, labels of the whole (accumulated) batch, by which the summed loss
                is divided.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = mask_before_last_label(labels)
        target = decoder_inputs_embeds if decoder_input_ids is None else decoder_input_ids
        if labels is not None and target is not None:
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
        fields = self._predict(outputs.last_hidden_state, labels, logits_to_keep, num_items_in_batch)
        body = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return EvolvedTransformerSeq2SeqLMOutput(**fields, **body)


__all__ = [
    "EvolvedTransformerForCausalLM",
    "EvolvedTransformerForConditionalGeneration",
    "EvolvedTransformerLanguageModel",
]
