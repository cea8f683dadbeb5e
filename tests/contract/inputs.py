"""Inputs and labels for the contract's models, and what to compare of their outputs."""

from collections.abc import Callable
from typing import Any

import torch
from contract.rows import Row
from models.model_tools import QUIET, random_ids
from torch import Tensor

NUM_ROWS, LENGTH, TARGET_LENGTH = 2, 12, 7


def token_ids(*shape: int, seed: int = 1) -> Tensor:
    """Ids from 1 up: 0 is the pad."""
    return random_ids(*shape, seed=seed).clamp_min(1)


def inputs_of(row: Row, num_rows: int = NUM_ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """What the model reads, without labels; no pads."""
    ids = token_ids(num_rows, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if row.kind == "ForConditionalGeneration":
        inputs["decoder_input_ids"] = token_ids(num_rows, TARGET_LENGTH, seed=2)
    return inputs


def labels_of(row: Row, num_rows: int = NUM_ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """Labels for the head; none for a body."""
    ids = token_ids(num_rows, length)
    by_kind: dict[str, Callable[[], dict[str, Tensor]]] = {
        "ForConditionalGeneration": lambda: {"labels": token_ids(num_rows, TARGET_LENGTH, seed=3)},
        "ForSequenceClassification": lambda: {"labels": torch.arange(num_rows) % 3},
        "ForTokenClassification": lambda: {"labels": ids % 3},
        "ForQuestionAnswering": lambda: {
            "start_positions": torch.arange(num_rows) % 4,
            "end_positions": 4 + torch.arange(num_rows) % 4,
        },
        "Model": dict,
        "EncoderModel": dict,
    }
    return by_kind.get(row.kind, lambda: {"labels": ids})()


def training_inputs_of(row: Row, **sizes: int) -> dict[str, Tensor]:
    """Inputs and labels; the decoder's input is made of the labels."""
    inputs = inputs_of(row, **sizes) | labels_of(row, **sizes)
    if row.kind == "ForConditionalGeneration":
        del inputs["decoder_input_ids"]
    return inputs


def result(model: torch.nn.Module, **inputs: Any) -> Tensor:
    """The first output: logits of a head, states of a body."""
    with torch.no_grad():
        return model(**inputs)[0]


def loss_of(row: Row, model: torch.nn.Module) -> Tensor:
    """A number that depends on every output; a head's own loss, where the model has a head."""
    output = model(**training_inputs_of(row))
    if labels_of(row):
        return output.loss
    return output[0].square().mean()


def gradients(row: Row, model: torch.nn.Module) -> dict[str, Tensor | None]:
    """Of every parameter."""
    model.zero_grad()
    loss_of(row, model).backward()
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def generated(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Tensor:
    """Greedy continuation, six tokens."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    settings = {"max_new_tokens": 6, "do_sample": False} | QUIET | settings
    return model.generate(ids, attention_mask=mask, **settings)


__all__ = [
    "LENGTH",
    "NUM_ROWS",
    "TARGET_LENGTH",
    "generated",
    "gradients",
    "inputs_of",
    "labels_of",
    "loss_of",
    "result",
    "token_ids",
    "training_inputs_of",
]
