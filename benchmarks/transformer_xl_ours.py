"""Sides of our Transformer-XL."""

from typing import Any

import torch
from inputs import token_ids
from safetensors.torch import save_file

from hf_efficient import TransformerXLConfig, TransformerXLForCausalLM

# Short, so that feeding the prompt takes no more memory than the step that is measured.
PROMPT_SEGMENT = 64


def build(model: dict[str, Any], checkpoint: str | None) -> TransformerXLForCausalLM:
    """The model of a (legacy) folder, or a new one with the seed 0."""
    torch.manual_seed(0)
    if checkpoint is not None:
        return TransformerXLForCausalLM.from_pretrained(checkpoint)
    return TransformerXLForCausalLM(TransformerXLConfig(**model))


class Decode:
    """Feeds one token of every row against a full memory; the unit is such a step."""

    def __init__(self, model: dict[str, Any], batch_size: int, prompt_len: int, checkpoint: str | None = None):
        self.batch_size = batch_size
        self.model = build(model, checkpoint).eval()
        self.vocab_size, self.position, self.memory = model["vocab_size"], 0, self.model.create_cache()
        while self.position < prompt_len:
            self._feed(min(PROMPT_SEGMENT, prompt_len - self.position))

    @torch.no_grad()
    def _feed(self, length: int) -> torch.Tensor:
        ids = token_ids(self.batch_size, length, self.vocab_size, self.position)
        self.position += length
        return self.model(ids, past_key_values=self.memory, logits_to_keep=1).logits[:, -1]

    def run(self) -> None:
        """One step."""
        self._feed(1)

    def save_log_probs(self, path: str, steps: int) -> None:
        """Write the log-probabilities after each of the next tokens, (steps * batch_size, vocab_size)."""
        logits = torch.cat([self._feed(1) for _ in range(steps)])
        save_file({"log_probs": logits.log_softmax(-1)}, path)


class TrainStep:
    """Forward, backward and Adam on one segment against a full memory; on request in bfloat16 autocast."""

    def __init__(
        self,
        model: dict[str, Any],
        batch_size: int,
        segment_len: int,
        checkpoint: str | None = None,
        autocast: bool = False,
    ):
        self.autocast = autocast
        # Like the legacy model, from mem_len zero vectors: the memory is full from the first step on.
        self.model = build(model | {"memory_init": "zeros"}, checkpoint).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.memory = self.model.create_cache()
        self.segments = [
            token_ids(batch_size, segment_len, model["vocab_size"], start)
            for start in range(0, 4 * segment_len, segment_len)
        ]
        self.steps = 0

    def _loss(self) -> torch.Tensor:
        ids = self.segments[self.steps % len(self.segments)]
        self.steps += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(ids, past_key_values=self.memory, labels=ids).loss

    def run(self) -> None:
        """One step."""
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_gradients(self, folder: str, segments: int) -> list[float]:
        """Write the gradients summed over some segments under the legacy names; returns the segments' losses.

        The gradients are saved in place of the weights, so that they get the names that files have.
        """
        losses = [self._loss() for _ in range(segments)]
        torch.stack(losses).sum().backward()
        for parameter in self.model.parameters():
            parameter.data = parameter.grad
        self.model.save_pretrained(folder)
        return [loss.item() for loss in losses]


class EvaluateSegments:
    """Evaluates segment after segment with a full memory; the unit is a token."""

    def __init__(self, model: dict[str, Any], segment_len: int):
        self.model = build(model, None).eval()
        self.memory, self.units = self.model.create_cache(), segment_len
        self.vocab_size, self.position = model["vocab_size"], 0
        while self.memory.memory_length < model["mem_len"]:
            self.run()

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """One segment; the losses of its tokens, (1, segment_len)."""
        ids = token_ids(1, self.units + 1, self.vocab_size, self.position)
        self.position += self.units
        return self.model(ids[:, :-1], shift_labels=ids[:, 1:], past_key_values=self.memory).losses

    def compare_with_single_tokens(self, count: int) -> float:
        """Largest difference between the next segment's first losses and those of its tokens fed one by one."""
        start, saved = self.position, self.memory.state_dict()
        losses = self.run()[0, :count]
        self.memory.load_state_dict(saved)
        ids = token_ids(1, count + 1, self.vocab_size, start)
        with torch.no_grad():
            for i in range(count):
                step, label = ids[:, i : i + 1], ids[:, i + 1 : i + 2]
                output = self.model(step, shift_labels=label, past_key_values=self.memory)
                losses[i] -= output.losses[0, 0]
        return losses.abs().max().item()

    def count_parameters(self) -> int:
        """Parameters without the table of tokens and the softmax."""
        return sum(parameter.numel() for parameter in self.model.model.layers.parameters())
