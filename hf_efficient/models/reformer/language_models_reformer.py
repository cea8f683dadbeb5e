"""Reformer language models: causal and masked (Kitaev et al. 2020, arXiv 2001.04451).

Letters in shape notes: B batch, H heads, T tokens, D hidden_size, R hash rounds, V vocab_size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .cache_reformer import ReformerCache
from .chunked import chunked_apply, chunked_cross_entropy
from .configuration_reformer import ReformerConfig
from .generation_reformer import ReformerGenerationMixin
from .inputs_reformer import check_labels
from .modeling_reformer import ReformerModel, ReformerModelOutput, ReformerPreTrainedModel


@dataclass
class ReformerLMOutput(ModelOutput):
    """Output of `ReformerForCausalLM` and `ReformerForMaskedLM`.

    Args:
        loss: scalar, mean negative log-likelihood in nats per predicted token.
        losses: per token, 0 where ignored: (B, T), but (B, T - 1) where labels were shifted in the model.
        logits: (B, T, V); None in training with labels, where only pieces of them are ever held.
        past_key_values, hidden_states, attentions, buckets, attention_recall: see `ReformerModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: ReformerCache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    buckets: tuple[torch.LongTensor | None, ...] | None = None
    attention_recall: tuple[torch.FloatTensor | None, ...] | None = None


class ReformerLMHead(nn.Module):
    """From both streams to logits, or to losses without ever holding all logits."""

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.chunk_size = config.chunk_size_lm_head
        self.decoder = nn.Linear(2 * config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, T, 2 D) to logits (B, T, V); with labels (B, T) to losses (B, T), float32, 0 where -100."""
        if labels is None:
            return chunked_apply(self._logits, hidden_states, self.chunk_size)
        return chunked_cross_entropy(hidden_states, labels, self._logits, self.chunk_size, self.bias.shape[0])

    def _logits(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(hidden_states) + self.bias


class ReformerLMPreTrainedModel(ReformerPreTrainedModel):
    """A body and a head over the vocabulary."""

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.reformer = ReformerModel(config)
        self.lm_head = ReformerLMHead(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in the body, and the head's bias 0."""
        super()._init_weights(module)
        if isinstance(module, ReformerLMHead):
            init.zeros_(module.bias)

    def get_output_embeddings(self) -> nn.Linear:
        """The head's matrix; its bias is `lm_head.bias`."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head's matrix, and fit the bias to it: new entries are 0."""
        self.lm_head.decoder = new_embeddings
        old, vocab_size = self.lm_head.bias, new_embeddings.weight.shape[0]
        if vocab_size != old.shape[0]:
            bias = old.new_zeros(vocab_size)
            num_kept = min(vocab_size, old.shape[0])
            bias[:num_kept] = old.detach()[:num_kept]
            self.lm_head.bias = nn.Parameter(bias, requires_grad=old.requires_grad)

    def _check_labels(self, tokens: Tensor | None, **labels: Tensor | None) -> None:
        for name, given in labels.items():
            if given is not None and given.is_floating_point():
                raise ValueError(f"{name} is {given.dtype}, but must hold ids, -100 where there is none.")
            if given is not None and tokens is not None:
                # Before the body runs, because that adds to the cache.
                check_labels(name, given, tokens.shape[:2], self.config.vocab_size)

    def _lm_output(
        self,
        outputs: ReformerModelOutput,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> ReformerLMOutput:
        """Logits, or in training with labels the loss alone; entry t of `labels` belongs to position t."""
        hidden_states = outputs.last_hidden_state
        logits = losses = None
        if labels is None or not self.training:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        if labels is not None:
            labels = labels.to(hidden_states.device, torch.int64)
            is_whole = logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
            if is_whole:
                losses = _losses(logits[:, : labels.shape[1]], labels)
            else:
                losses = self.lm_head(hidden_states[:, : labels.shape[1]], labels)
        return ReformerLMOutput(
            loss=None if losses is None else _mean_loss(losses, labels, num_items_in_batch),
            losses=losses,
            logits=logits,
            **{name: outputs[name] for name in outputs if name != "last_hidden_state"},
        )


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihoods (B, T), at least float32, 0 where the label is -100."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(exact), labels.flatten(), reduction="none").view(labels.shape)


# Copied from hf_efficient/models/transformer_xl/language_models_transformer_xl.py::_mean_loss
def _mean_loss(losses: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Sum of the losses over the number of predicted tokens; 0 when there are none."""
    if num_items is None:
        num_items = (labels != -100).sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(losses.device)
    return losses.sum() / num_items


class ReformerForCausalLM(ReformerLMPreTrainedModel, ReformerGenerationMixin):
    """Language model; needs `is_decoder=True`. `ReformerModelWithLMHead` is its name in transformers.

    Architecture: Kitaev et al. 2020, arXiv 2001.04451.
    """

    def __init__(self, config: ReformerConfig):
        if not config.is_decoder:
            raise ValueError(
                "ReformerForCausalLM predicts later tokens from earlier ones, but is_decoder=False lets a token see "
                "both; set is_decoder=True, or use ReformerForMaskedLM."
            )
        for kind in ("local", "lsh"):
            num_after = getattr(config, f"{kind}_num_chunks_after")
            if kind in config.attn_layers and num_after:
                raise ValueError(
                    f"{kind}_num_chunks_after={num_after}, but a causal model sees nothing of later chunks; set it "
                    "to 0."
                )
        super().__init__(config)
        self.post_init()

    def create_cache(self, attn_layers: list[str] | None = None) -> ReformerCache:
        """An empty cache for this model, or for calls with other layer types."""
        return self.reformer.create_cache(attn_layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_key_values: ReformerCache | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_hashes: int | None = None,
        attn_layers: list[str] | None = None,
        **kwargs: Any,
    ) -> ReformerLMOutput:
        """Predict the next token of every position; arguments of `ReformerModel.forward` and these.

        Args:
            labels: (B, T) ids, shifted by one in here; -100 is ignored.
            shift_labels: (B, T), already shifted: entry t is token t + 1. Used instead of `labels` when both are
                given. (Among the keywords, because the Trainer would demand every named argument with "label" in it
                from each data set.)
            logits_to_keep: compute logits for the last so many positions, or for these indices; 0 means all.
            num_items_in_batch: predicted tokens of the whole (accumulated) batch, by which the summed loss is divided.

        Returns:
            `ReformerLMOutput`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        tokens = inputs_embeds if input_ids is None else input_ids
        self._check_labels(tokens, labels=labels, shift_labels=shift_labels)
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            num_hashes=num_hashes,
            attn_layers=attn_layers,
            **kwargs,
        )
        if shift_labels is None and labels is not None:
            shift_labels = labels[:, 1:]
        return self._lm_output(outputs, shift_labels, logits_to_keep, num_items_in_batch)


# The Trainer asks this table of names whether labels are shifted in the model, for label smoothing. Under a key of its
# own, because transformers looks for the class of its own `reformer` key in its own module.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["efficient_reformer"] = ReformerForCausalLM.__name__


class ReformerForMaskedLM(ReformerLMPreTrainedModel):
    """Fills in masked tokens; needs `is_decoder=False` (Kitaev et al. 2020, arXiv 2001.04451)."""

    def __init__(self, config: ReformerConfig):
        if config.is_decoder:
            raise ValueError(
                "ReformerForMaskedLM looks at tokens on both sides, but is_decoder=True hides later ones; set "
                "is_decoder=False, or use ReformerForCausalLM."
            )
        super().__init__(config)
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
        num_hashes: int | None = None,
        attn_layers: list[str] | None = None,
        **kwargs: Any,
    ) -> ReformerLMOutput:
        """Predict the token of every position; arguments of `ReformerModel.forward` and these.

        Args:
            labels: (B, T) ids, -100 is ignored.
            num_items_in_batch: predicted tokens of the whole (accumulated) batch, by which the summed loss is divided.

        Returns:
            `ReformerLMOutput`.
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        self._check_labels(tokens, labels=labels)
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_hashes=num_hashes,
            attn_layers=attn_layers,
            **kwargs,
        )
        return self._lm_output(outputs, labels, 0, num_items_in_batch)


# The name in transformers, for checkpoints and code that use it.
ReformerModelWithLMHead = ReformerForCausalLM

__all__ = [
    "ReformerForCausalLM",
    "ReformerForMaskedLM",
    "ReformerLMHead",
    "ReformerLMOutput",
    "ReformerModelWithLMHead",
]
