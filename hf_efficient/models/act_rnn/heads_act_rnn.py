"""Heads of recurrent networks: language model, classifiers of sequences and of tokens.

Letters in shape notes: B batch, L tokens, V vocab_size, D hidden_size, C num_labels, K num_label_groups.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .cache_act_rnn import ActRnnCache
from .configuration_act_rnn import ActRnnConfig
from .inputs_act_rnn import check_labels
from .modeling_act_rnn import ActRnnModel, ActRnnModelOutput, ActRnnPreTrainedModel, mean_ponder_loss


@dataclass
class ActRnnHeadOutput(ModelOutput):
    """Output of every head.

    Args:
        loss: scalar, `task_loss + config.ponder_cost * ponder_loss`.
        logits: (B, L, V) of the language model, (B, C) of the sequence classifier, (B, L, C) or (B, L, K, C) of the
            token classifier. Computed from the mean-field state, which is the mean over the inner steps' logits.
        task_loss: scalar, the loss without what pondering costs; in nats per label.
        losses: of each label, in nats, 0 where ignored: (B, L) or (B, L, K), but (B, L - 1) where the language model
            has shifted `labels`.
        ponder_loss: scalar, the mean of N(t) + R(t) over all tokens; where there is a task loss.
        past_key_values, hidden_states, ponder_times, remainders, halting_probabilities: see `ActRnnModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    task_loss: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None
    past_key_values: ActRnnCache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    ponder_times: torch.FloatTensor | None = None
    remainders: torch.FloatTensor | None = None
    halting_probabilities: torch.FloatTensor | None = None
    ponder_loss: torch.FloatTensor | None = None


class ActRnnHeadModel(ActRnnPreTrainedModel):
    """A body and what all heads do with its output."""

    def __init__(self, config: ActRnnConfig):
        super().__init__(config)
        self.model = ActRnnModel(config)

    def _head_output(
        self,
        outputs: ActRnnModelOutput,
        logits: Tensor,
        task_loss: Tensor | None = None,
        losses: Tensor | None = None,
        share: Tensor | float = 1.0,
    ) -> ActRnnHeadOutput:
        """The body's statistics and the whole loss; `share` is this batch's part of all that the loss is a mean of."""
        loss, ponder_loss = task_loss, None
        if task_loss is not None and outputs.ponder_times is not None:
            ponder_loss = mean_ponder_loss(outputs.ponder_times, outputs.remainders)
            loss = task_loss + self.config.ponder_cost * share * ponder_loss
        of_body = ("past_key_values", "hidden_states", "ponder_times", "remainders", "halting_probabilities")
        return ActRnnHeadOutput(
            loss=loss,
            logits=logits,
            task_loss=task_loss,
            losses=losses,
            ponder_loss=ponder_loss,
            **{name: getattr(outputs, name) for name in of_body},
        )


class ActRnnForCausalLM(ActRnnHeadModel, GenerationMixin):
    """Language model: the body and a linear layer that may share the embedding's table.

    Architecture: Graves 2016, arXiv 1603.08983.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ActRnnConfig):
        if config.vocab_size is None:
            raise ValueError("vocab_size=None reads vectors only, but a language model has a vocabulary; set it.")
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: ActRnnCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ActRnnHeadOutput:
        """Predict the next token of every position; arguments of `ActRnnModel.forward` and these.

        Args:
            labels: (B, L) ids, shifted by one in here; -100 is ignored.
            shift_labels: (B, L), already shifted; used instead of `labels` when both are given. (Among the keywords,
                because the Trainer would demand every named argument with "label" in it from each data set.)
            logits_to_keep: compute logits for the last so many positions, or for these indices; 0 means all. A loss
                is computed from all of them.
            num_items_in_batch: predicted tokens of the whole (accumulated) batch, by which the summed loss is
                divided; of the ponder loss this batch adds its share of them.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        tokens = inputs_embeds if input_ids is None else input_ids
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and tokens is not None:
                # Before the body runs, because that changes the cache.
                check_labels(name, given, tokens.shape[:2], self.config.vocab_size)
        if shift_labels is None and labels is not None:
            shift_labels = labels[:, 1:]
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if shift_labels is None:
            return self._head_output(
                outputs, self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
            )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = label_losses(logits[:, : shift_labels.shape[1]], shift_labels, num_items_in_batch)
        return self._head_output(outputs, slice_logits_to_keep(logits, logits_to_keep), *loss)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.FloatTensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but a generated token is never a pad, and the state knows those of the prompt."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        cache = inputs.get("past_key_values")
        # A prompt read in chunks comes without `next_sequence_length`, before transformers 5.23 not even as the first.
        is_prompt = kwargs.get("is_first_iteration") or "next_sequence_length" not in kwargs
        if cache is not None and cache.get_seq_length() > 0 and not is_prompt:
            inputs.pop("attention_mask", None)
        return inputs

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let `generate` use an `ActRnnCache`; every other kind is one of keys and values."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={implementation!r} holds keys and values, which a recurrent network has not; "
                "leave it out."
            )
        if generation_config.use_cache is False:
            return
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.create_cache()
        else:
            model_kwargs["past_key_values"]._is_user_defined = True


# The Trainer asks this table of names whether labels are shifted in the model, for label smoothing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ActRnnConfig.model_type] = ActRnnForCausalLM.__name__


class ActRnnForSequenceClassification(ActRnnHeadModel):
    """The body and a linear layer on what it puts out at the last token, or on the mean over the tokens.

    Architecture: Graves 2016, arXiv 1603.08983.
    """

    # Loss per row; transformers' Trainer then averages over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: ActRnnConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: ActRnnCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ActRnnHeadOutput:
        """Classify each row; tokens are those of the mask, else those that are no `pad_token_id`.

        Args:
            labels: (B,) class ids, (B,) or (B, C) numbers for regression, (B, C) of 0 and 1 for several classes a
                row; `config.problem_type` says which.
            kwargs: more arguments of `ActRnnModel`; the others are described there.

        Raises:
            ValueError: several rows of ids, and neither a mask nor `pad_token_id` to find their ends with.
        """
        if attention_mask is None:
            attention_mask = self._token_mask(input_ids)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(_pool(outputs.last_hidden_state, attention_mask, self.config.pooling))
        loss = None
        if labels is not None:
            # A copy, because the loss function writes the problem type that it guesses into it.
            config = copy.copy(self.config)
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=config)
        return self._head_output(outputs, logits, loss)

    def _token_mask(self, input_ids: Tensor | None) -> Tensor | None:
        """(B, L) bool, False at `pad_token_id`; None where every position is a token."""
        if input_ids is None:
            return None
        if self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        if len(input_ids) > 1:
            raise ValueError(
                f"Cannot tell where the {len(input_ids)} rows end; pass an attention_mask, or set config.pad_token_id."
            )
        return None


class ActRnnForTokenClassification(ActRnnHeadModel):
    """The body (Graves 2016, arXiv 1603.08983) and a linear layer on every token, which gives it one label or several.

    Several labels at once are what Graves' addition asks for: each step answers with six digits.
    """

    def __init__(self, config: ActRnnConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels * config.num_label_groups)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: ActRnnCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ActRnnHeadOutput:
        """Classify each token.

        Args:
            labels: (B, L) class ids, with several groups (B, L, K); -100 is ignored.
            num_items_in_batch: what the sum of the losses is divided by, instead of the number of labels; of the
                ponder loss this batch adds its share of them.
            kwargs: more arguments of `ActRnnModel`; the others are described there.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        if self.config.num_label_groups > 1:
            logits = logits.unflatten(-1, (self.config.num_label_groups, self.config.num_labels))
        if labels is None:
            return self._head_output(outputs, logits)
        check_labels("labels", labels, logits.shape[:-1], self.config.num_labels)
        return self._head_output(outputs, logits, *label_losses(logits, labels, num_items_in_batch))


def label_losses(
    logits: Tensor, labels: Tensor, num_items: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Sum of the losses over `num_items`, default the number of labels; the losses (...); this batch's share of items.

    logits: (..., C). labels: (...), -100 is ignored. The sum is 0 where there is no label at all.
    """
    labels = labels.to(logits.device)
    exact = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.flatten(0, -2).to(exact), labels.flatten(), reduction="none").view(labels.shape)
    count = (labels != -100).sum().to(losses.dtype)
    if num_items is None:
        return losses.sum() / count.clamp(min=1), losses, 1.0
    if isinstance(num_items, Tensor):
        num_items = num_items.to(losses.device)
    return losses.sum() / num_items, losses, count / num_items


def _pool(states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, L, D) and the mask, of which the last L columns count, to (B, D): the last token's or the tokens' mean."""
    if attention_mask is None:
        return states.mean(dim=1) if pooling == "mean" else states[:, -1]
    is_token = attention_mask[:, -states.shape[1] :].to(states.device) != 0
    if pooling == "mean":
        return (states * is_token[..., None]).sum(dim=1) / is_token.sum(dim=1, keepdim=True).clamp(min=1)
    last = (is_token * torch.arange(states.shape[1], device=states.device)).argmax(dim=1)
    return states[torch.arange(states.shape[0], device=states.device), last]


__all__ = [
    "ActRnnForCausalLM",
    "ActRnnForSequenceClassification",
    "ActRnnForTokenClassification",
    "ActRnnHeadOutput",
]
