"""English sentences and their German translations, made by a small grammar, to try translation without a corpus.

The two languages differ as they really do. German verbs stand second, their other parts last, and all of them last
behind "weil" and "dass"; articles and adjectives agree with the noun's gender, case and number; a pronoun with the
noun it stands for; "forty-seven" is "siebenundvierzig", and half past three is "halb vier". Every English sentence has
one translation, and there are many more than anyone trains on.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from datasets import Dataset

from .documents import generate_table
from .phrase_words import (
    ADJECTIVES,
    LIVING,
    MODALS,
    PREPOSITIONS,
    PRONOUNS,
    SPEECH,
    TENSES,
    THING_ADJECTIVES,
    THINGS,
    VERBS,
    Noun,
    Pair,
    Verb,
    number,
    random_time,
)
from .translation import PAIR_FEATURES

# Part of the key under which tables are cached: raise it when the same arguments would give other pairs.
GRAMMAR_VERSION = 1


def generate_phrases(num_pairs: int, seed: int = 0) -> Dataset:
    """Different English sentences with their translations: a table with the columns "source" and "target".

    The first pairs of a longer table are those of a shorter one with the same seed, so that a test set is cut off the
    end of one table rather than made with another seed.

    Raises ValueError for fewer than 1 pair.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs={num_pairs} must be at least 1.")
    arguments = {"num_pairs": num_pairs, "seed": seed, "version": GRAMMAR_VERSION}
    return generate_table(_different_pairs, arguments, PAIR_FEATURES, "train", None)


def _different_pairs(num_pairs: int, seed: int, version: int) -> Iterator[dict[str, str]]:
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < num_pairs:
        source, target = random_sentence(rng)
        if source not in seen:
            seen.add(source)
            yield {"source": source, "target": target}


# --- noun phrases ----------------------------------------------------------------------------------------------------

COLUMNS = ("m", "f", "n", "plural")
DEFINITE = {
    "nominative": ("der", "die", "das", "die"),
    "accusative": ("den", "die", "das", "die"),
    "dative": ("dem", "der", "dem", "den"),
}
# Of "ein" and the words that go like it.
EIN_ENDINGS = {
    "nominative": ("", "e", "", "e"),
    "accusative": ("en", "e", "", "e"),
    "dative": ("em", "er", "em", "en"),
}
EIN_WORDS = {"a": "ein", "my": "mein", "her": "ihr", "our": "unser"}
# Of adjectives behind these two groups and behind a number.
ADJECTIVE_ENDINGS = {
    "the": {"nominative": ("e", "e", "e", "en"), "accusative": ("en", "e", "e", "en"), "dative": ("en",) * 4},
    "a": {"nominative": ("er", "e", "es", "en"), "accusative": ("en", "e", "es", "en"), "dative": ("en",) * 4},
    "number": {"nominative": ("e",) * 4, "accusative": ("e",) * 4, "dative": ("en",) * 4},
}


class Phrase(NamedTuple):
    """A noun with what belongs to it: the English text, the German one by case."""

    english: str
    german: dict[str, str]
    column: str  # "m", "f", "n" or "plural"

    @property
    def is_plural(self) -> bool:
        return self.column == "plural"


def noun_phrase(noun: Noun, determiner: str, is_plural: bool, adjective: Pair | None, count: int = 2) -> Phrase:
    """determiner: "the", "a", "my", "her", "our", or "number" for `count` of them, which is plural; "a" never is."""
    column = "plural" if is_plural else noun.gender
    english = [adjective.english] if adjective else []
    english.append(noun.english_plural if is_plural else noun.english)
    article = "an" if determiner == "a" and english[0][0] in "aeiou" else determiner
    english.insert(0, number(count).english if determiner == "number" else article)
    group = determiner if determiner in ("the", "number") else "a"
    german = {}
    for case in DEFINITE:
        place = COLUMNS.index(column)
        words = [_german_determiner(determiner, case, place, count)]
        if adjective:
            words.append(adjective.german + ADJECTIVE_ENDINGS[group][case][place])
        words.append(_german_noun(noun, case, is_plural))
        german[case] = " ".join(words)
    return Phrase(" ".join(english), german, column)


