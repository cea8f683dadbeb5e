"""Universal Transformer heads that fill in masked tokens, classify sequences and tokens, and answer questions.

Each reads the states of one stack: an encoder's, or a causal one's with `is_decoder=True`. The loss is that of the
task plus `ponder_cost` times the ponder loss, as in the language models, and both parts are in the output.

Letters in shape notes: B batch, L tokens, D hidden_size, V vocab_size.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import (
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .configuration_universal_transformer import UniversalTransformerConfig
from .inputs_universal_transformer import check_labels
from .language_models_universal_transformer import UniversalTransformerLanguageModel
from .losses_universal_transformer import combine_losses, count_labels, token_loss
from .modeling_universal_transformer import (
    UniversalTransformerModel,
    UniversalTransformerPreTrainedModel,
    with_stacks,
)
from .outputs_universal_transformer import PonderFields, UniversalTransformerOutput, head_output


@dataclass
class UniversalTransformerMaskedLMOutput(PonderFields, MaskedLMOutput):
    """Output of `UniversalTransformerForMaskedLM`; `loss` is `task_loss` + ponder_cost * `ponder_loss`.

    `losses` (B, L) are the nats of every label, 0 where there is none.
    """

    task_loss: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None


@dataclass
class UniversalTransformerSequenceClassifierOutput(PonderFields, SequenceClassifierOutput):
    """Output of `UniversalTransformerForSequenceClassification`; `loss` as above."""

    task_loss: torch.FloatTensor | None = None


@dataclass
class UniversalTransformerTokenClassifierOutput(PonderFields, TokenClassifierOutput):
    """Output of `UniversalTransformerForTokenClassification`; `loss` as above."""

    task_loss: torch.FloatTensor | None = None


@dataclass
class UniversalTransformerQuestionAnsweringOutput(PonderFields, QuestionAnsweringModelOutput):
    """Output of `UniversalTransformerForQuestionAnswering`; `loss` as above."""

    task_loss: torch.FloatTensor | None = None


class UniversalTransformerForMaskedLM(UniversalTransformerLanguageModel):
    """An encoder and a linear layer over the vocabulary, by default the table of the embeddings.

    Architecture: Dehghani et al. 2019, arXiv 1807.03819.
    """

    def __init__(self, config: UniversalTransformerConfig):
        if config.is_decoder:
            raise ValueError(
                "UniversalTransformerForMaskedLM fills in a token from both sides, but is_decoder=True hides what "
                "comes after it; set is_decoder=False, or use UniversalTransformerForCausalLM."
            )
        super().__init__(with_stacks(config))
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
    ) -> UniversalTransformerMaskedLMOutput:
        """Logits (B, L, V) of each token itself.

        Args:
            labels: (B, L) ids, -100 is ignored.
            num_items_in_batch: what the sum of the losses is divided by, instead of the number of labels.
            kwargs: more arguments of `UniversalTransformerModel`; the others are described there.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **_as_fields(kwargs),
        )
        logits = self.lm_head(outputs.last_hidden_state)
        fields = {}
        if labels is not None:
            check_labels("labels", labels, logits.shape[:2], self.config.vocab_size)
            fields = self._losses(logits, labels, outputs.ponder_loss, num_items_in_batch)
        return head_output(UniversalTransformerMaskedLMOutput, outputs, self.training, logits=logits, **fields)


