"""`hf-efficient train`: from text and settings to a saved model, its figures, its card and its curve."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..data import SegmentLanes, load_tokenizer, train_tokenizer
from ..training import SegmentTrainer, SegmentTrainingArguments, TextTrainer, check_run_folder
from .arguments import Command, Invocation
from .errors import CommandError
from .models import ARCHITECTURES, build_config, check_length, memory_settings, model_settings
from .pair_tasks import LANGUAGE_MODELING, TASK_HELP, task_of
from .pretrained import PRETRAINED_HELP, adopt, pretrained_config, pretrained_model
from .runs import (
    SHOWN,
    RecipeRun,
    check_arguments,
    check_output,
    effort,
    finished_report,
    recipe_of,
    run,
    run_figures,
    run_identity,
    steps_before,
    write_run,
)
from .scoring import PONDER_FIGURES, has_memory
from .text import TextOptions, explained
from .train_pairs import TRAIN_COMMANDS

TOKENIZER_KINDS = ("byte", "shifted_byte", "char", "bpe", "shifted_bpe", "word")


@dataclass
class TrainOptions(TextOptions):
    """Flags of `hf-efficient train`, beside those of the trainer."""

    task: str = field(default=LANGUAGE_MODELING, metadata={"help": TASK_HELP})
    validation_text: list[str] | None = field(
        default=None, metadata={"help": "Text to measure on; without it only python-docs has some"}
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Split of the validation text, for sources that have several"}
    )
    tokenizer: str = field(
        default="byte",
        metadata={"help": "byte, shifted_byte, char, bpe, shifted_bpe or word (made from the text), or a saved one"},
    )
    tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "Size of the vocabulary to make, for bpe and word"}
    )
    lowercase: bool = field(default=False, metadata={"help": "Make a tokenizer that lower-cases the text"})
    architecture: str = field(
        default="transformer_xl", metadata={"help": "Kind of the model", "choices": list(ARCHITECTURES)}
    )
    pretrained: str | None = field(default=None, metadata={"help": PRETRAINED_HELP})
    segment_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that the model reads at a time; by default "
            + ", ".join(f"{row.segment_length} for {name}" for name, row in ARCHITECTURES.items())
        },
    )
    eval_segment_length: int | None = field(
        default=None, metadata={"help": "The same for validation, if it is to differ"}
    )
    eval_mem_len: int | None = field(
        default=None, metadata={"help": "Memory length for validation, if it is to differ"}
    )
    eval_clamp_len: int | None = field(default=None, metadata={"help": "clamp_len for validation, if it is to differ"})
    eval_same_length: bool | None = field(
        default=None,
        metadata={"help": "same_length for validation, if it is to differ", "nargs": "?", "const": True},
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of the run in --output_dir"})

    def __post_init__(self) -> None:
        for name in ("segment_length", "eval_segment_length", "tokenizer_vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CommandError(f"--{name} {value} must be at least 1.")
        if self.segment_length is None and self.pretrained is None:
            self.segment_length = ARCHITECTURES[self.architecture].segment_length


@dataclass
class TrainArguments(SegmentTrainingArguments):
    """The trainer's settings, with defaults for a model that starts from nothing."""

    output_dir: str | None = None
    learning_rate: float = 5e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.02
    max_grad_norm: float = 0.25
    save_total_limit: int | None = 2
    use_cache: bool = True  # the Trainer writes it into the configuration of the saved model

    def __post_init__(self) -> None:
        check_arguments(self)
        super().__post_init__()


