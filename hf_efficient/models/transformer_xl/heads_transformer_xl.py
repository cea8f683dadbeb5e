"""Heads on the body of Transformer-XL (Dai et al. 2019, arXiv 1901.02860): classes of rows and of tokens.

Letters in shape notes: B batch, T tokens of the segment.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils import can_return_tuple

from .cache_transformer_xl import TransformerXLCache
from .configuration_transformer_xl import TransformerXLConfig
from .modeling_transformer_xl import TransformerXLModel, TransformerXLPreTrainedModel


class TransformerXLForSequenceClassification(TransformerXLPreTrainedModel):
    """The body (Dai et al. 2019, arXiv 1901.02860) and a linear layer on the last token of each row."""

    # Loss per row; transformers' Trainer then averages over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransformerXLModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransformerXLCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify each row by its last token: the last one the mask has, else the last that is no `pad_token_id`.

        Args:
            labels: (B,) class ids, (B,) or (B, num_labels) numbers for regression, (B, num_labels) of 0 and 1 for
                several classes a row; `config.problem_type` says which.
            kwargs: more arguments of `TransformerXLModel`; the others are described there.

        Raises:
            ValueError: several rows, and neither a mask nor `pad_token_id` to find their ends with.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = self._last_token(input_ids, attention_mask, outputs.last_hidden_state)
        rows = torch.arange(last.shape[0], device=last.device)
        logits = self.score(outputs.last_hidden_state[rows, last])
        loss = None
        if labels is not None:
            # A copy, because the loss function writes the problem type that it guesses into it.
            config = copy.copy(self.config)
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_token(self, input_ids: Tensor | None, attention_mask: Tensor | None, states: Tensor) -> Tensor:
        """(B,) index of each row's last token within the segment."""
        batch_size, length, _ = states.shape
        if attention_mask is not None:
            is_token = attention_mask[:, -length:].to(states.device) != 0
        elif self.config.pad_token_id is not None and input_ids is not None:
            is_token = input_ids != self.config.pad_token_id
        elif batch_size == 1 or input_ids is None:
            return torch.full((batch_size,), length - 1, device=states.device)
        else:
            raise ValueError(
                f"Cannot tell where the {batch_size} rows end; pass an attention_mask, or set config.pad_token_id."
            )
        return (is_token * torch.arange(length, device=states.device)).argmax(dim=1)


class TransformerXLForTokenClassification(TransformerXLPreTrainedModel):
    """The body (Dai et al. 2019, arXiv 1901.02860) and a linear layer on every token."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransformerXLModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransformerXLCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify each token. `labels` (B, T) holds class ids, -100 is ignored; others as in `TransformerXLModel`."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["TransformerXLForSequenceClassification", "TransformerXLForTokenClassification"]
