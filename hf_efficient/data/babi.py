"""bAbI: questions about short stories, each with the facts that answer it (Weston et al. 2015, arXiv 1502.05698).

A task file holds numbered lines, whose numbers begin again with each story. A line is a fact or a question, and a
question is followed, after tabs, by its answer and by the numbers of its supporting facts.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .generated_task import PAD_ID
from .text_sources import lines_of

NUM_TASKS = 20
SEPARATOR_ID = 1


class BabiQuestion(NamedTuple):
    """One question, with all facts of its story that stand before it.

    task: its number, 1 to 20; None if the file's name does not tell. facts: words of each. question: words. answer: a
    list answer, `apple,football`, is one answer. supporting_facts: indices into `facts` (from 0).
    """

    task: int | None
    facts: tuple[tuple[str, ...], ...]
    question: tuple[str, ...]
    answer: str
    supporting_facts: tuple[int, ...]


def read_babi(
    source: str | Path, tasks: int | Sequence[int] | None = None, split: str = "train", folder: str = "en-10k"
) -> Iterator[BabiQuestion]:
    """The questions of one task, or of several for joint training, one by one (Weston et al. 2015, arXiv 1502.05698).

    source: a task file, the unpacked folder, or the .tar.gz archive (read in place, never unpacked).
    tasks, split, folder: which files of a folder or an archive: `qa{task}_*_{split}.txt` in `folder` ("en" has 1,000
    questions per task and "en-10k" 10,000); None reads all tasks. A file with another name is only read if it is the
    source itself, so a partial download is not taken for the whole.

    Raises ValueError if a task has no such file, or, with file and line, if a line has another form.
    """
    if Path(source).is_file() and not Path(source).name.endswith((".tar", ".tar.gz", ".tgz")):
        yield from _questions(lines_of(source))
        return
    for task in [tasks] if isinstance(tasks, int) else tasks or range(1, NUM_TASKS + 1):
        name = re.compile(rf"{re.escape(folder)}/qa{task}_([^/]*_)?{re.escape(split)}\.txt(\.gz)?")
        yield from _questions(lines_of(source, name))


def _questions(lines: Iterable[tuple[str, str]]) -> Iterator[BabiQuestion]:
    facts: list[tuple[str, ...]] = []
    index_of_line: dict[int, int] = {}
    for place, line in lines:
        number, text = _numbered(place, line)
        if number == 1:
            facts, index_of_line = [], {}
        if "\t" not in text:
            index_of_line[number] = len(facts)
            facts.append(words_of(text))
            continue
        try:
            question, answer, supporting = (part.strip() for part in text.split("\t"))
            indices = tuple(index_of_line[int(other)] for other in supporting.split())
        except (ValueError, KeyError) as error:
            raise ValueError(f"{place}: {line!r} is not `number question`, answer and numbers of facts.") from error
        yield BabiQuestion(_task_of(place), tuple(facts), words_of(question), answer, indices)


def _numbered(place: str, line: str) -> tuple[int, str]:
    number, _, text = line.partition(" ")
    if not number.isdecimal() or not text:
        raise ValueError(f"{place}: {line!r} does not begin with a number and a space.")
    return int(number), text


def _task_of(place: str) -> int | None:
    match = re.search(r"qa(\d+)_[^/]*$", place)
    return int(match[1]) if match else None


def words_of(sentence: str) -> tuple[str, ...]:
    """The words of a sentence in lower case, without punctuation."""
    return tuple(re.findall(r"[\w'-]+", sentence.lower()))


class BabiVocabulary:
    """Ids of words, and of answers as classes.

    words: id -> word; 0 is padding and 1 separates facts. answers: class -> answer.
    Attributes: vocab_size, num_labels.
    """

    def __init__(self, words: Sequence[str], answers: Sequence[str]):
        self.words = ("<pad>", "<sep>", *words)
        self.answers = tuple(answers)
        self._word_ids = {word: index for index, word in enumerate(self.words)}
        self._answer_ids = {answer: index for index, answer in enumerate(self.answers)}

    @classmethod
    def of(cls, questions: Iterable[BabiQuestion]) -> "BabiVocabulary":
        """What occurs in these questions, in alphabetical order: give those of training and test.

        Lists of things and paths occur in tests that training does not have; models of this task classify over both.
        """
        words: set[str] = set()
        answers: set[str] = set()
        for question in questions:
            words.update(question.question, *question.facts)
            answers.add(question.answer)
        return cls(sorted(words), sorted(answers))

    @property
    def vocab_size(self) -> int:
        """Number of word ids, padding and separator among them."""
        return len(self.words)

    @property
    def num_labels(self) -> int:
        """Number of answers."""
        return len(self.answers)

    def word_ids(self, words: Iterable[str]) -> list[int]:
        """The ids of words. Raises ValueError for one that was in none of the questions."""
        return [_look_up(self._word_ids, word, "word") for word in words]

    def answer_id(self, answer: str) -> int:
        """The class of an answer. Raises ValueError for one that was in none of the questions."""
        return _look_up(self._answer_ids, answer, "answer")


def _look_up(ids: dict[str, int], name: str, kind: str) -> int:
    if name not in ids:
        raise ValueError(f"{kind}={name!r} is not in the vocabulary; make it of the questions of every split.")
    return ids[name]


def babi_features(
    question: BabiQuestion, vocabulary: BabiVocabulary, max_facts: int = 70, as_facts: bool = False
) -> dict[str, Tensor]:
    """A question for a classifier. Of a long story the last `max_facts` facts are kept (the paper's authors: 70, and
    130 for task 3).

    - "input_ids": (words,) int64, the facts, the separator after each, and the question. With `as_facts`: (facts + 1,
      longest), a row of words for each fact and, as the last row, the question: a model that adds up the words of a
      row reads a sequence of sentences, as that of Dehghani et al. 2019 does (section 3.1).
    - "labels": (), the class of the answer.

    Batch them with `PaddingCollator`.
    """
    facts = [vocabulary.word_ids(fact) for fact in question.facts[-max_facts:]]
    asked = vocabulary.word_ids(question.question)
    label = torch.tensor(vocabulary.answer_id(question.answer))
    if not as_facts:
        told = [word for fact in facts for word in (*fact, SEPARATOR_ID)]
        return {"input_ids": torch.tensor(told + asked), "labels": label}
    rows = torch.full((len(facts) + 1, max(map(len, [*facts, asked]))), PAD_ID)
    for row, words in zip(rows, [*facts, asked], strict=True):
        row[: len(words)] = torch.tensor(words)
    return {"input_ids": rows, "labels": label}
