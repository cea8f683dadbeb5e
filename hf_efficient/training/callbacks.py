"""Trainer's progress bar, with the figures that matter behind it."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

# Key in the logs, name in the bar, format. In this order; what a log does not hold is left out.
BAR_FIGURES = (
    ("loss", "loss", "{:.3f}"),
    ("perplexity", "ppl", "{:.4g}"),
    ("bits_per_byte", "bpb", "{:.3f}"),
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
