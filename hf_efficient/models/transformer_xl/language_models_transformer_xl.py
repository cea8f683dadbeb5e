"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860) as a language model: loss, softmax, generation.

Letters in shape notes: B batch, H heads, T tokens of the segment, S keys, D hidden_size, V vocab_size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .adaptive_softmax import AdaptiveSoftmax
from .cache_transformer_xl import TransformerXLCache
from .configuration_transformer_xl import TransformerXLConfig
from .inputs_transformer_xl import check_labels
from .modeling_transformer_xl import TransformerXLModel, TransformerXLPreTrainedModel


@dataclass
class TransformerXLCausalLMOutput(ModelOutput):
    """Output of `TransformerXLForCausalLM`.

    Args:
        loss: scalar, mean negative log-likelihood in nats per predicted token.
        losses: per token and in token order, 0 where ignored: (B, T - 1) for `labels`, (B, T) for `shift_labels`.
        logits: (B, T, V); with an adaptive softmax normalised log-probabilities, which in training, beside a loss, are
            not computed: None.
        past_key_values: the memory after this segment.
        hidden_states: on request, the input of every layer and the final states, (B, T, D) each.
        attentions: on request and with `"eager"`, (B, H, T, S) for every layer.
    """

    loss: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: TransformerXLCache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class TransformerXLForCausalLM(TransformerXLPreTrainedModel, GenerationMixin):
    """Language model: the body and a softmax, plain or adaptive, that may share the embedding's tables.

    Architecture: Dai et al. 2019, arXiv 1901.02860.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.model = TransformerXLModel(config)
        if config.is_adaptive:
            self.lm_head = AdaptiveSoftmax(config)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        if config.is_adaptive:
            for name in self.lm_head.tails:
                source = f"model.embed_tokens.tails.{name}.weight"
                self._tied_weights_keys[f"lm_head.tails.{name}.weight"] = source
            # Older files repeat the projections that the softmax takes from the embedding.
            tied = [str(i) for i, is_tied in enumerate(self.lm_head.tied_projections) if is_tied]
            self._keys_to_ignore_on_load_unexpected = [
                *self._keys_to_ignore_on_load_unexpected,
                *(rf"lm_head\.projections\.{i}$" for i in tied),
            ]
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
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TransformerXLCausalLMOutput:
        """Predict the next token of every position; arguments of `TransformerXLModel.forward` and these.

        Args:
            labels: (B, T) ids, shifted by one in here; -100 is ignored.
            shift_labels: (B, T), already shifted: entry t is token t + 1, so that the last one may be the first token
                of the next segment. Used instead of `labels` when both are given. (Among the keywords, because the
                Trainer would demand every named argument with "label" in it from each data set.)
            logits_to_keep: compute logits for the last so many positions, or for these indices; 0 means all. A loss
                does not depend on it; an adaptive softmax then computes no others.
            num_items_in_batch: predicted tokens of the whole (accumulated) batch, by which the summed loss is divided.

        Returns:
            `TransformerXLCausalLMOutput`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        tokens = inputs_embeds if input_ids is None else input_ids
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and tokens is not None:
                # Before the body runs, because that changes the memory.
                check_labels(name, given, tokens.shape[:2], self.config.vocab_size)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = losses = None
        if shift_labels is None and labels is not None:
            shift_labels, scored = labels[:, 1:], hidden_states[:, :-1]
        elif shift_labels is not None:
            scored = hidden_states
        if shift_labels is None or not (self.config.is_adaptive and self.training):
            logits = self._score(slice_logits_to_keep(hidden_states, logits_to_keep))
        if shift_labels is not None:
            is_whole = logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
            losses = self._losses(scored, shift_labels.to(scored.device), logits if is_whole else None)
        return TransformerXLCausalLMOutput(
            loss=None if losses is None else _mean_loss(losses, shift_labels, num_items_in_batch),
            losses=losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _score(self, hidden_states: Tensor, labels: Tensor | None = None) -> Tensor:
        """(..., D) to logits (..., V); with an adaptive softmax and `labels` (tokens,) to losses (tokens,)."""
        if not self.config.is_adaptive:
            return self.lm_head(hidden_states)
        shared = self.model.embed_tokens.project_back(hidden_states, self.lm_head.shared_bins)
        return self.lm_head(hidden_states, shared, labels)

    def _losses(self, hidden_states: Tensor, labels: Tensor, logits: Tensor | None) -> Tensor:
        """Negative log-likelihoods (B, T) of the shifted labels, float32, 0 where ignored; `logits` if at hand."""
        flat_labels = labels.reshape(-1)
        if self.config.is_adaptive and logits is None:
            losses = self._score(hidden_states.flatten(0, 1), flat_labels)
        else:
            logits = self._score(hidden_states) if logits is None else logits[:, : labels.shape[1]]
            exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
            loss = F.nll_loss if self.config.is_adaptive else F.cross_entropy
            losses = loss(logits.flatten(0, 1).to(exact), flat_labels, reduction="none")
        # A copy, because FSDP2 warns of outputs that are views.
        return losses.view(labels.shape).clone()

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.FloatTensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but a generated token is never a pad, and the memory knows those of the prompt."""
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
        """Let `generate` use a `TransformerXLCache`, and refuse what the memory cannot do exactly."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation={implementation!r} is no memory of Transformer-XL; leave it out, or use "
                "'offloaded' to keep the memory on the CPU."
            )
        is_rolled_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        if is_rolled_back:
            self._check_rollback(max_cache_length)
        if self.config.mem_len == 0:
            # Without a memory every step needs the whole prefix again. (This is `generate`'s own copy.)
            generation_config.use_cache = False
        if generation_config.use_cache is False:
            return
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = TransformerXLCache(self.config, offloading=implementation == "offloaded")
            model_kwargs["past_key_values"] = cache
        else:
            cache._is_user_defined = True
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def _check_rollback(self, max_length: int) -> None:
        config = self.config
        fits = config.memory_init == "empty" and max_length <= config.mem_len
        if not fits and not config.same_length:
            raise ValueError(
                f"Assisted decoding up to length {max_length} is not exact with mem_len={config.mem_len}, "
                f"memory_init={config.memory_init!r} and same_length=False: a token checked together with others sees "
                "more memory than one decoded alone. Set config.same_length=True, or a larger config.mem_len."
            )


# The Trainer asks this table of names whether labels are shifted in the model, for label smoothing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TransformerXLConfig.model_type] = TransformerXLForCausalLM.__name__


def _mean_loss(losses: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Sum of the losses over the number of predicted tokens; 0 when there are none."""
    if num_items is None:
        num_items = (labels != -100).sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(losses.device)
    return losses.sum() / num_items


__all__ = ["TransformerXLCausalLMOutput", "TransformerXLForCausalLM"]