def _as_fields(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the body, whose output is to be read by names, and is never continued."""
    return kwargs | {"return_dict": True, "use_cache": False}


class UniversalTransformerHeadModel(UniversalTransformerPreTrainedModel):
    """A body of one stack, where the configuration has two the encoder, and a head that reads its states."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(with_stacks(config, is_decoder=config.is_decoder))
        self.num_labels = config.num_labels
        self.model = UniversalTransformerModel(self.config)

    def _run_body(self, input_ids: Tensor | None, **kwargs: Any) -> UniversalTransformerOutput:
        return self.model(input_ids, **_as_fields(kwargs))

    def _losses(
        self,
        task_loss: Tensor,
        outputs: UniversalTransformerOutput,
        num_items: Tensor | int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The output's fields about the loss; see `combine_losses`."""
        loss = combine_losses(task_loss, outputs.ponder_loss, self.config, num_items, num_items_in_batch)
        return {"loss": loss, "task_loss": task_loss}


def _head_dropout(config: UniversalTransformerConfig) -> nn.Dropout:
    is_given = config.classifier_dropout is not None
    return nn.Dropout(config.classifier_dropout if is_given else config.dropout)


class UniversalTransformerForSequenceClassification(UniversalTransformerHeadModel):
    """The body and a linear layer on one vector per row: `config.pooling` says which.

    Architecture: Dehghani et al. 2019, arXiv 1807.03819.

    With `halting_scope="sequence"` a row halts as a whole.
    """

    # Loss per row; transformers' Trainer then averages over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(config)
        self.dropout = _head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> UniversalTransformerSequenceClassifierOutput:
        """Classify each row; pads are not looked at.

        Args:
            labels: (B,) class ids, (B,) or (B, num_labels) numbers for regression, (B, num_labels) of 0 and 1 for
                several classes a row; `config.problem_type` says which.
            kwargs: more arguments of `UniversalTransformerModel`; the others are described there.
        """
        outputs = self._run_body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        pooled = pool(outputs.last_hidden_state, attention_mask, self.config.pooling)
        logits = self.classifier(self.dropout(pooled))
        fields = {}
        if labels is not None:
            # A copy, because the loss function writes the problem type that it guesses into it.
            config = copy.copy(self.config)
            task_loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=config)
            fields = self._losses(task_loss, outputs)
        output_class = UniversalTransformerSequenceClassifierOutput
        return head_output(output_class, outputs, self.training, logits=logits, **fields)


def pool(states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """One vector (B, D) per row of states (B, L, D).

    Args:
        attention_mask: (B, L), 0 for pads; None for no pads.
        pooling: "mean" of the tokens' states, 0 for a row of pads; "first" or "last" token's state, a pad's for a row
            of pads.
    """
    if attention_mask is None:
        return states.mean(dim=1) if pooling == "mean" else states[:, 0 if pooling == "first" else -1]
    is_token = attention_mask.to(states.device) != 0
    if pooling == "mean":
        total = states.masked_fill(~is_token[..., None], 0).sum(dim=1)
        return total / is_token.sum(dim=1, keepdim=True).clamp(min=1)
    index = torch.arange(states.shape[1], device=states.device)
    # The earliest token counts most, or the latest; argmax finds it without looking at the content.
    order = -index if pooling == "first" else index
    place = order.masked_fill(~is_token, -states.shape[1]).argmax(dim=1)
    return states[torch.arange(states.shape[0], device=states.device), place]


class UniversalTransformerForTokenClassification(UniversalTransformerHeadModel):
    """The body (Dehghani et al. 2019, arXiv 1807.03819) and a linear layer on every token."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(config)
        self.dropout = _head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
    ) -> UniversalTransformerTokenClassifierOutput:
        """Classify each token.

        Args:
            labels: (B, L) class ids, -100 is ignored.
            num_items_in_batch: what the sum of the losses is divided by, instead of the number of labels.
            kwargs: more arguments of `UniversalTransformerModel`; the others are described there.
        """
        outputs = self._run_body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        fields = {}
        if labels is not None:
            task_loss = token_loss(logits, labels, num_items_in_batch)
            fields = self._losses(task_loss, outputs, count_labels(labels), num_items_in_batch)
        return head_output(UniversalTransformerTokenClassifierOutput, outputs, self.training, logits=logits, **fields)


class UniversalTransformerForQuestionAnswering(UniversalTransformerHeadModel):
    """The body and a linear layer that scores every token as the first and as the last of an answer.

    Architecture: Dehghani et al. 2019, arXiv 1807.03819.
    """

    # Loss per row, as for sequences.
    accepts_loss_kwargs = False

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels={config.num_labels}, but an answer has a first and a last token; leave num_labels at 2."
            )
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
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
    ) -> UniversalTransformerQuestionAnsweringOutput:
        """Score each token as the first and as the last of the answer.

        Args:
            start_positions, end_positions: (B,) or (B, 1) indices in `input_ids`; pads, and what lies beyond the end,
                are ignored.
            kwargs: more arguments of `UniversalTransformerModel`; the others are described there.
        """
        outputs = self._run_body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        fields = {"start_logits": start_logits.contiguous(), "end_logits": end_logits.contiguous()}
        if start_positions is not None and end_positions is not None:
            ends = ((start_logits, start_positions), (end_logits, end_positions))
            task_loss = sum(_position_loss(logits, positions, attention_mask) for logits, positions in ends) / 2
            fields |= self._losses(task_loss, outputs)
        return head_output(UniversalTransformerQuestionAnsweringOutput, outputs, self.training, **fields)


# Copied from hf_efficient/models/reformer/heads_reformer.py::_position_loss
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


__all__ = [
    "UniversalTransformerForMaskedLM",
    "UniversalTransformerForQuestionAnswering",
    "UniversalTransformerForSequenceClassification",
    "UniversalTransformerForTokenClassification",
    "UniversalTransformerMaskedLMOutput",
    "UniversalTransformerQuestionAnsweringOutput",
    "UniversalTransformerSequenceClassifierOutput",
    "UniversalTransformerTokenClassifierOutput",
    "pool",
]
