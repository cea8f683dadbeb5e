"""Text as the command line names it: read into documents, tokenised, cut into lanes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import SegmentLanes, load_documents, segment_lanes, tokenize_documents
from .errors import USER_ERRORS, CommandError, one_sentence

TEXT_HELP = "Text file(s), a folder of text files, the name of a dataset, or python-docs, which comes with Python"


@dataclass
class TextOptions:
    """Flags that say what text to read and how."""

    text: list[str] | None = field(default=None, metadata={"help": TEXT_HELP})
    split: str | None = field(default=None, metadata={"help": "Split of the text, for sources that have several"})
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text"})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, such as wikitext-103-raw-v1"}
    )
    document_separator: str = field(
        default="file", metadata={"help": "What a document is in text files: file, line, blank_line or wikitext"}
    )
    document_boundaries: str = field(
        default="ignore",
        metadata={"help": "ignore: the memory runs on from document to document; reset: each starts with none"},
    )
    eos_per_line: bool = field(
        default=False, metadata={"help": "End every line with <eos>, as the paper does for WikiText-103"}
    )
    no_eos: bool = field(
        default=False, metadata={"help": "Put no <eos> behind a document, as the paper does for enwik8 and text8"}
    )

    def read(self, usual_split: str) -> Dataset:
        """The documents of `--text`. Raises CommandError if there are none."""
        return self.read_source("--text", self.text, self.split, usual_split)

    def read_source(self, flag: str, source: list[str] | None, split: str | None, usual_split: str) -> Dataset:
        """The documents of `source`, which `flag` named. Raises CommandError if there are none.

        usual_split: what to read when `split` is None and the source has splits; files given by name have none.
        """
        if not source:
            raise CommandError(f"{flag} is missing; give a text file, a folder, a dataset's name, or python-docs.")
        are_files = all(Path(name).is_file() for name in source)
        with explained(flag):
            return load_documents(
                source[0] if len(source) == 1 else source,
                split=split or ("train" if are_files else usual_split),
                text_column=self.text_column,
                config_name=self.dataset_config,
                document_separator=self.document_separator,
            )

    def cut(
        self,
        documents: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        num_lanes: int,
        segment_length: int,
        flag: str = "--text",
        lanes_flag: str = "--per_device_train_batch_size",
    ) -> SegmentLanes:
        """The documents as lanes of segments.

        flag: that of the text. lanes_flag: that of the number of lanes.

        Raises CommandError, naming them, if there are too few tokens.
        """
        with explained(flag):
            tokens = tokenize_documents(documents, tokenizer, add_eos=not self.no_eos, eos_per_line=self.eos_per_line)
        with explained(f"{flag} is cut into {lanes_flag} lanes"):
            return segment_lanes(tokens, num_lanes, segment_length, document_boundaries=self.document_boundaries)


@contextmanager
def explained(flag: str) -> Iterator[None]:
    """Put the name of the flag in front of whatever is wrong with its value."""
    try:
        yield
    except (*USER_ERRORS, TypeError) as error:
        raise CommandError(f"{flag}: {one_sentence(error)}") from error
