"""Sides of legacy TransfoXL; runs under transformers 4.35.2 (`legacy.py`), so nothing of hf_efficient is imported.

The legacy model gives log-probabilities when it has no labels, and keeps its memory sequence-first in a list.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from inputs import token_ids
from safetensors.torch import save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel

# Short, so that feeding the prompt takes no more memory than the step that is measured.
PROMPT_SEGMENT = 64


def build(model: dict[str, Any], checkpoint: str | None) -> TransfoXLLMHeadModel:
    """The model of a folder, or a new one with the seed 0."""
    torch.manual_seed(0)
    if checkpoint is not None:
        return TransfoXLLMHeadModel.from_pretrained(checkpoint)
    return TransfoXLLMHeadModel(TransfoXLConfig(**model))


class Checkpoint:
    """Writes the weights that both sides of a check load."""

    def __init__(self, model: dict[str, Any]):
        self.model = build(model, None)

    def save(self, folder: str) -> int:
        """Save in the legacy format; returns the number of parameters."""
        self.model.save_pretrained(folder)
        return self.model.num_parameters()


class Decode:
    """Feeds one token of every row against a full memory; the unit is such a step."""

    def __init__(self, model: dict[str, Any], batch_size: int, prompt_len: int, checkpoint: str | None = None):
        self.batch_size = batch_size
        self.model = build(model, checkpoint).eval()
        self.vocab_size, self.position, self.mems = model["vocab_size"], 0, None
        while self.position < prompt_len:
            self._feed(min(PROMPT_SEGMENT, prompt_len - self.position))

    @torch.no_grad()
    def _feed(self, length: int) -> torch.Tensor:
        ids = token_ids(self.batch_size, length, self.vocab_size, self.position)
        output = self.model(ids, mems=self.mems)
        self.mems = output.mems
        self.position += length
        return output.prediction_scores[:, -1]

    def run(self) -> None:
        """One step."""
        self._feed(1)

    def save_log_probs(self, path: str, steps: int) -> None:
        """Write the log-probabilities after each of the next tokens, (steps * batch_size, vocab_size)."""
        save_file({"log_probs": torch.cat([self._feed(1) for _ in range(steps)])}, path)


class TrainStep:
    """Forward, backward and Adam on one segment against a full memory."""

    def __init__(self, model: dict[str, Any], batch_size: int, segment_len: int, checkpoint: str | None = None):
        self.model = build(model, checkpoint).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        # The legacy memory starts with mem_len zero vectors: it is full from the first step on.
        self.mems = None
        self.segments = [
            token_ids(batch_size, segment_len, model["vocab_size"], start)
            for start in range(0, 4 * segment_len, segment_len)
        ]
        self.steps = 0

    def _loss(self) -> torch.Tensor:
        ids = self.segments[self.steps % len(self.segments)]
        self.steps += 1
        output = self.model(ids, mems=self.mems, labels=ids)
        self.mems = output.mems
        return output.loss

    def run(self) -> None:
        """One step."""
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_gradients(self, folder: str, segments: int) -> list[float]:
        """Write the gradients summed over some segments under the legacy names; returns the segments' losses."""
        losses = [self._loss() for _ in range(segments)]
        torch.stack(losses).sum().backward()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in gradients.items()}, str(Path(folder) / "model.safetensors"))
        return [loss.item() for loss in losses]