def _german_determiner(determiner: str, case: str, place: int, count: int) -> str:
    if determiner == "number":
        return number(count).german
    if determiner == "the":
        return DEFINITE[case][place]
    return EIN_WORDS[determiner] + EIN_ENDINGS[case][place]


def _german_noun(noun: Noun, case: str, is_plural: bool) -> str:
    """The dative plural ends in n, but not behind n or s."""
    if not is_plural:
        return noun.german
    return noun.german_plural + ("n" if case == "dative" and noun.german_plural[-1] not in "ns" else "")


def random_phrase(rng: random.Random, nouns: list[Noun], may_grow: bool = True) -> Phrase:
    """may_grow: another phrase may follow it, as in "the man with the bag"."""
    determiner = rng.choice(("the", "the", "the", "a", "a", "my", "her", "our", "number"))
    is_plural = determiner == "number" or determiner != "a" and rng.random() < 0.3
    adjective = rng.choice(THING_ADJECTIVES if nouns is THINGS else ADJECTIVES) if rng.random() < 0.5 else None
    # Not 101, 201, ...: Germans do not agree on the noun behind them.
    count = rng.randint(2, 99) if rng.random() < 0.8 else rng.randint(1, 9) * 100 + rng.randint(2, 99)
    phrase = noun_phrase(rng.choice(nouns), determiner, is_plural, adjective, count)
    if not may_grow or rng.random() > 0.2:
        return phrase
    preposition, case = rng.choice(PREPOSITIONS)
    other = random_phrase(rng, THINGS, may_grow=False)
    german = {name: f"{text} {preposition.german} {other.german[case]}" for name, text in phrase.german.items()}
    return Phrase(f"{phrase.english} {preposition.english} {other.english}", german, phrase.column)


def random_subject(rng: random.Random) -> Phrase:
    """A pronoun or a living thing."""
    if rng.random() < 0.2:
        (english, german), is_plural = rng.choice(PRONOUNS)
        return Phrase(english, {"nominative": german}, "plural" if is_plural else "m")
    return random_phrase(rng, LIVING)


# --- clauses ---------------------------------------------------------------------------------------------------------


class Action(NamedTuple):
    """What the verb of a clause becomes.

    english: all of it, as in "has picked up". question: the English word in front of a question's subject, and what
    follows it. finite: the German verb that agrees with the subject. last: what stands at the end of a main clause,
    which is a `prefix` or the other verb.
    """

    english: str
    question: tuple[str, str]
    finite: str
    last: str
    prefix: str


def action(verb: Verb, tense: str, is_plural: bool, modal: tuple[Pair, str] = MODALS[0]) -> Action:
    """tense: one of `TENSES`; `modal` is for the last."""
    infinitive, third, past, participle = (" ".join(filter(None, (form, verb.particle))) for form in verb.english)
    german_infinitive, german_third, german_past, german_participle = verb.german
    if tense == "present":
        finite = german_infinitive if is_plural else german_third
        auxiliary = "do" if is_plural else "does"
        return Action(infinitive if is_plural else third, (auxiliary, infinitive), finite, verb.prefix, verb.prefix)
    if tense == "past":
        finite = german_past + ("n" if german_past.endswith("e") else "en") if is_plural else german_past
        return Action(past, ("did", infinitive), finite, verb.prefix, verb.prefix)
    if tense == "perfect":
        auxiliary, finite = ("have", "haben") if is_plural else ("has", "hat")
        return Action(f"{auxiliary} {participle}", (auxiliary, participle), finite, german_participle, "")
    (auxiliary, singular), plural = modal
    finite = plural if is_plural else singular
    return Action(f"{auxiliary} {infinitive}", (auxiliary, infinitive), finite, verb.prefix + german_infinitive, "")


