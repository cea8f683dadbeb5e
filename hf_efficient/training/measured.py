"""What the trainers of this package add to transformers': exact figures, and runs that go on where they stopped."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .callbacks import LiveFiguresCallback
from .metrics import LossTotals, TokenMeter, bits_per_byte, peak_memory_mb, perplexity
from .run_folder import last_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as Behind
else:
    Behind = object  # which of the trainers it is, the class that is made of both says


class MeasuredRun(Behind):
    """Stands in front of `Trainer` among a trainer's bases.

    - `evaluate()` returns the exact mean loss over all predicted tokens in nats, and what follows from it.
    - Evaluation leaves training's random numbers as they were, so that a run does not depend on how often it is
      evaluated.
    - `resume_from_checkpoint=True` passes over a checkpoint that was cut short.
    - Logs and progress bar show perplexity, tokens per second and peak memory.
    """

    # Name of the batch's column with the predicted tokens, in the order of the losses.
    predicted = "labels"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LiveFiguresCallback)
        self._eval_totals: LossTotals | None = None
        # Of the updates since the last log entry, for models whose loss has other parts, such as a ponder cost.
        self._task_totals: LossTotals | None = None
        self._meter = TokenMeter()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        resume_from_checkpoint: the path of a checkpoint, or True for the last complete one in `args.output_dir`.

        Raises ValueError if `output_dir` has a checkpoint and the run is not to go on from one, or if there is none to
        go on from.
        """
        output_dir = self.args.output_dir
        found = last_checkpoint(output_dir)
        if resume_from_checkpoint is True:
            if found is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but output_dir={output_dir!r} holds no complete checkpoint: "
                    "leave it out to begin the run"
                )
            resume_from_checkpoint = found
        elif not resume_from_checkpoint and found is not None and self.args.save_strategy != "no":
            raise ValueError(
                f"output_dir={output_dir!r} already holds a run ({Path(found).name}): go on with it by "
                "resume_from_checkpoint=True, or choose another folder"
            )
        self._meter = TokenMeter()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of weights that a checkpoint lacks; those that are tied to others it never has."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def end(self) -> None:
        """Finish the trackers and the process group; the last call of a script, the trainer cannot be used after it.

        DDP's wrapper is freed before the group. Freed after it, it would hold the interpreter's lock while it joins
        the group's thread, which may be waiting for that lock: the process would never end (torch 2.13 with gloo).
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one update and the number of tokens they predict, over all processes."""
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._meter.start()
        self._meter.add(self._count_tokens(batches) if num_tokens is None else num_tokens)
        return batches, num_tokens

    def _count_tokens(self, batches: list[dict[str, Tensor]]) -> Tensor | int:
        """Tokens that the batches of one update predict, where the trainer does not count them for its model."""
        if not batches:
            return 0
        num_tokens = torch.stack([batch[self.predicted].ne(-100).sum() for batch in batches]).sum()
        return self.accelerator.reduce(num_tokens.to(self.args.device), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Mean loss of one batch."""
        predicted = inputs[self.predicted]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._eval_totals is not None:
            self._add_eval_losses(outputs, predicted)
        elif outputs.get("task_loss") is not None:
            self._task_totals = self._task_totals or LossTotals(self.args.device)
            self._task_totals.add(outputs["losses"], predicted)
        return (loss, outputs) if return_outputs else loss

    def _add_eval_losses(self, outputs: Any, predicted: Tensor) -> None:
        """Count the losses of one batch of an evaluation."""
        assert self._eval_totals is not None
        self._eval_totals.add(outputs["losses"], predicted)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """One pass over a dataset; adds the exact mean loss and what follows from it."""
        with self._apart_from_training() as totals:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        loss = totals.mean(self.accelerator)
        figures = {"loss": loss, **quality(loss, dataloader.dataset)}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    @contextlib.contextmanager
    def _apart_from_training(self) -> Iterator[LossTotals]:
        """Own loss totals and random numbers for the block; training's are put back behind it.

        Even a data loader's iterator draws from the global generator, which would change training's dropout.
        """
        self._eval_totals = LossTotals(self.args.device)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), self._meter.paused():
                yield self._eval_totals
        finally:
            self._eval_totals = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the figures of the run: perplexity, bits per byte, tokens per second and peak memory.

        Perplexity and bits are of the text alone, also where the loss has other parts, such as a ponder cost.
        """
        if "loss" in logs:
            totals, self._task_totals = self._task_totals, None
            loss = logs["loss"] if totals is None else totals.mean(self.accelerator)
            logs.update(quality(loss, self.train_dataset))
            logs["tokens_per_second"] = self._meter.lap()
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device)
        elif "train_runtime" in logs:
            self._meter.lap()
            logs["train_tokens"] = self._train_tokens()
            logs["train_tokens_per_second"] = self._meter.tokens_per_second
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device)
        super().log(logs, start_time)

    def _train_tokens(self) -> int:
        """Tokens that were predicted since the training began."""
        return self._meter.num_tokens


def quality(loss: float, dataset: Any) -> dict[str, float]:
    """Perplexity of a mean loss in nats, and bits per byte if the dataset knows its bytes."""
    figures = {"perplexity": perplexity(loss)}
    if getattr(dataset, "num_bytes", None):
        figures["bits_per_byte"] = bits_per_byte(loss, dataset.num_tokens, dataset.num_bytes)
    return figures
