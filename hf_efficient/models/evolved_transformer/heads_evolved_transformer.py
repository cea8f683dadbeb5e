"""Evolved Transformer head that classifies sequences.

It reads the states of one stack: the encoder's, or a causal one's with `is_decoder=True`.

Letters in shape notes: B batch, L tokens, D hidden_size.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_evolved_transformer import EvolvedTransformerConfig
from .modeling_evolved_transformer import (
    EvolvedTransformerModel,
    EvolvedTransformerPreTrainedModel,
    with_stacks,
)


class EvolvedTransformerForSequenceClassification(EvolvedTransformerPreTrainedModel):
    """A body of one stack, where the configuration has two the encoder, and a linear layer on one vector per row.

    Architecture: So et al. 2019, arXiv 1901.11117. `config.pooling` says which vector: the mean of a row's tokens, the
    first one's or the last one's.
    """

    # Loss per row; transformers' Trainer then averages over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: EvolvedTransformerConfig):
        super().__init__(with_stacks(config, is_decoder=config.is_decoder))
        self.num_labels = config.num_labels
        self.model = EvolvedTransformerModel(self.config)
        is_given = config.classifier_dropout is not None
        self.dropout = nn.Dropout(config.classifier_dropout if is_given else config.dropout)
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
    ) -> SequenceClassifierOutput:
        """Classify each row; pads are not looked at.

        Args:
            labels: (B,) class ids, (B,) or (B, num_labels) numbers for regression, (B, num_labels) of 0 and 1 for
                several classes a row; `config.problem_type` says which.
            kwargs: more arguments of `EvolvedTransformerModel`; the others are described there.
        """
        # Read by names, and never continued.
        kwargs |= {"return_dict": True, "use_cache": False}
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        pooled = pool(outputs.last_hidden_state, attention_mask, self.config.pooling)
        logits, loss = self.classifier(self.dropout(pooled)), None
        if labels is not None:
            # A copy, because the loss function writes the problem type that it guesses into it.
            config = copy.copy(self.config)
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=config)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


# Copied from hf_efficient/models/universal_transformer/heads_universal_transformer.py::pool
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


__all__ = ["EvolvedTransformerForSequenceClassification", "pool"]
