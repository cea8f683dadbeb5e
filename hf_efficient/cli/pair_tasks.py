"""The tasks of `hf-efficient train` that map a text to a text: what their flags are and how their data is read.

A further task is a further row of `PAIR_TASKS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import (
    conversation_texts,
    load_tokenizer,
    read_conversations,
    read_pairs,
    read_parallel,
    seq2seq_tokenizer,
    tokenize_conversations,
    tokenize_pairs,
    train_seq2seq_tokenizer,
)
from ..training import SCHEDULES
from .errors import CommandError
from .models import PAIR_ARCHITECTURES, num_positions
from .pretrained import PRETRAINED_HELP
from .recipes import RECIPE_SUFFIXES, read_recipe
from .text import explained

LANGUAGE_MODELING = "language_modeling"
TASK_HELP = (
    "language_modeling, translation or conversation; `hf-efficient train --task translation --help` explains its flags"
)
# Tokenizers that `hf-efficient train` makes for language models alone.
TEXT_TOKENIZERS = ("byte", "shifted_byte", "char", "shifted_bpe", "word")


@dataclass
class PairOptions:
    """Flags that every task on pairs has, beside those of the trainer."""

    task: str = field(default="", metadata={"help": TASK_HELP})
    tokenizer: str = field(
        default="bpe", metadata={"help": "bpe, made from both sides of the pairs, or a saved tokenizer"}
    )
    tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "Size of the vocabulary to make; 16384 by default"}
    )
    lowercase: bool = field(
        default=False,
        metadata={"help": "Make a tokenizer that lower-cases the text; BLEU while training then ignores case"},
    )
    architecture: str = field(
        default="evolved_transformer", metadata={"help": "Kind of the model", "choices": PAIR_ARCHITECTURES}
    )
    pretrained: str | None = field(default=None, metadata={"help": PRETRAINED_HELP})
    max_source_length: int | None = field(
        default=None, metadata={"help": "Pairs with a source of more tokens are left out of the training"}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Pairs with a target of more tokens are left out of the training"}
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "A paper's optimiser and course of the learning rate, for the model's width; --warmup_steps alone "
            "may change it",
            "choices": list(SCHEDULES),
        },
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of the run in --output_dir"})

    # Whether answers have one right form, to which BLEU compares them, and whether each row of the data is one pair.
    has_references = True
    rows_are_pairs = True

    def __post_init__(self) -> None:
        for name in ("tokenizer_vocab_size", "max_source_length", "max_target_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CommandError(f"--{name} {value} must be at least 1.")
        if self.tokenizer != "bpe" and (self.lowercase or self.tokenizer_vocab_size is not None):
            raise CommandError(
                f"--tokenizer '{self.tokenizer}' is made already; leave --lowercase and --tokenizer_vocab_size out."
            )

    def read(self) -> Dataset:
        """What to train on. Raises CommandError if it is missing or wrong."""
        raise NotImplementedError

    def read_validation(self) -> Dataset | None:
        """What to measure on, if there is any."""
        raise NotImplementedError

    def tokenize(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, every_pair: bool = False) -> Dataset:
        """The tokens of the pairs in `data`; `every_pair` leaves out none for its length."""
        raise NotImplementedError

    def texts(self, data: Dataset) -> Dataset:
        """What a tokenizer is made from."""
        return data

    def files(self, for_validation: bool = False) -> list[str]:
        """The files that were read, for the report."""
        raise NotImplementedError

    def make_tokenizer(self, data: Dataset) -> PreTrainedTokenizerBase:
        """The tokenizer that `--tokenizer` asks for, made from the training pairs or loaded."""
        with explained("--tokenizer"):
            if self.tokenizer == "bpe":
                tokenizer = train_seq2seq_tokenizer(self.texts(data), self.tokenizer_vocab_size, self.lowercase)
            elif self.tokenizer in TEXT_TOKENIZERS:
                raise ValueError(f"{self.tokenizer!r} is for language models; give bpe, or a saved one")
            else:
                tokenizer = seq2seq_tokenizer(load_tokenizer(self.tokenizer))
        if self.max_source_length is not None:
            tokenizer.model_max_length = self.max_source_length
        return tokenizer


@dataclass
class TranslationOptions(PairOptions):
    """Flags of `hf-efficient train --task translation`."""

    source_text: str | None = field(
        default=None, metadata={"help": "Text file with a sentence in each line; it may end with .gz"}
    )
    target_text: str | None = field(
        default=None, metadata={"help": "Text file whose line n translates line n of --source_text"}
    )
    pairs: str | None = field(
        default=None, metadata={"help": "Instead of the two: a .tsv of source and target, or a .jsonl with these keys"}
    )
    validation_source: str | None = field(default=None, metadata={"help": "The same, to measure on"})
    validation_target: str | None = field(default=None, metadata={"help": "The same, to measure on"})
    validation_pairs: str | None = field(default=None, metadata={"help": "The same, to measure on"})

    def read(self) -> Dataset:
        """The training pairs."""
        pairs = read_translations(self, ("source_text", "target_text", "pairs"))
        if pairs is None:
            raise CommandError(
                "--source_text is missing; give it and --target_text, two files line by line, or one file as --pairs."
            )
        return pairs

    def read_validation(self) -> Dataset | None:
        """The validation pairs."""
        return read_translations(self, ("validation_source", "validation_target", "validation_pairs"))

    def tokenize(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, every_pair: bool = False) -> Dataset:
        """The tokens of both sides."""
        if every_pair:
            return tokenize_pairs(data, tokenizer)
        with explained("--max_source_length"):
            return tokenize_pairs(data, tokenizer, self.max_source_length, self.max_target_length)

    def files(self, for_validation: bool = False) -> list[str]:
        """Source and target, or the one file."""
        names = ("source_text", "target_text", "pairs")
        if for_validation:
            names = ("validation_source", "validation_target", "validation_pairs")
        return [getattr(self, name) for name in names if getattr(self, name) is not None]


def read_translations(options: object, flags: tuple[str, str, str]) -> Dataset | None:
    """The pairs of two files or of one, whichever the three flags name; None if they name none.

    Raises CommandError if they name something else, or the files cannot be read.
    """
    source, target, pairs = (getattr(options, name) for name in flags)
    if pairs is not None and (source is not None or target is not None):
        raise CommandError(f"--{flags[2]} '{pairs}' stands instead of --{flags[0]} and --{flags[1]}; leave one out.")
    if pairs is not None:
        with explained(f"--{flags[2]}"):
            return read_pairs(pairs)
    for name, value, other in ((flags[0], source, target), (flags[1], target, source)):
        if value is None and other is not None:
            raise CommandError(f"--{name} is missing; give the file whose lines belong to those of '{other}'.")
    if source is None:
        return None
    with explained(f"--{flags[0]}"):
        return read_parallel(source, target)


def check_lengths(model: PreTrainedModel, tokens: Dataset | None, flag: str) -> None:
    """Raises CommandError if a side of a pair has more tokens than the model has positions."""
    positions = num_positions(model.config)
    if positions is None or tokens is None:
        return
    longest = max(max(map(len, batch[side])) for batch in tokens.iter(1000) for side in ("input_ids", "labels"))
    if longest > positions:
        raise CommandError(
            f"{flag}: the longest text has {longest} tokens, more than the {positions} positions of the model; allow "
            "fewer, or give the model more (max_position_embeddings, and axial_pos_shape where it has that)."
        )


@dataclass
class ConversationOptions(PairOptions):
    """Flags of `hf-efficient train --task conversation`."""

    max_source_length: int | None = field(
        default=128, metadata={"help": "Most tokens of what was said before; older turns are left out"}
    )
    max_target_length: int | None = field(
        default=64, metadata={"help": "Answers of more tokens are left out of the training"}
    )
    conversations: str | None = field(
        default=None,
        metadata={"help": 'JSON lines with the key "turns"; 2 %% are held out to measure on, 2 %% to evaluate'},
    )
    validation_conversations: str | None = field(
        default=None, metadata={"help": "File to measure on, instead of what is held out of --conversations"}
    )
    max_turns: int = field(default=7, metadata={"help": "Turns of a conversation that the model reads"})

    has_references = False
    rows_are_pairs = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_turns < 1:
            raise CommandError(f"--max_turns {self.max_turns} must be at least 1.")

    def read(self) -> Dataset:
        """The training conversations: all of them if others are given to measure on."""
        if self.conversations is None:
            raise CommandError('--conversations is missing; give a file of JSON lines such as {"turns": ["Hi."]}.')
        with explained("--conversations"):
            return read_conversations(
                self.conversations, None if self.validation_conversations is not None else "train"
            )

    def read_validation(self) -> Dataset | None:
        """The conversations to measure on."""
        if self.validation_conversations is not None:
            with explained("--validation_conversations"):
                return read_conversations(self.validation_conversations)
        assert self.conversations is not None  # by which the task was chosen
        with explained("--conversations"):
            return read_conversations(self.conversations, "validation")

    def tokenize(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, every_pair: bool = False) -> Dataset:
        """The tokens of every turn and of the turns before it; lengths hold for measuring too."""
        with explained("--max_source_length"):
            lengths = self.max_source_length, self.max_target_length
            # They are numbers, unlike those of pairs, which have no limit by default.
            return tokenize_conversations(data, tokenizer, *lengths, self.max_turns)  # type: ignore[arg-type]

    def texts(self, data: Dataset) -> Dataset:
        """Every turn once."""
        return conversation_texts(data)

    def files(self, for_validation: bool = False) -> list[str]:
        """The one file."""
        chosen = (self.validation_conversations if for_validation else None) or self.conversations
        return [] if chosen is None else [chosen]


@dataclass(frozen=True)
class PairTask:
    """One value of `--task`, beside language modelling.

    options: its flags. description, examples: for the help page. try_it: a command for the saved model in a folder.
    """

    options: type[PairOptions]
    description: str
    examples: str
    try_it: str


PAIR_TASKS = {
    "translation": PairTask(
        TranslationOptions,
        description="Train an encoder-decoder model to translate, on sentences and their translations.",
        examples="""\
  hf-efficient train --task translation --source_text train.en --target_text train.de --output_dir runs/en-de
  hf-efficient train --task translation --pairs pairs.tsv --output_dir runs/mine --architecture universal_transformer
  hf-efficient train --task translation --pairs more.tsv --output_dir runs/tuned --pretrained runs/mine
  hf-efficient train examples/evolved_transformer_translation_cpu.yaml --source_text train.en --target_text train.de \\
      --validation_source val.en --validation_target val.de --output_dir runs/en-de""",
        try_it='hf-efficient generate {folder} "A sentence to translate."',
    ),
    "conversation": PairTask(
        ConversationOptions,
        description="Train an encoder-decoder model to answer in a conversation, on conversations of others.",
        examples="""\
  hf-efficient train --task conversation --conversations talks.jsonl --output_dir runs/talk
  hf-efficient train --task conversation --conversations talks.jsonl --output_dir runs/talk --schedule meena""",
        try_it="hf-efficient generate {folder} --interactive",
    ),
}


def task_of(arguments: Sequence[str]) -> str:
    """The task that a command line or its recipe names.

    Raises CommandError for an unknown one, and for a flag of a task that is not named.
    """
    task = _named_task(arguments)
    tasks = (LANGUAGE_MODELING, *PAIR_TASKS)
    if task is not None and task not in tasks:
        raise CommandError(f"--task '{task}' is none of {', '.join(tasks)}.")
    if task is None:
        _check_flags(arguments)
    return task or LANGUAGE_MODELING


def _named_task(arguments: Sequence[str]) -> str | None:
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--task":
            return value if equals else next(iter(arguments[place + 1 :]), "")
    if arguments and arguments[0].endswith(RECIPE_SUFFIXES):
        task = read_recipe(Path(arguments[0])).get("task")
        return None if task is None else str(task)
    return None


def _check_flags(arguments: Sequence[str]) -> None:
    """Raises CommandError for a flag that only one task has."""
    for name, row in PAIR_TASKS.items():
        inherited = {item.name for item in fields(PairOptions)}
        own = {f"--{item.name}" for item in fields(row.options) if item.name not in inherited}
        flag = next((word for word in arguments if word.partition("=")[0] in own), None)
        if flag is not None:
            raise CommandError(f"{flag.partition('=')[0]} is a flag of another task; add `--task {name}`.")
