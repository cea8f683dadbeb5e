"""Trainer for language models on segments of text, with the figures that such a run is judged by."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import Trainer

from ..data import SegmentCollator
from .arguments import SegmentTrainingArguments
from .measured import MeasuredRun


class TextTrainer(MeasuredRun, Trainer):
    """`Trainer` on segments of text that stand on their own, such as a Reformer's long ones.

    The datasets come from `hf_efficient.data.segment_lanes`; a segment sees nothing of the one before it, so training
    takes them in random order. The last token of a segment still predicts the first of the next.

    - Evaluation leaves training's random numbers as they were, so that a run does not depend on how often it is
      evaluated.
    - `evaluate()` returns `eval_loss`, the exact mean over all predicted tokens in nats, `eval_perplexity` and, if the
      dataset knows its bytes, `eval_bits_per_byte`.
    - `resume_from_checkpoint=True` passes over a checkpoint that was cut short.
    - Logs and progress bar show perplexity, bits per byte, tokens per second and peak memory.

    The model needs outputs with `losses` (per token). All else is `Trainer`'s. `SegmentTrainer` adds carried memory.

    Example:

        lanes = segment_lanes(tokens, num_lanes=1, segment_length=16384)
        args = SegmentTrainingArguments("runs/reformer", per_device_train_batch_size=1, max_steps=1000)
        TextTrainer(model, args, train_dataset=lanes).train()

    Raises TypeError if the arguments are not `SegmentTrainingArguments`.
    """

    args: SegmentTrainingArguments
    predicted = "shift_labels"

    def __init__(
        self,
        model: nn.Module | None = None,
        args: SegmentTrainingArguments | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        args = SegmentTrainingArguments() if args is None else args
        if not isinstance(args, SegmentTrainingArguments):
            raise TypeError(
                f"args must be SegmentTrainingArguments, got {type(args).__name__}: the two have the same fields"
            )
        super().__init__(model, args, data_collator or SegmentCollator(), **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Random order, another one in each epoch."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return None if dataset is None else RandomSampler(dataset)  # type: ignore[arg-type]  # torch declares no length

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one update and the number of tokens they predict, over all processes."""
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            check_columns(batch)
        return batches, num_tokens

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of one batch; the loss alone where nobody asked for more."""
        check_columns(inputs)
        if prediction_loss_only and takes_argument(self.model, "logits_to_keep"):
            # Those of the last token, that is, next to none: all of them may take more memory than the model.
            inputs = {**inputs, "logits_to_keep": 1}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Mean loss of one batch.

        inputs: the model's inputs with `shift_labels` (batch, length). `reset` means nothing without memory.
        """
        inputs = {name: tensor for name, tensor in inputs.items() if name != "reset"}
        if num_items_in_batch is not None:
            # Where the lanes end there may be a batch of last tokens, which predict nothing.
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model, or of the one that adapters were added to, has an argument of this name."""
    get_base = getattr(model, "get_base_model", None)
    base = model if get_base is None else get_base()
    return name in inspect.signature(base.forward).parameters


def check_columns(batch: dict[str, Tensor]) -> None:
    """Raises ValueError if the batch lacks what a segment needs beside its tokens."""
    for name in ("labels", "shift_labels", "reset"):
        if name not in batch:
            raise ValueError(
                f"the batch has no column {name!r}: use a dataset of hf_efficient.data.segment_lanes and a collator "
                "that keeps its columns"
            )