class Clause(NamedTuple):
    """Who does what to whom, and when."""

    subject: Phrase
    action: Action
    object: Phrase
    time: Pair

    def english(self) -> str:
        """Subject, verb, object, time."""
        return _join(self.subject.english, self.action.english, self.object.english, self.time.english)

    def english_question(self) -> str:
        """Auxiliary, subject, verb, object, time."""
        first, rest = self.action.question
        return _join(first, self.subject.english, rest, self.object.english, self.time.english)

    def german(self) -> str:
        """Subject, verb, time, object, rest of the verb."""
        return _join(self._subject, self.action.finite, self.time.german, self._object, self.action.last)

    def german_after_time(self) -> str:
        """Time, verb, subject, object, rest of the verb."""
        return _join(self.time.german, self.action.finite, self._subject, self._object, self.action.last)

    def german_question(self) -> str:
        """Verb, subject, time, object, rest of the verb."""
        return _join(self.action.finite, self._subject, self.time.german, self._object, self.action.last)

    def german_verb_last(self) -> str:
        """Subject, time, object, the whole verb: behind "weil" and "dass"."""
        *_, finite, last, prefix = self.action
        verb = prefix + finite if prefix else _join(last, finite)
        return _join(self._subject, self.time.german, self._object, verb)

    @property
    def _subject(self) -> str:
        return self.subject.german["nominative"]

    @property
    def _object(self) -> str:
        return self.object.german["accusative"]


def _join(*parts: str) -> str:
    return " ".join(filter(None, parts))


def random_clause(rng: random.Random, needs_time: bool = False) -> Clause:
    """needs_time: it says when."""
    time, tenses = random_time(rng) if needs_time or rng.random() < 0.4 else (Pair("", ""), TENSES)
    tense = rng.choice(tenses)
    modals = [MODALS[-1]] if time.english == "tomorrow" else MODALS
    subject, verb = random_subject(rng), rng.choice(VERBS)
    objects = LIVING if verb.is_for_all and rng.random() < 0.4 else THINGS
    chosen = action(verb, tense, subject.is_plural, rng.choice(modals))
    return Clause(subject, chosen, random_phrase(rng, objects), time)


# --- sentences -------------------------------------------------------------------------------------------------------


def _statement(rng: random.Random) -> Pair:
    clause = random_clause(rng)
    return Pair(clause.english(), clause.german())


def _statement_from_time(rng: random.Random) -> Pair:
    clause = random_clause(rng, needs_time=True)
    english = f"{clause.time.english} {clause._replace(time=Pair('', '')).english()}"
    return Pair(english, clause.german_after_time())


def _question(rng: random.Random) -> Pair:
    clause = random_clause(rng)
    return Pair(clause.english_question(), clause.german_question())


def _reason(rng: random.Random) -> Pair:
    first, second = random_clause(rng), random_clause(rng)
    return Pair(f"{first.english()} because {second.english()}", f"{first.german()}, weil {second.german_verb_last()}")


def _report(rng: random.Random) -> Pair:
    speaker, clause = random_subject(rng), random_clause(rng)
    english, german = rng.choice(SPEECH)[speaker.is_plural]
    return Pair(
        f"{speaker.english} {english} that {clause.english()}",
        f"{speaker.german['nominative']} {german}, dass {clause.german_verb_last()}",
    )


# Accusative, by the column of the noun that they stand for; English needs only the number.
OBJECT_PRONOUNS = dict(zip(COLUMNS, ("ihn", "sie", "es", "sie"), strict=True))


def _pronoun(rng: random.Random) -> Pair:
    """Two verbs, the second with a pronoun for the first one's object."""
    subject, thing, tense = random_subject(rng), random_phrase(rng, THINGS, may_grow=False), rng.choice(TENSES[:2])
    first, second = (
        action(verb, tense, subject.is_plural) for verb in rng.sample([verb for verb in VERBS if not verb.particle], 2)
    )
    english, german = ("them" if thing.is_plural else "it"), OBJECT_PRONOUNS[thing.column]
    return Pair(
        f"{subject.english} {first.english} {thing.english} and {second.english} {english}",
        f"{subject.german['nominative']} {first.finite} {thing.german['accusative']} und {second.finite} {german}",
    )


# Kinds of sentences, and what they end with.
KINDS = {_statement: ".", _statement_from_time: ".", _question: "?", _reason: ".", _report: ".", _pronoun: "."}


def random_sentence(rng: random.Random) -> Pair:
    """One sentence in both languages."""
    kind, mark = rng.choice(list(KINDS.items()))
    return Pair(*(text[0].upper() + text[1:] + mark for text in kind(rng)))
