"""`hf-efficient evaluate`: how well a saved model predicts a text, translates or answers."""

import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import read_conversations, tokenize_conversations, tokenize_pairs
from ..training import bits_per_character, bleu
from .arguments import Command, Invocation
from .errors import CommandError
from .models import check_length, default_segment_length, depth_settings, load_model, memory_settings
from .pair_scoring import answer_all, score_pairs
from .pair_tasks import check_lengths, read_translations
from .report import to_json
from .scoring import has_memory, score_lanes
from .text import TextOptions, explained

# Pairs that are read at once by default.
PAIRS_AT_ONCE = 32
ANY_LENGTH = 1 << 30


@dataclass
class EvaluateOptions(TextOptions):
    """Flags of `hf-efficient evaluate`."""

    model: str | None = field(default=None, metadata={"help": "Folder of a saved model, or its name on the Hub"})
    segment_length: int | None = field(
        default=None, metadata={"help": "Tokens that the model reads at a time; as many as `train` takes by default"}
    )
    mem_len: int | None = field(default=None, metadata={"help": "Memory length, if not that of training"})
    clamp_len: int | None = field(
        default=None, metadata={"help": "Distance beyond which all positions count as equally far, if not as trained"}
    )
    same_length: bool | None = field(
        default=None,
        metadata={
            "help": "Let every token see equally many others, as the paper does when it measures",
            "nargs": "?",
            "const": True,
        },
    )
    num_hashes: int | None = field(
        default=None, metadata={"help": "Rounds of hashing in LSH attention, if not those of training"}
    )
    num_steps: int | None = field(
        default=None, metadata={"help": "Steps of a model that repeats its layers, if not those of training"}
    )
    exit_threshold: float | None = field(
        default=None,
        metadata={"help": "Summed halting probability at which a token takes no further step, if not as trained"},
    )
    no_memory: bool = field(default=False, metadata={"help": "Read each segment on its own"})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Lanes that the text is cut into and that are read side by side; 1, the default, reads it as it "
            "stands. Of pairs, how many are read at once, by default 32"
        },
    )
    source_text: str | None = field(
        default=None, metadata={"help": "To measure translation: a text file with a sentence in each line"}
    )
    target_text: str | None = field(
        default=None, metadata={"help": "The file whose line n translates line n of --source_text"}
    )
    pairs: str | None = field(
        default=None, metadata={"help": "Instead of the two: a .tsv of source and target, or a .jsonl with these keys"}
    )
    conversations: str | None = field(
        default=None,
        metadata={"help": 'To measure answers: JSON lines with the key "turns"; of --split test, or all'},
    )
    max_turns: int = field(default=7, metadata={"help": "Turns of a conversation that the model reads"})
    num_beams: int = field(default=1, metadata={"help": "Beams with which translations are made"})
    length_penalty: float = field(
        default=1.0, metadata={"help": "With beams: their log-probabilities are divided by length to this power"}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest translation, in tokens, if not as trained"}
    )
    translations: str | None = field(default=None, metadata={"help": "File for the translations, one a line"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; the accelerator if there is one"})
    json: str | None = field(default=None, metadata={"help": "File for the figures as JSON; - prints them instead"})

    def __post_init__(self) -> None:
        for name in ("segment_length", "batch_size", "max_turns", "num_beams", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CommandError(f"--{name} {value} must be at least 1.")
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise CommandError(f"--length_penalty {self.length_penalty} chooses among beams; give --num_beams too.")
        if self.no_memory and self.mem_len:
            raise CommandError(f"--mem_len {self.mem_len} and --no_memory contradict each other; leave one out.")


def run(invocation: Invocation) -> None:
    """Print the figures, or write them as JSON."""
    (options,) = invocation.options
    if options.model is None:
        raise CommandError(f"no model given; write `{COMMAND.usage}`.")
    for name, path in (("json", options.json), ("translations", options.translations)):
        if path not in (None, "-") and Path(path).exists():
            raise CommandError(f"--{name} '{path}' is there already; name a new file.")
    kind = kind_of(invocation.given)
    figures = {"text": evaluate, "translation": evaluate_translation, "conversation": evaluate_conversation}[kind](
        options
    )
    if options.json == "-":
        print(to_json(figures))
        return
    if options.json is not None:
        Path(options.json).write_text(to_json(figures) + "\n", encoding="utf-8")
    print(table(figures, memory_matters=options.no_memory or figures.get("memory", False)))


def table(figures: dict[str, Any], memory_matters: bool) -> str:
    """The figures for people. memory_matters: whether the model has a memory that could be carried along."""
    if memory_matters:
        figures = figures | {"memory_carried": "yes" if figures["memory"] else "no"}
    return "\n".join(f"{label:<22}{form.format(figures[name])}" for name, label, form in TABLE if name in figures)


# Flags of each kind of evaluation, beside those that all have. The first kind is meant when no flag tells another.
ALL = {"model", "device", "json", "batch_size", "num_steps", "exit_threshold"}
GENERATION = {"num_beams", "length_penalty", "max_new_tokens", "translations"}
FLAGS = {
    "text": {item.name for item in fields(TextOptions)}
    | {"segment_length", "mem_len", "clamp_len", "same_length", "num_hashes", "no_memory"},
    "translation": {"source_text", "target_text", "pairs", "num_hashes"} | GENERATION,
    "conversation": {"conversations", "max_turns", "split", "num_hashes"},
}


def kind_of(given: dict[str, Any]) -> str:
    """What is to be measured, by the flags that were given. Raises CommandError for flags that do not go together."""
    named = {"text": "text", "source_text": "translation", "target_text": "translation", "pairs": "translation"}
    named["conversations"] = "conversation"
    kinds = {named[flag]: flag for flag in reversed(given) if flag in named}
    if len(kinds) > 1:
        raise CommandError(f"--{' and --'.join(kinds.values())} measure different things; give one of them.")
    kind = next(iter(kinds), "text")
    for name in given:
        if name not in ALL | FLAGS[kind]:
            raise CommandError(f"--{name} '{given[name]}' means nothing for {kind}; leave it out.")
    return kind


TABLE = (
    ("bleu", "BLEU", "{:.2f}"),
    ("length_ratio", "length ratio", "{:.3f}"),
    ("loss", "loss (nats per token)", "{:.4f}"),
    ("perplexity", "perplexity", "{:.4f}"),
    ("bits_per_byte", "bits per byte", "{:.4f}"),
    ("bits_per_character", "bits per character", "{:.4f}"),
    ("num_pairs", "pairs", "{:,}"),
    ("num_tokens", "tokens", "{:,}"),
    ("num_bytes", "bytes", "{:,}"),
    ("ponder_time", "steps per token", "{:.2f}"),
    ("ponder_time_std", "their spread", "{:.2f}"),
    ("memory_carried", "memory carried", "{}"),
    ("tokens_per_second", "tokens per second", "{:,.0f}"),
    ("seconds_of_translation", "seconds translating", "{:.1f}"),
    ("bleu_signature", "BLEU's signature", "{}"),
)


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """The figures of a saved model on a text, and the settings they were measured under."""
    assert options.model is not None  # a required flag
    model, tokenizer = load_model(options.model, options.device)
    if model.config.is_encoder_decoder:
        raise CommandError(
            f"--model '{options.model}' has encoder and decoder; measure it on --source_text and --target_text, or on "
            "--conversations."
        )
    documents = options.read("test")
    segment_length = options.segment_length or default_segment_length(model.config)
    check_length(model.config, segment_length)
    lanes = options.cut(documents, tokenizer, options.batch_size or 1, segment_length, lanes_flag="--batch_size")
    depth = depth_settings(model, num_steps=options.num_steps, exit_threshold=options.exit_threshold)
    settings = {name: getattr(options, name) for name in ("mem_len", "clamp_len", "same_length", "num_hashes")}
    with memory_settings(model.config, **settings):
        score = score_lanes(model, lanes, not options.no_memory, depth, progress="Evaluating")
        used = {name: getattr(model.config, name) for name in settings if hasattr(model.config, name)}
    return {
        "model": options.model,
        "text": options.text,
        **score.as_dict(),
        "bits_per_character": bits_per_character(score.loss, lanes.num_tokens, count_characters(documents)),
        "memory": has_memory(model) and not options.no_memory,
        **used,
        **depth,
        "segment_length": segment_length,
        "batch_size": options.batch_size or 1,
    }


def count_characters(documents: Dataset) -> int:
    """Unicode characters of all documents."""
    return sum(len(text) for batch in documents.iter(batch_size=100) for text in batch["text"])


def evaluate_translation(options: EvaluateOptions) -> dict[str, Any]:
    """Loss and BLEU of a saved model on translated sentences, and the settings they were measured under."""
    model, tokenizer = load_pair_model(options)
    pairs = read_translations(options, ("source_text", "target_text", "pairs"))
    with explained("--model"):
        tokens = tokenize_pairs(pairs, tokenizer)
    check_lengths(model, tokens, "--pairs" if options.pairs else "--source_text")
    depth = depth_settings(model, num_steps=options.num_steps, exit_threshold=options.exit_threshold)
    settings: dict[str, Any] = {"num_beams": options.num_beams}
    if options.num_beams > 1:
        settings["length_penalty"] = options.length_penalty
    if options.max_new_tokens is not None:
        settings["max_new_tokens"] = options.max_new_tokens
    batch_size = options.batch_size or PAIRS_AT_ONCE
    with memory_settings(model.config, num_hashes=options.num_hashes):
        figures = score_pairs(model, tokenizer, tokens, batch_size, depth, progress="Evaluating")
        start = time.perf_counter()
        answers = answer_all(model, tokenizer, tokens, batch_size, settings | depth, progress="Translating")
    seconds = time.perf_counter() - start
    if options.translations is not None:
        lines = (" ".join(answer.split()) + "\n" for answer in answers)
        Path(options.translations).write_text("".join(lines), encoding="utf-8")
    assert pairs is not None
    score = bleu(answers, pairs["target"][:])
    return {
        "model": options.model,
        "text": [path for path in (options.source_text, options.target_text, options.pairs) if path is not None],
        "bleu": score.bleu,
        "length_ratio": score.length_ratio,
        "bleu_signature": score.signature,
        **figures,
        "seconds_of_translation": seconds,
        **settings,
        **depth,
        "batch_size": batch_size,
    }


def evaluate_conversation(options: EvaluateOptions) -> dict[str, Any]:
    """Loss of a saved model on the turns of conversations, and the settings it was measured under."""
    assert options.conversations is not None  # by which the task was chosen
    model, tokenizer = load_pair_model(options)
    with explained("--conversations"):
        split = None if options.split == "all" else options.split or "test"
        conversations = read_conversations(options.conversations, split)
        # As much of what was said before as in training, where the tokenizer knows it, and answers of any length.
        tokens = tokenize_conversations(
            conversations, tokenizer, tokenizer.model_max_length, ANY_LENGTH, options.max_turns
        )
    check_lengths(model, tokens, "--conversations")
    depth = depth_settings(model, num_steps=options.num_steps, exit_threshold=options.exit_threshold)
    batch_size = options.batch_size or PAIRS_AT_ONCE
    with memory_settings(model.config, num_hashes=options.num_hashes):
        figures = score_pairs(model, tokenizer, tokens, batch_size, depth, progress="Evaluating")
    return {
        "model": options.model,
        "text": [options.conversations],
        **figures,
        "split": split or "all",
        "max_turns": options.max_turns,
        **depth,
        "batch_size": batch_size,
    }


def load_pair_model(options: EvaluateOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model and its tokenizer. Raises CommandError if it has no encoder and decoder."""
    assert options.model is not None  # a required flag
    model, tokenizer = load_model(options.model, options.device)
    if not model.config.is_encoder_decoder:
        raise CommandError(
            f"--model '{options.model}' continues texts and has no encoder; measure it on --text, or train one with "
            "--task translation."
        )
    return model, tokenizer


COMMAND = Command(
    name="evaluate",
    description=(
        "Measure a saved model on text. It reads segment by segment; a model with memory carries it along, so that a "
        "short segment still has a long context. A model that was trained to translate is measured on pairs of texts: "
        "BLEU too; one that was trained to converse on conversations."
    ),
    usage="hf-efficient evaluate MODEL --text TEXT [--flag value ...]",
    examples="""\
  hf-efficient evaluate runs/demo --text python-docs
  hf-efficient evaluate runs/demo --text python-docs --no_memory
  hf-efficient evaluate runs/mine --text held_out.txt --mem_len 640 --segment_length 64 --same_length --clamp_len 400
  hf-efficient evaluate runs/mine --text held_out.txt --json figures.json
  hf-efficient evaluate runs/universal --text held_out.txt --num_steps 4 --exit_threshold 0.9
  hf-efficient evaluate runs/en-de --source_text test.en --target_text test.de --num_beams 4 --length_penalty 0.6
  hf-efficient evaluate runs/talk --conversations talks.jsonl""",
    options=(EvaluateOptions,),
    positionals=("model",),
    run=run,
)
