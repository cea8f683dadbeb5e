"""What every training run of the command line does, whatever it trains on: its folder, its identity, its end."""

import gc
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ..hub import write_model_card
from ..training import LiveFiguresCallback, PonderTimeCallback
from .arguments import Invocation
from .errors import CommandError
from .recipes import write_recipe
from .report import circumstances, plain, read_report, write_report

# The settings of transformers' Trainer that `--help` shows. What the empty ones mean depends on the task.
SHOWN = {
    "output_dir": "Folder of the run; it is made if it does not exist",
    "max_steps": "Updates to make; without it --num_train_epochs counts",
    "num_train_epochs": "",
    "per_device_train_batch_size": "",
    "gradient_accumulation_steps": "",
    "learning_rate": "Peak learning rate",
    "lr_scheduler_type": "Course of the learning rate: cosine, linear, constant and others",
    "warmup_steps": "Updates until the peak; below 1, a share of all",
    "weight_decay": "Weight decay of AdamW",
    "max_grad_norm": "Longer gradients are shortened to this length",
    "seed": "The same seed on the same machine gives the same model",
    "bf16": "Compute in bfloat16 where that is safe",
    "use_cpu": "Use the CPU even if there is an accelerator",
    "logging_steps": "Updates between two entries of the log",
    "eval_strategy": "When to measure on the validation text; at the end it is measured anyway",
    "eval_steps": "Updates between two measurements, for --eval_strategy steps",
    "per_device_eval_batch_size": "",
    "save_steps": "Updates between two checkpoints",
    "save_total_limit": "Checkpoints to keep",
}

# What makes a run this run and no other, beside text, tokenizer and model. The rest may change when it is resumed.
IDENTITY = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16"),
    *("constant_steps", "label_smoothing_factor", "train_sampling_strategy"),
)  # fmt: skip

if TYPE_CHECKING:
    from transformers import Trainer as Behind
else:
    Behind = object  # which of the trainers it is, the class that is made of both says


class RecipeProgress(LiveFiguresCallback):
    """The progress bar without the line of figures at the end of the run, which the command's own summary follows."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show all figures but those of the whole run."""
        if logs is None or "train_runtime" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)


