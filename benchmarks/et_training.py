"""Sides of the Evolved Transformer's training: steps on pairs of sentences, ours and transformers' Marian."""

from typing import Any

import torch
from inputs import token_ids
from transformers import MarianConfig, MarianMTModel, PreTrainedModel

from hf_efficient import EvolvedTransformerConfig, EvolvedTransformerForConditionalGeneration


class TrainingStep:
    """Forward, backward and Adam on pairs of sentences, with dropout; the unit is the step.

    Every second source and target ends in pads, a quarter of its length.

    Args:
        model: the configuration in the words of the side's library.
        batch_size: pairs.
        length: tokens of each source and of each target.
    """

    def __init__(self, model: dict[str, Any], batch_size: int, length: int):
        torch.manual_seed(0)
        self.model = self.build(model).train()
        ids = token_ids(batch_size, 2 * length, model["vocab_size"] - 2) + 2
        mask = torch.ones(batch_size, length, dtype=torch.int64)
        mask[1::2, length - length // 4 :] = 0
        self.batch = {
            "input_ids": ids[:, :length] * mask,
            "attention_mask": mask,
            "labels": ids[:, length:].masked_fill(mask == 0, -100),
        }
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)

    def build(self, model: dict[str, Any]) -> PreTrainedModel:
        """A new model."""
        raise NotImplementedError

    def step(self) -> float:
        """One step; the loss before it."""
        loss = self.model(**self.batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def run(self) -> None:
        """One step."""
        self.step()

    def losses(self, steps: int) -> list[float]:
        """Losses of steps, one after another."""
        return [self.step() for _ in range(steps)]

    def count_parameters(self) -> int:
        """All that learn."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def is_padding_ignored(self) -> bool:
        """Whether what stands at the source's pads leaves the loss as it is, without dropout."""
        inputs = self.batch["input_ids"]
        changed = inputs.masked_fill(self.batch["attention_mask"] == 0, 7)
        self.model.eval()
        with torch.no_grad():
            losses = [self.model(**(self.batch | {"input_ids": ids})).loss for ids in (inputs, changed)]
        self.model.train()
        return bool((losses[0] - losses[1]).abs() < 1e-5)


class Evolved(TrainingStep):
    """Ours."""

    def build(self, model: dict[str, Any]) -> PreTrainedModel:
        """A new model."""
        return EvolvedTransformerForConditionalGeneration(EvolvedTransformerConfig(**model))


class Marian(TrainingStep):
    """transformers' encoder-decoder Transformer for translation, with SDPA."""

    def build(self, model: dict[str, Any]) -> PreTrainedModel:
        """A new model."""
        return MarianMTModel(MarianConfig(**model))
