"""TrainingArguments for training on consecutive segments: fitting defaults, and a refusal of what would break them."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments, logging

logger = logging.get_logger(__name__)

# Field, the only value segment training can use, and why.
REQUIRED_VALUES: tuple[tuple[str, Any, str], ...] = (
    ("train_sampling_strategy", "sequential", "a lane's segments must come in the order of the text"),
    ("dataloader_in_order", True, "a lane's segments must come in the order of the text"),
    ("ignore_data_skip", False, "a resumed run goes on in the middle of its lanes"),
    ("auto_find_batch_size", False, "the number of lanes is fixed by the dataset"),
    ("remove_unused_columns", False, "the column 'reset' is for the trainer, not for the model"),
    ("label_names", ["labels"], "a batch is evaluated by the loss of its lanes"),
    ("label_smoothing_factor", 0.0, "the smoother drops the prediction across each segment's border"),
    ("average_tokens_across_devices", True, "processes hold different numbers of padded tokens"),
)


@dataclass
class SegmentTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose defaults fit `SegmentTrainer`; there are no new fields.

    Differences from `TrainingArguments`: segments are read in order, no column is dropped, and figures are logged
    every 10 steps, which is also how often the progress bar shows new ones. As `metric_for_best_model`, less
    "perplexity" and less "bits_per_byte" is better.

    A batch is one segment of every lane, so the datasets need
    `num_lanes = per_device_train_batch_size * world_size` lanes (for evaluation: `per_device_eval_batch_size`).
    With `gradient_accumulation_steps=k` an update takes k consecutive segments of each lane.

    Example:

        args = SegmentTrainingArguments("runs/xl", per_device_train_batch_size=16, max_steps=4000)

    Raises ValueError for values that contradict carried memory, naming the field, its value and the mend.
    """

    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Order of the segments; only 'sequential' keeps a lane together."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the datasets' column 'reset' is read by the trainer."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Column by which a batch counts as labelled."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log, and refresh the progress bar's figures, every this many steps."}
    )

    def __post_init__(self) -> None:
        known = self.greater_is_better  # type: ignore[has-type]  # a field of transformers', which mypy does not read
        if known is None and self.metric_for_best_model is not None:
            less_is_better = ("loss", "perplexity", "bits_per_byte")
            self.greater_is_better = not self.metric_for_best_model.endswith(less_is_better)
        super().__post_init__()
        for name, required, reason in REQUIRED_VALUES:
            value = getattr(self, name)
            if value != required:
                raise ValueError(f"{name}={value!r} cannot be used with carried memory: {reason}; set {required!r}")
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config {name}=True cannot be used with carried memory: each process reads its own "
                    "lanes; leave it out"
                )
        if self.n_gpu > 1:
            logger.warning(
                f"Only the first of {self.n_gpu} GPUs is used, because one process cannot split carried memory; to "
                f"use all, start one process for each: torchrun --nproc_per_node {self.n_gpu}"
            )
            self._n_gpu = 1
