"""Subject-verb agreement: does a language model prefer the verb that fits its subject?

Linzen, Dupoux and Goldberg 2016 (arXiv 1611.01368): sentences of Wikipedia up to a verb in the present tense, grouped
by the number of attractors, nouns of the other number between subject and verb. Marvin and Linzen 2018 (arXiv
1808.09031): pairs of made sentences that differ in one word, grouped by construction. Dehghani et al. 2019, section
3.3, train on the first as language modelling and rank the right form against the wrong one.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .continuations import score_continuations
from .text_sources import lines_of

VERB_TAGS = ("VBZ", "VBP")  # singular, plural; the index is the label
IRREGULAR = {"is": "are", "has": "have", "does": "do"}


class AgreementSentence(NamedTuple):
    """A sentence up to a verb whose number its subject decides.

    words: before the verb. tag: the verb's number, "VBZ" (singular) or "VBP" (plural). verb: the verb itself, None if
    the source leaves it out. num_attractors: nouns of the other number between subject and verb; None if unknown.
    """

    words: tuple[str, ...]
    tag: str
    verb: str | None
    num_attractors: int | None


class AgreementPair(NamedTuple):
    """Two texts of which a model should find the first likelier. group: what accuracies are reported by."""

    right: str
    wrong: str
    group: str


# --- reading ---------------------------------------------------------------------------------------------------------


def read_number_prediction(source: str | Path) -> Iterator[AgreementSentence]:
    """The sentences of `numpred.*` files, `VBZ` or `VBP`, a tab and the words before the verb in a line.

    From Linzen et al. 2016, arXiv 1611.01368.

    source: one file, which may end with .gz. A name such as numpred.test.2 tells the number of attractors.
    Raises ValueError, with file and line, for a line of another form.
    """
    number = re.search(r"numpred\.test\.(\d+)", Path(source).name)
    num_attractors = int(number[1]) if number else None
    for place, line in lines_of(source):
        tag, _, words = line.partition("\t")
        if tag not in VERB_TAGS or not words.strip():
            raise ValueError(f"{place}: {line!r} is not VBZ or VBP, a tab and words.")
        yield AgreementSentence(tuple(words.split()), tag, None, num_attractors)


def read_agreement_table(source: str | Path) -> Iterator[AgreementSentence]:
    """The sentences of the whole table, `agr_50_mostcommon_10K.tsv`, which may end with .gz.

    From Linzen et al. 2016, arXiv 1611.01368.

    As in the paper, attractors are only counted where all nouns between subject and verb are attractors; elsewhere
    `num_attractors` is None. Raises ValueError for a table without the columns that it needs.
    """
    lines = (line for _, line in lines_of(source))
    for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
        try:
            words, index = row["sentence"].split(), int(row["verb_index"]) - 1
            attractors, between = int(row["n_diff_intervening"]), int(row["n_intervening"])
            yield AgreementSentence(
                tuple(words[:index]), row["verb_pos"], words[index], attractors if attractors == between else None
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"source='{source}' has a row that is not of Linzen's table: {row}.") from error


def read_minimal_pairs(source: str | Path) -> Iterator[AgreementPair]:
    """The pairs of Marvin and Linzen 2018: construction, variant, right and wrong sentence, with tabs between them.

    From Marvin and Linzen 2018, arXiv 1808.09031.

    A line with two wrong sentences makes two pairs. Raises ValueError, with file and line, for a line of another form.
    """
    for place, line in lines_of(source):
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) < 4:
            raise ValueError(f"{place}: {line!r} is not construction, variant, right and wrong sentence.")
        for wrong in columns[3:]:
            yield AgreementPair(columns[2], wrong, columns[0])


# --- pairs -----------------------------------------------------------------------------------------------------------


def agreement_pairs(sentences: Iterable[AgreementSentence]) -> Iterator[AgreementPair]:
    """Each sentence with its verb in the right form and in the wrong one, grouped by attractors.

    Where the source leaves the verb out, its tag stands in its place: train on texts that end with the tag, as
    `sentence_text` makes them. Verbs whose other form occurs nowhere in `sentences` are left out.
    """
    sentences = list(sentences)
    other_form = inflections(sentences)
    for sentence in sentences:
        wrong = _other_tag(sentence.tag) if sentence.verb is None else other_form.get((sentence.verb, sentence.tag))
        if wrong is not None:
            group = "unknown" if sentence.num_attractors is None else str(sentence.num_attractors)
            yield AgreementPair(sentence_text(sentence), " ".join([*sentence.words, wrong]), group)


def sentence_text(sentence: AgreementSentence) -> str:
    """The words up to and including the verb, or its tag: a text to train a language model on."""
    return " ".join([*sentence.words, sentence.verb or sentence.tag])


def inflections(sentences: Iterable[AgreementSentence]) -> dict[tuple[str, str], str]:
    """For each verb with its tag, the form of the other number, as far as both occur."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for sentence in sentences:
        if sentence.verb is not None:
            seen[sentence.tag].add(sentence.verb)
    forms = {}
    for plural in seen["VBP"]:
        for singular in _singular_forms(plural):
            if singular in seen["VBZ"]:
                forms[plural, "VBP"], forms[singular, "VBZ"] = singular, plural
    return forms


def _singular_forms(plural: str) -> list[str]:
    """What the third person singular of a verb may be spelt like."""
    irregular = [singular for singular, other in IRREGULAR.items() if other == plural]
    return irregular or [f"{plural}s", f"{plural}es", f"{plural[:-1]}ies"]


def _other_tag(tag: str) -> str:
    return VERB_TAGS[1 - VERB_TAGS.index(tag)]


# --- measuring -------------------------------------------------------------------------------------------------------


def agreement_accuracy(
    model: PreTrainedModel, encode: Callable[[str], list[int]], pairs: Iterable[AgreementPair], batch_size: int = 16
) -> dict[str, float]:
    """Share of the pairs whose right text is likelier, for each group and as "total" (the mean over all pairs).

    model: a causal language model in evaluation mode. encode: text -> ids; it has to begin with a token that begins
    every text (end of sequence, for example), so that the first word has a probability too. Ties count as wrong.
    """
    pairs = list(pairs)
    texts = [encode(text) for pair in pairs for text in (pair.right, pair.wrong)]
    scores = [
        score.log_probability
        for score in score_continuations(model, [(ids[:1], ids[1:]) for ids in texts], batch_size)
    ]
    hits = defaultdict(list)
    for pair, right, wrong in zip(pairs, scores[::2], scores[1::2], strict=True):
        for group in (pair.group, "total"):
            hits[group].append(right > wrong)
    return {group: sum(found) / len(found) for group, found in sorted(hits.items())}


def number_features(sentence: AgreementSentence, encode: Callable[[str], list[int]]) -> dict[str, Tensor]:
    """A sentence for a classifier: "input_ids" of the words before the verb, "labels" 0 for singular, 1 for plural."""
    input_ids = torch.tensor(encode(" ".join(sentence.words)))
    return {"input_ids": input_ids, "labels": torch.tensor(VERB_TAGS.index(sentence.tag))}
