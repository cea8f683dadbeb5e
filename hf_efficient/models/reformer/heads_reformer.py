"""Reformer heads that classify sequences and tokens, and that answer questions.

Letters in shape notes: B batch, T tokens, D hidden_size.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple, logging

from .configuration_reformer import ReformerConfig
from .modeling_reformer import ReformerModel, ReformerModelOutput, ReformerPreTrainedModel

logger = logging.get_logger(__name__)


class ReformerHeadModel(ReformerPreTrainedModel):
    """A body and a head that reads both of its streams."""

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.reformer = ReformerModel(config)

    def _run_body(self, input_ids: Tensor | None, **kwargs: Any) -> ReformerModelOutput:
        """The body's output; what a head reads is never continued, so nothing is kept for that."""
        return self.reformer(input_ids, **(kwargs | {"use_cache": False}))


def _head_dropout(config: ReformerConfig) -> nn.Dropout:
    is_given = config.classifier_dropout is not None
    return nn.Dropout(config.classifier_dropout if is_given else config.hidden_dropout_prob)


class ReformerClassificationHead(nn.Module):
    """Two linear layers with tanh between them, on one vector per row."""

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.dense = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.dropout = _head_dropout(config)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, states: Tensor) -> Tensor:
        """(B, 2 D) to (B, num_labels)."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(states)))))


class ReformerForSequenceClassification(ReformerHeadModel):
    """The body and two layers on the first token of each row, which sees the whole row if `is_decoder` is False.

    Architecture: Kitaev et al. 2020, arXiv 2001.04451.
    """

    # Loss per row; transformers' Trainer then averages over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        if config.is_decoder:
            logger.warning(
                "ReformerForSequenceClassification reads each row's first token, which sees nothing but itself with "
                "is_decoder=True; set is_decoder=False."
            )
        self.classifier = ReformerClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify each row by its first token, the first one of the mask where there is one.

        Args:
            labels: (B,) class ids, (B,) or (B, num_labels) numbers for regression, (B, num_labels) of 0 and 1 for
                several classes a row; `config.problem_type` says which.
            kwargs: more arguments of `ReformerModel`; the others are described there.
        """
        outputs = self._run_body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(_first_states(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            # A copy, because the loss function writes the problem type that it guesses into it.
            config = copy.copy(self.config)
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _first_states(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, 2 D) of each row's first token; of its first pad where there is none."""
    if attention_mask is None:
        return hidden_states[:, 0]
    first = (attention_mask.to(hidden_states.device) != 0).to(torch.uint8).argmax(dim=1)
    return hidden_states[torch.arange(first.shape[0], device=first.device), first]


class ReformerForTokenClassification(ReformerHeadModel):
    """The body (Kitaev et al. 2020, arXiv 2001.04451) and a linear layer on every token."""

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.dropout = _head_dropout(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify each token.

        Args:
            labels: (B, T) class ids, -100 is ignored.
            num_items_in_batch: what the sum of the losses is divided by, instead of the number of labels.
            kwargs: more arguments of `ReformerModel`; the others are described there.
        """
        outputs = self._run_body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ReformerForQuestionAnswering(ReformerHeadModel):
    """The body and a linear layer that scores every token as the first and as the last of an answer.

    Architecture: Kitaev et al. 2020, arXiv 2001.04451.
    """

    # Loss per row, as for sequences.
    accepts_loss_kwargs = False

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels={config.num_labels}, but an answer has a first and a last token; leave num_labels at 2."
            )
        self.qa_outputs = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Score each token as the first and as the last of the answer.

        Args:
            start_positions, end_positions: (B,) or (B, 1) indices in `input_ids`; pads, and what lies beyond the end,
                are ignored.
            kwargs: more arguments of `ReformerModel`; the others are described there.
        """
        outputs = self._run_body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            ends = ((start_logits, start_positions), (end_logits, end_positions))
            loss = sum(_position_loss(logits, positions, attention_mask) for logits, positions in ends) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _position_loss(logits: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean cross-entropy over the rows whose position is one of their tokens; 0 when there are none.

    Pads are no candidates, so that a row counts as it would alone.
    """
    length = logits.shape[1]
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    positions = positions.to(logits.device).view(-1).clamp(0, length)
    if attention_mask is not None:
        is_token = attention_mask.to(logits.device) != 0
        logits = logits.masked_fill(~is_token, torch.finfo(logits.dtype).min)
        is_inside = F.pad(is_token, (0, 1)).gather(1, positions[:, None])[:, 0]
        positions = positions.where(is_inside, length)
    loss = F.cross_entropy(logits, positions, ignore_index=length, reduction="sum")
    return loss / (positions < length).sum().clamp(min=1)


__all__ = ["ReformerForQuestionAnswering", "ReformerForSequenceClassification", "ReformerForTokenClassification"]
