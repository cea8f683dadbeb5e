"""Seq2SeqTrainingArguments for pairs of texts: fitting defaults, and a refusal of what would falsify the figures."""

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, logging

logger = logging.get_logger(__name__)

# Metrics of which less is better.
LESS_IS_BETTER = ("loss", "perplexity")


@dataclass
class PairTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` whose defaults fit `PairTrainer`.

    Differences: batches hold pairs of similar length, figures are logged every 10 steps, and as
    `metric_for_best_model` less "perplexity" is better, more "bleu".

    Args:
        constant_steps: updates at the peak learning rate, after which it falls with the inverse square root of their
            number (`constant_then_inverse_sqrt`, Meena's); 0 leaves the course to `lr_scheduler_type`.

    Raises ValueError for a value that cannot be used, naming the field, its value and the mend.
    """

    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Order of the pairs: group_by_length, random or sequential."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Column by which a batch counts as labelled."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log, and refresh the progress bar's figures, every this many steps."}
    )
    constant_steps: int = field(
        default=0,
        metadata={"help": "Updates at the peak learning rate before it falls with the inverse root of their number."},
    )

    def __post_init__(self) -> None:
        known = self.greater_is_better  # type: ignore[has-type]  # a field of transformers', which mypy does not read
        if known is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(LESS_IS_BETTER)
        super().__post_init__()
        if self.constant_steps < 0:
            raise ValueError(f"constant_steps={self.constant_steps} must not be negative; 0 turns it off")
        if self.label_names != ["labels"]:
            raise ValueError(f"label_names={self.label_names!r} cannot be used: the loss is that of 'labels'")
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False cannot be used: processes hold different numbers of target "
                "tokens; set True"
            )
        if self.n_gpu > 1:
            logger.warning(
                f"Only the first of {self.n_gpu} GPUs is used; to use all, start one process for each: "
                f"torchrun --nproc_per_node {self.n_gpu}"
            )
            self._n_gpu = 1