class RecipeRun(Behind):
    """What the trainers of the command line add: they show how many steps a model that chooses them takes.

    Resumed from its last update, a run makes none; `Trainer` would make one more.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.pop_callback(LiveFiguresCallback) is not None:
            self.add_callback(RecipeProgress)
        self.ponder = PonderTimeCallback() if getattr(self.model.config, "halting", "none") != "none" else None
        if self.ponder is not None:
            # In front of the callbacks that show or store its figures.
            self.callback_handler.callbacks.insert(0, self.ponder)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The batches of one update; none once all updates are made."""
        return super().get_batch_samples(*args, **kwargs) if self.state.global_step < self.state.max_steps else ([], 0)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Figures of the validation text, the steps per token among them also after the training."""
        if self.ponder is None or self.is_in_train:
            return super().evaluate(*args, **kwargs)
        run = self.args, self.state, self.control
        self.ponder.on_train_begin(*run, model=self.model)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.ponder.on_train_end(*run)


def check_arguments(args: TrainingArguments) -> None:
    """Raises CommandError for settings of the trainer that cannot be meant; called before the trainer's own checks."""
    if args.output_dir is None:
        raise CommandError("--output_dir is missing; name the folder for the run, for example runs/mine.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise CommandError(f"--{name} {getattr(args, name)} must be at least 1.")
    if args.max_steps == 0 or args.max_steps < -1:
        raise CommandError(f"--max_steps {args.max_steps} must be at least 1; leave it out to count epochs.")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise CommandError(f"--num_train_epochs {args.num_train_epochs} must be positive.")
    if args.learning_rate <= 0:
        raise CommandError(f"--learning_rate {args.learning_rate} must be positive; try 5e-4.")
    if args.resume_from_checkpoint is not None:
        raise CommandError(
            f"--resume_from_checkpoint '{args.resume_from_checkpoint}' is not read; use --resume for the last one."
        )
    args.dataloader_pin_memory &= torch.accelerator.is_available()


def run(train: Callable[[Invocation], dict[str, Any]], summary: Callable[..., str], invocation: Invocation) -> None:
    """Train, and say where the result is."""
    report = train(invocation)
    if PartialState().is_main_process:
        print(summary(report, invocation.options[1].output_dir))
    # A process that ends while the group stands may be aborted on its way out. The trainer goes first: see its `end`.
    gc.collect()
    PartialState().destroy_process_group()


def check_output(output_dir: str, resume: bool) -> Path:
    """The run folder. Raises CommandError if it is not free, unless a run is to go on."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--output_dir '{folder}' is a file; give the path of a folder.")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise CommandError(
            f"--output_dir '{folder}' is not empty; add --resume to go on with the run in it, or take another folder."
        )
    PartialState().wait_for_everyone()  # no process writes before each has looked
    return folder


def finished_report(folder: Path, invocation: Invocation) -> dict[str, Any] | None:
    """The report of the folder's run if that is finished, and not to become longer now; then it is said so."""
    report = read_report(folder)
    lengths = [(name, invocation.given.get(name)) for name in ("max_steps", "num_train_epochs")]
    if not report or any(report["settings"].get(name) != length for name, length in lengths):
        return None
    if PartialState().is_main_process:
        print(f"The run in {folder} is finished, and is left as it is; a higher --max_steps makes it longer. It said:")
    return report


def run_identity(options: Any, args: TrainingArguments, model: PreTrainedModel, **data: int) -> dict[str, Any]:
    """What must be the same for a run to be resumed: model, text, tokenizer, batches and optimiser.

    data: the sizes of what is trained on.
    """
    may_change = {"resume", *(name for name in asdict(options) if name.startswith(("eval_", "validation_")))}
    own = {name: value for name, value in asdict(options).items() if name not in may_change}
    training = {name: getattr(args, name) for name in IDENTITY if hasattr(args, name)}
    config = {f"model.{name}": value for name, value in model.config.to_diff_dict().items()}
    config.pop("model.transformers_version", None)
    return plain(own | training | config | data)


def recipe_of(invocation: Invocation) -> dict[str, Any]:
    """What was asked for, as a recipe: where the run goes and whether it is resumed are no part of it."""
    given = {name: as_typed(value) for name, value in invocation.given.items() if name not in ("output_dir", "resume")}
    return plain(given | {"model": invocation.model_settings})


def as_typed(value: Any) -> Any:
    """A whole number as such, also where transformers takes one for a share too, as for `save_steps`."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def steps_before(checkpoint: str | None) -> int:
    """Updates that were made before a run goes on from `checkpoint`."""
    return 0 if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


def run_figures(trainer: Any, options: Any, metrics: dict[str, Any], resumed_at: int) -> dict[str, Any]:
    """The figures of a finished run that do not depend on what it was trained on.

    resumed_at: updates that were made before, which time and speed leave out.
    """
    origin = {} if options.pretrained is None else {"pretrained": options.pretrained}
    return {
        "architecture": options.architecture,
        **origin,
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.state.global_step,
        **({"resumed_at": resumed_at} if resumed_at else {}),
        "train_tokens": metrics["train_tokens"],
        "train_seconds": metrics["train_runtime"],
        "tokens_per_second": metrics["train_tokens_per_second"],
        "peak_memory_mb": metrics["peak_memory_mb"],
        "history": [entry for entry in trainer.state.log_history if {"loss", "eval_loss"} & entry.keys()],
    } | circumstances()


def effort(report: dict[str, Any], tokens: str) -> str:
    """What a training took, for the end of the command; of one that was resumed, since then.

    tokens: what its speed counts.
    """
    speed = f"{report['tokens_per_second']:,.0f} tokens/s, {report['peak_memory_mb']:,.0f} MB"
    cost = f"{report['train_seconds']:.0f} s ({speed})"
    if "resumed_at" in report:
        return (
            f"Trained {report['parameters']:,} parameters for {report['steps']:,} updates; those since update "
            f"{report['resumed_at']:,} took {cost}."
        )
    return f"Trained {report['parameters']:,} parameters on {report['train_tokens']:,} {tokens} in {cost}."


def write_run(folder: Path, report: dict[str, Any]) -> None:
    """Everything that a reader of the run folder wants beside the model."""
    write_report(folder, report)
    write_recipe(folder, report)
    logged = any("loss" in entry for entry in report["history"])
    if logged and find_spec("matplotlib") is not None:
        from ..plots import plot_loss

        plot_loss(report["history"], folder / "loss.png")
    write_model_card(folder)
