"""Trainer's progress bar with the figures that matter behind it, and how long models with halting ponder."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Key in the logs, name in the bar, format. In this order; what a log does not hold is left out.
BAR_FIGURES = (
    ("loss", "loss", "{:.3f}"),
    ("perplexity", "ppl", "{:.4g}"),
    ("bits_per_byte", "bpb", "{:.3f}"),
    ("ponder_time", "ponder", "{:.2f}"),
    ("tokens_per_second", "tok/s", "{:,.0f}"),
    ("memory_length", "memory", "{}"),
    ("peak_memory_mb", "peak MB", "{:,.0f}"),
)


class LiveFiguresCallback(ProgressCallback):
    """Trainer's own progress bar with the newest training figures at its end, refreshed at every log.

    Lines of figures are written above the bar only for evaluations and for the end of the run, which would otherwise
    scroll away; every training log is in `trainer_state.json` all the same.

        40%|████      | 400/1000 [01:12<01:48, loss=2.310, ppl=10.07, bpb=3.333, tok/s=11,420, memory=128, peak MB=611]
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures of `logs`: those of training at the end of the bar, all others as a line."""
        if logs is None or "loss" not in logs:
            super().on_log(args, state, control, logs=logs or {}, **kwargs)
        elif self.training_bar is not None:
            figures = {name: form.format(logs[key]) for key, name, form in BAR_FIGURES if key in logs}
            self.training_bar.set_postfix(figures)


# Fields of a model's outputs with the number of steps of each position, (batch, length); 0 at those not counted.
PONDER_FIELDS = ("ponder_times", "encoder_ponder_times")


class PonderTotals:
    """Number, sum and sum of squares of ponder times, over the batches of one process.

    Kept on the accelerator, without waiting for it, in double precision where it has that.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, ponder_times: Tensor) -> None:
        """Count one batch of `ponder_times` (batch, length), without the positions that took no step: pads."""
        times = ponder_times.detach().to(_widest(ponder_times.device))
        sums = torch.stack([(times > 0).sum().to(times.dtype), times.sum(), times.square().sum()])
        self.sums = sums if self.sums is None else self.sums + sums

    def mean_and_spread(self, device: torch.device | str = "cpu") -> tuple[float, float] | None:
        """Mean and standard deviation over all processes, each of which must call this; None if there is nothing.

        device: of this process, for the case that it has counted nothing.
        """
        sums = torch.zeros(3, dtype=_widest(device), device=device) if self.sums is None else self.sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        count, total, squares = sums.tolist()
        if not count:
            return None
        mean = total / count
        return mean, max(squares / count - mean**2, 0.0) ** 0.5


def _widest(device: torch.device | str) -> torch.dtype:
    """Double precision where the device has it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class PonderTimeCallback(TrainerCallback):
    """Logs how many steps the positions of a model with adaptive computation time take: their mean and their spread.

    From Graves 2016, arXiv 1603.08983.

    Every log of training gets `ponder_time` and `ponder_time_std` over the batches since the last one, every log of an
    evaluation within training `eval_ponder_time` and `eval_ponder_time_std`. For an encoder-decoder these are the
    decoder's, and the encoder's come as `encoder_ponder_time`. They stand in `trainer.state.log_history`, and in the
    logs of the callbacks behind this one; trackers such as TensorBoard come before it, unless it is put in front of
    them: `trainer.callback_handler.callbacks.insert(0, PonderTimeCallback())`.

    The figures are read off the model's outputs by a hook, which is there from the begin of training to its end.

    Example:

        Trainer(model, args, train_dataset=dataset, callbacks=[PonderTimeCallback()]).train()

    Raises ValueError for `label_smoothing_factor` above 0 in the trainer's arguments: the trainer then computes the
    loss by itself, without the ponder cost.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None
        self._totals: dict[bool, dict[str, PonderTotals]] = {}
        self._reset(True)
        self._reset(False)

    def _reset(self, is_training: bool) -> None:
        self._totals[is_training] = {name: PonderTotals() for name in PONDER_FIELDS}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a loss that has no ponder cost."""
        if args.label_smoothing_factor > 0:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} in the trainer's arguments drops the ponder "
                "cost from the loss; leave it at 0 and set label_smoothing in the model's configuration."
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin to read the model's outputs."""
        self.on_init_end(args, state, control)
        self.on_train_end(args, state, control)
        assert model is not None  # the trainer gives it
        self._handle = model.register_forward_hook(self._read)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _read(self, model: nn.Module, inputs: tuple, outputs: Any) -> None:
        for name, totals in self._totals[model.training].items():
            ponder_times = getattr(outputs, name, None)
            if ponder_times is not None:
                totals.add(ponder_times)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to logs of training and of evaluation, the same on every process."""
        logs = {} if logs is None else logs
        prefix = _prefix(logs)
        if self._handle is None or prefix is None:
            return
        figures: dict[str, float] = {}
        for field, totals in self._totals[prefix == ""].items():
            if (found := totals.mean_and_spread(args.device)) is not None:
                name = prefix + field.removesuffix("s")
                figures |= dict(zip((name, f"{name}_std"), found, strict=True))
        if not figures:
            logger.warning_once(
                "PonderTimeCallback: the model reports no ponder_times; set halting='act' in its config"
            )
        self._reset(prefix == "")
        for log in (logs, *state.log_history[-1:]):
            log.update(figures)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *metrics: Any, **kwargs: Any
    ) -> None:
        """Forget what a prediction within training pondered, which is not logged."""
        self._reset(is_training=False)


def _prefix(logs: dict[str, Any]) -> str | None:
    """What the names of a log begin with: nothing in training, `eval_` and the like in evaluation; None otherwise."""
    if "loss" in logs:
        return ""
    ends = [key for key in logs if key.endswith("_runtime") and key != "train_runtime"]
    return ends[0].removesuffix("runtime") if ends else None