class TextRun(RecipeRun):
    """What both trainers below add: they measure with other memory settings than they train with, as in the paper."""

    def __init__(self, *args: Any, eval_memory: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eval_memory = eval_memory

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """One pass over the validation text under the memory settings for it."""
        with memory_settings(self.model.config, **self.eval_memory):
            return super().evaluation_loop(*args, **kwargs)


class RecipeSegmentTrainer(TextRun, SegmentTrainer):
    """For models with memory."""


class RecipeTextTrainer(TextRun, TextTrainer):
    """For models that read each segment on its own."""


# What the flags of the trainer mean here.
TEXT_SHOWN = {
    **SHOWN,
    "num_train_epochs": "Passes over the text",
    "per_device_train_batch_size": "Lanes that the text is cut into and that are read side by side; rows of a batch",
    "gradient_accumulation_steps": "Segments of each lane that make one update",
    "per_device_eval_batch_size": "Lanes of the validation text",
}


def train(invocation: Invocation) -> dict[str, Any]:
    """One run, from text to a finished run folder. Returns the content of its report.json.

    The folder then holds the model with its tokenizer (AutoModelForCausalLM loads it), report.json, recipe.yaml
    (the settings, ready to be trained again), README.md (the model card), loss.png, and the checkpoints. A run that is
    resumed although it is finished is left as it is.

    Raises CommandError, having written nothing, if anything that was asked for cannot be done.
    """
    options, args = invocation.options
    folder = check_output(args.output_dir, options.resume)
    adopt(options, invocation.given, for_pairs=False)
    set_seed(args.seed)
    with args.main_process_first(desc="text and tokenizer"):
        documents = options.read("train")
        tokenizer = make_tokenizer(options, documents)
        lanes = options.cut(documents, tokenizer, args.train_batch_size * args.world_size, options.segment_length)
        validation = cut_validation(options, args, tokenizer)
    model = make_model(options, invocation.model_settings, tokenizer)
    identity = run_identity(options, args, model, train_tokens=lanes.num_tokens, train_bytes=lanes.num_bytes)
    with explained("--output_dir"):
        checkpoint = check_run_folder(folder, identity)
    if finished := finished_report(folder, invocation):
        return finished

    trainer_class = RecipeSegmentTrainer if has_memory(model) else RecipeTextTrainer
    trainer = trainer_class(
        model,
        args,
        eval_memory=eval_memory(options),
        train_dataset=lanes,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    resumed_at = steps_before(checkpoint)
    metrics["train_tokens"] += resumed_at * args.gradient_accumulation_steps * lanes.num_lanes * lanes.segment_length
    if validation is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    report = make_report(trainer, options, metrics, resumed_at)
    report |= {"command": invocation.command_line, "settings": recipe_of(invocation)}
    if trainer.is_world_process_zero():
        write_run(folder, report)
    return report


def make_tokenizer(options: TrainOptions, documents: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer that `--tokenizer` asks for, made from the training text or loaded."""
    with explained("--tokenizer"):
        if options.tokenizer in TOKENIZER_KINDS:
            return train_tokenizer(documents, options.tokenizer, options.tokenizer_vocab_size, options.lowercase)
        return load_tokenizer(options.tokenizer)


def cut_validation(
    options: TrainOptions, args: TrainArguments, tokenizer: PreTrainedTokenizerBase
) -> SegmentLanes | None:
    """The validation text as lanes; None if there is none."""
    source = options.validation_text or (options.text if options.text == ["python-docs"] else None)
    if source is None:
        if args.eval_strategy != "no":
            raise CommandError(
                f"--eval_strategy {args.eval_strategy.value} has nothing to measure on; give --validation_text."
            )
        return None
    flag = "--validation_text"
    assert options.segment_length is not None  # the architecture's, if it was not given
    return options.cut(
        options.read_source(flag, source, options.validation_split, "validation"),
        tokenizer,
        args.eval_batch_size * args.world_size,
        options.eval_segment_length or options.segment_length,
        flag,
        "--per_device_eval_batch_size",
    )


def make_model(options: TrainOptions, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that the training begins with: that of `--pretrained`, or one with new weights.

    Settings that were not given are those of the saved model, or the architecture's starter settings.
    """
    if options.pretrained is not None:
        config = pretrained_config(options.pretrained, options.architecture, settings)
    else:
        config = build_config(options.architecture, settings, tokenizer)
    assert options.segment_length is not None  # the architecture's, if it was not given
    check_length(config, options.segment_length)
    check_length(config, options.eval_segment_length or 0, "--eval_segment_length")
    with memory_settings(config, **eval_memory(options)):
        pass  # an illegal value is better refused now than after the training
    if options.pretrained is not None:
        return pretrained_model(options.pretrained, config, settings)
    return AutoModelForCausalLM.from_config(config)


def eval_memory(options: TrainOptions) -> dict[str, Any]:
    """Memory settings for validation; None where they are those of training."""
    return {name: getattr(options, f"eval_{name}") for name in ("mem_len", "clamp_len", "same_length")}


def make_report(
    trainer: TextTrainer, options: TrainOptions, metrics: dict[str, Any], resumed_at: int
) -> dict[str, Any]:
    """The figures of a finished run, and what they were measured on."""
    lanes, validation = trainer.train_dataset, trainer.eval_dataset
    report = run_figures(trainer, options, metrics, resumed_at)
    report["data"] = {"text": options.text, "tokens": lanes.num_tokens, "bytes": lanes.num_bytes}
    if validation is not None:
        with memory_settings(trainer.model.config, **trainer.eval_memory):
            names = [name for name in trainer.eval_memory if hasattr(trainer.model.config, name)]
            memory = {name: getattr(trainer.model.config, name) for name in names}
        report["validation"] = {
            "text": options.validation_text or options.text,
            "tokens": validation.num_tokens,
            "bytes": validation.num_bytes,
            "segment_length": validation.segment_length,
            **memory,
            **{name: metrics[f"eval_{name}"] for name in ("loss", "perplexity", "bits_per_byte")},
            **{name: metrics[f"eval_{name}"] for name in PONDER_FIGURES if f"eval_{name}" in metrics},
        }
    return report


def summary(report: dict[str, Any], folder: str) -> str:
    """What the command prints at its end."""
    lines = [effort(report, "tokens")]
    if "validation" in report:
        figures = report["validation"]
        lines.append(
            f"Validation: loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte."
        )
        if "ponder_time" in figures:
            lines.append(f"Steps per token: {figures['ponder_time']:.2f} ± {figures['ponder_time_std']:.2f}.")
    lines.append(f"{folder} holds the model, its card (README.md), report.json and the checkpoints. Let it write:")
    lines.append(f'  hf-efficient generate {folder} "The beginning of a text"')
    return "\n".join(lines)


def command_for(arguments: Sequence[str]) -> Command:
    """The command with the flags of the task that `arguments` name: this one, or that for pairs of texts.

    Raises CommandError for an unknown task, and for flags of a task that is not named.
    """
    task = task_of(arguments)
    if task == LANGUAGE_MODELING:
        return COMMAND
    return TRAIN_COMMANDS[task]


COMMAND = Command(
    name="train",
    description=(
        "Train a language model with a long context on your own text. The settings come from flags, from a YAML "
        "recipe, or from a recipe with flags that override it."
    ),
    usage="hf-efficient train [RECIPE.yaml] --text TEXT --output_dir FOLDER [--flag value ...]",
    examples="""\
  hf-efficient train --text my.txt --output_dir runs/mine --max_steps 2000
  hf-efficient train --text my.txt --output_dir runs/mine --max_steps 2000 --resume
  hf-efficient train --text books/ --validation_text held_out.txt --tokenizer bpe --output_dir runs/bpe
  hf-efficient train --text my.txt --output_dir runs/long --segment_length 64 --model.mem_len 512
  hf-efficient train --text my.txt --output_dir runs/reformer --architecture reformer --segment_length 4096
  hf-efficient train --text my.txt --output_dir runs/universal --architecture universal_transformer
  hf-efficient train --text new.txt --pretrained runs/mine --output_dir runs/tuned --learning_rate 1e-4
  hf-efficient train examples/transformer_xl_enwik8_base.yaml --output_dir runs/enwik8 --max_steps 100""",
    options=(TrainOptions, TrainArguments),
    shown=TEXT_SHOWN,
    model_settings=lambda: {name: model_settings(name) for name in ARCHITECTURES},
    run=partial(run, train, summary),
    variant=command_for,
)
