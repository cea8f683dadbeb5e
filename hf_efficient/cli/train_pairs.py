"""`hf-efficient train --task translation`, and the other tasks that map a text to a text."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..training import SCHEDULES, BleuMetric, PairTrainer, PairTrainingArguments, check_run_folder
from .arguments import Command, Invocation
from .errors import CommandError
from .models import PAIR_ARCHITECTURES, build_config, model_settings
from .pair_tasks import PAIR_TASKS, PairOptions, check_lengths
from .pretrained import adopt, pretrained_config, pretrained_model
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
from .scoring import PONDER_FIGURES
from .text import explained


@dataclass
class PairArguments(PairTrainingArguments):
    """The trainer's settings, with defaults for a model that starts from nothing."""

    output_dir: str | None = None
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    save_total_limit: int | None = 2
    predict_with_generate: bool = True
    use_cache: bool = True  # the Trainer writes it into the configuration of the saved model

    def __post_init__(self) -> None:
        check_arguments(self)
        super().__post_init__()


class RecipePairTrainer(RecipeRun, PairTrainer):
    """For models with encoder and decoder."""


def train(invocation: Invocation) -> dict[str, Any]:
    """One run, from pairs to a finished run folder. Returns the content of its report.json.

    The folder then holds the model with its tokenizer (AutoModelForSeq2SeqLM loads it) and what `hf-efficient train`
    leaves of every run. A run that is resumed although it is finished is left as it is.

    Raises CommandError, having written nothing, if anything that was asked for cannot be done.
    """
    options, args = invocation.options
    folder = check_output(args.output_dir, options.resume)
    adopt(options, invocation.given, for_pairs=True)
    set_seed(args.seed)
    with args.main_process_first(desc="pairs and tokenizer"):
        data = options.read()
        tokenizer = options.make_tokenizer(data)
        pairs = options.tokenize(data, tokenizer)
        validation = read_validation(options, args, tokenizer)
    model = make_model(options, invocation.model_settings, tokenizer)
    for flag, tokens in (("--max_source_length", pairs), ("validation", validation)):
        check_lengths(model, tokens, flag)
    check_smoothing(args, model)
    apply_schedule(options, args, model.config.hidden_size, invocation.given)
    identity = run_identity(options, args, model, train_pairs=len(pairs), train_tokens=count_tokens(pairs))
    with explained("--output_dir"):
        checkpoint = check_run_folder(folder, identity)
    if finished := finished_report(folder, invocation):
        return finished

    args.predict_with_generate &= options.has_references
    metric = BleuMetric(tokenizer) if args.predict_with_generate else None
    trainer = RecipePairTrainer(
        model,
        args,
        train_dataset=pairs,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=metric,
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if validation is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    report = make_report(trainer, options, metrics, steps_before(checkpoint), left_out=len(data) - len(pairs))
    report |= {"command": invocation.command_line, "settings": recipe_of(invocation)}
    if trainer.is_world_process_zero():
        write_run(folder, report)
    return report


def read_validation(options: PairOptions, args: PairArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The tokens of every validation pair; None if there is none."""
    data = options.read_validation()
    if data is None:
        if args.eval_strategy != "no":
            raise CommandError(
                f"--eval_strategy {args.eval_strategy.value} has nothing to measure on; give --validation_source and "
                "--validation_target."
            )
        return None
    return options.tokenize(data, tokenizer, every_pair=True)


def make_model(options: PairOptions, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that the training begins with: that of `--pretrained`, or one with new weights.

    Settings that were not given are those of the saved model, or the architecture's starter settings.
    """
    if options.pretrained is not None:
        config = pretrained_config(options.pretrained, options.architecture, settings)
        return pretrained_model(options.pretrained, config, settings)
    return AutoModelForSeq2SeqLM.from_config(build_config(options.architecture, settings, tokenizer, for_pairs=True))


def check_smoothing(args: PairArguments, model: PreTrainedModel) -> None:
    """Raises CommandError for label smoothing by the trainer where the model has its own."""
    smoothing = args.label_smoothing_factor
    if smoothing > 0 and hasattr(model.config, "label_smoothing"):
        raise CommandError(
            f"--label_smoothing_factor {smoothing} drops what else is in the model's loss; write "
            f"--model.label_smoothing {smoothing} instead."
        )


def apply_schedule(options: PairOptions, args: PairArguments, hidden_size: int, given: dict[str, Any]) -> None:
    """Set what `--schedule` stands for. Raises CommandError if a flag contradicts it, or without --max_steps."""
    if options.schedule is None:
        return
    if args.max_steps < 1:
        raise CommandError(f"--schedule {options.schedule} needs the number of updates; give --max_steps.")
    schedule = {"hidden_size": hidden_size, "max_steps": args.max_steps}
    if "warmup_steps" in given:
        schedule["warmup_steps"] = args.get_warmup_steps(args.max_steps)
    with explained("--schedule"):
        settings = SCHEDULES[options.schedule](**schedule)
    for name, value in settings.items():
        if name in given and name != "warmup_steps":
            raise CommandError(f"--{name} '{given[name]}' contradicts --schedule {options.schedule}; leave one out.")
        setattr(args, name, value)


def count_tokens(pairs: Dataset) -> int:
    """Tokens of both sides together."""
    return sum(sum(batch["length"]) for batch in pairs.select_columns("length").iter(10_000))


def make_report(
    trainer: RecipePairTrainer, options: PairOptions, metrics: dict[str, Any], resumed_at: int, left_out: int
) -> dict[str, Any]:
    """The figures of a finished run, and what they were measured on. left_out: pairs that were too long."""
    pairs, validation = trainer.train_dataset, trainer.eval_dataset
    report = {"task": options.task, **run_figures(trainer, options, metrics, resumed_at)}
    report["data"] = {"text": options.files(), "pairs": len(pairs), "tokens": count_tokens(pairs)}
    if options.rows_are_pairs:
        report["data"]["left_out"] = left_out
    if validation is not None:
        names = ("loss", "perplexity", "bleu", "length_ratio", *PONDER_FIGURES)
        report["validation"] = {
            "text": options.files(for_validation=True),
            "pairs": len(validation),
            "tokens": count_tokens(validation),
            **{name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics},
        }
        if trainer.args.predict_with_generate:
            report["validation"]["num_beams"] = trainer.args.generation_num_beams or 1
            report["validation"]["bleu_signature"] = trainer.compute_metrics.signature
    return report


def summary(report: dict[str, Any], folder: str) -> str:
    """What the command prints at its end."""
    lines = [effort(report, "target tokens")]
    if "validation" in report:
        figures = report["validation"]
        bleu = f", BLEU {figures['bleu']:.2f}" if "bleu" in figures else ""
        lines.append(f"Validation: loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}{bleu}.")
        if "ponder_time" in figures:
            lines.append(f"Steps per token: {figures['ponder_time']:.2f} ± {figures['ponder_time_std']:.2f}.")
    lines.append(f"{folder} holds the model, its card (README.md), report.json and the checkpoints. Try it:")
    lines.append("  " + PAIR_TASKS[report["task"]].try_it.format(folder=folder))
    return "\n".join(lines)


PAIR_SHOWN = {
    **SHOWN,
    "num_train_epochs": "Passes over the pairs",
    "per_device_train_batch_size": "Pairs in a batch",
    "gradient_accumulation_steps": "Batches that make one update",
    "per_device_eval_batch_size": "Pairs in a batch when measuring",
    "generation_num_beams": "Beams with which BLEU is measured; greedy without it",
    "generation_max_length": "Longest answer, in tokens; that of the longest training target without it",
}


def train_command(task: str) -> Command:
    """The command with the flags of a task."""
    row = PAIR_TASKS[task]
    return Command(
        name="train",
        description=row.description,
        usage=f"hf-efficient train [RECIPE.yaml] --task {task} --output_dir FOLDER [--flag value ...]",
        examples=row.examples,
        options=(row.options, PairArguments),
        shown=PAIR_SHOWN,
        model_settings=lambda: {name: model_settings(name, for_pairs=True) for name in PAIR_ARCHITECTURES},
        run=partial(run, train, summary),
    )


TRAIN_COMMANDS = {task: train_command(task) for task in PAIR_TASKS}
