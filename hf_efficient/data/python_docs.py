"""The language reference that comes with every Python: a small corpus of real text that needs no download."""

import hashlib
import re
from collections.abc import Iterator, Mapping

SPLITS = ("train", "validation", "test")


def read_python_docs(split: str) -> Iterator[dict[str, str]]:
    """The topics of `pydoc_data.topics` that belong to `split`, in alphabetical order, one document each.

    A topic that mostly repeats a longer one ("try" is a section of "compound") is left out, so that held-out text is
    new text. The split goes by a hash of the topic's name, so a topic keeps its place from one Python to the next.
    There are about 370,000 characters, 10 % of them for validation and 8 % for test.
    """
    from pydoc_data.topics import topics  # here, because nobody else needs its half megabyte

    for name in sorted(_without_repetitions(topics)):
        if _split_of(name) == split:
            yield {"text": topics[name]}


def _split_of(name: str) -> str:
    """A tenth of all names each for validation and test, the rest for training."""
    digit = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return {0: "validation", 1: "test"}.get(digit, "train")


def _without_repetitions(topics: Mapping[str, str]) -> list[str]:
    """Names of the topics of which less than half, paragraph by paragraph, stands in longer ones."""
    kept, seen = [], set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", topics[name])]
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if 2 * repeated < sum(map(len, paragraphs)):
            kept.append(name)
            seen.update(paragraphs)
    return kept
