"""The generated English-German corpus: its grammar against German written by hand."""

import random

import pytest

from hf_efficient.data import generate_phrases
from hf_efficient.data.phrase_words import LIVING, THINGS, VERBS, day_of_month, number, time_of_day
from hf_efficient.data.phrases import Clause, Pair, Phrase, action, noun_phrase, random_sentence

NOUNS = {noun.english: noun for noun in (*LIVING, *THINGS)}
OLD, RED = Pair("old", "alt"), Pair("red", "rot")


@pytest.mark.parametrize(
    ("value", "english", "german"),
    [
        (2, "two", "zwei"),
        (11, "eleven", "elf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (20, "twenty", "zwanzig"),
        (21, "twenty-one", "einundzwanzig"),
        (47, "forty-seven", "siebenundvierzig"),
        (66, "sixty-six", "sechsundsechzig"),
        (90, "ninety", "neunzig"),
        (100, "one hundred", "einhundert"),
        (112, "one hundred and twelve", "einhundertzwölf"),
        (330, "three hundred and thirty", "dreihundertdreißig"),
        (971, "nine hundred and seventy-one", "neunhunderteinundsiebzig"),
    ],
)
def test_numbers(value, english, german):
    assert number(value) == (english, german)


def test_no_two_numbers_have_the_same_name():
    words = [number(value) for value in range(1000)]
    assert len({pair.english for pair in words}) == len({pair.german for pair in words}) == 1000


@pytest.mark.parametrize(
    ("day", "month", "english", "german"),
    [
        (1, 1, "on the first of January", "am ersten Januar"),
        (2, 5, "on the second of May", "am zweiten Mai"),
        (3, 3, "on the third of March", "am dritten März"),
        (5, 7, "on the fifth of July", "am fünften Juli"),
        (7, 12, "on the seventh of December", "am siebten Dezember"),
        (8, 8, "on the eighth of August", "am achten August"),
        (12, 10, "on the twelfth of October", "am zwölften Oktober"),
        (19, 6, "on the nineteenth of June", "am neunzehnten Juni"),
        (20, 2, "on the twentieth of February", "am zwanzigsten Februar"),
        (21, 4, "on the twenty-first of April", "am einundzwanzigsten April"),
        (29, 9, "on the twenty-ninth of September", "am neunundzwanzigsten September"),
        (30, 11, "on the thirtieth of November", "am dreißigsten November"),
    ],
)
def test_days(day, month, english, german):
    assert day_of_month(day, month) == (english, german)


@pytest.mark.parametrize(
    ("hour", "minute", "english", "german"),
    [
        (1, 0, "at one o'clock", "um ein Uhr"),
        (7, 0, "at seven o'clock", "um sieben Uhr"),
        (3, 30, "at half past three", "um halb vier"),
        (12, 30, "at half past twelve", "um halb eins"),
        (5, 15, "at a quarter past five", "um Viertel nach fünf"),
        (5, 45, "at a quarter to six", "um Viertel vor sechs"),
        (2, 10, "at ten past two", "um zehn nach zwei"),
        (12, 55, "at five to one", "um fünf vor eins"),
    ],
)
def test_times(hour, minute, english, german):
    assert time_of_day(hour, minute) == (english, german)


@pytest.mark.parametrize(
    ("noun", "determiner", "is_plural", "adjective", "english", "nominative", "accusative", "dative"),
    [
        ("brother", "the", False, OLD, "the old brother", "der alte Bruder", "den alten Bruder", "dem alten Bruder"),
        (
            "sister",
            "the",
            False,
            OLD,
            "the old sister",
            "die alte Schwester",
            "die alte Schwester",
            "der alten Schwester",
        ),
        ("child", "the", False, OLD, "the old child", "das alte Kind", "das alte Kind", "dem alten Kind"),
        ("child", "the", True, OLD, "the old children", "die alten Kinder", "die alten Kinder", "den alten Kindern"),
        ("hat", "a", False, RED, "a red hat", "ein roter Hut", "einen roten Hut", "einem roten Hut"),
        ("lamp", "a", False, OLD, "an old lamp", "eine alte Lampe", "eine alte Lampe", "einer alten Lampe"),
        ("car", "a", False, RED, "a red car", "ein rotes Auto", "ein rotes Auto", "einem roten Auto"),
        ("apple", "a", False, None, "an apple", "ein Apfel", "einen Apfel", "einem Apfel"),
        ("aunt", "my", False, None, "my aunt", "meine Tante", "meine Tante", "meiner Tante"),
        ("dog", "her", True, OLD, "her old dogs", "ihre alten Hunde", "ihre alten Hunde", "ihren alten Hunden"),
        ("key", "our", False, None, "our key", "unser Schlüssel", "unseren Schlüssel", "unserem Schlüssel"),
        ("car", "the", True, None, "the cars", "die Autos", "die Autos", "den Autos"),
        ("sister", "my", True, None, "my sisters", "meine Schwestern", "meine Schwestern", "meinen Schwestern"),
        ("book", "number", True, RED, "three red books", "drei rote Bücher", "drei rote Bücher", "drei roten Büchern"),
    ],
)
def test_noun_phrases_agree(noun, determiner, is_plural, adjective, english, nominative, accusative, dative):
    phrase = noun_phrase(NOUNS[noun], determiner, is_plural, adjective, count=3)
    assert phrase.english == english
    assert phrase.german == {"nominative": nominative, "accusative": accusative, "dative": dative}


def clause(verb, tense, plural_subject=False, time=("yesterday", "gestern")):
    subject = noun_phrase(NOUNS["teacher"], "the", plural_subject, None)
    thing = noun_phrase(NOUNS["coat"], "a", False, RED)
    chosen = next(one for one in VERBS if one.prefix + one.german[0] == verb)
    return Clause(subject, action(chosen, tense, plural_subject), thing, Pair(*time))


def test_places_of_the_verb():
    spoken = clause("abholen", "past")
    assert spoken.english() == "the teacher picked up a red coat yesterday"
    assert spoken.german() == "der Lehrer holte gestern einen roten Mantel ab"
    assert spoken.german_after_time() == "gestern holte der Lehrer einen roten Mantel ab"
    assert spoken.english_question() == "did the teacher pick up a red coat yesterday"
    assert spoken.german_question() == "holte der Lehrer gestern einen roten Mantel ab"
    assert spoken.german_verb_last() == "der Lehrer gestern einen roten Mantel abholte"


@pytest.mark.parametrize(
    ("verb", "tense", "is_plural", "english", "main", "last"),
    [
        ("tragen", "present", False, "carries a red coat", "trägt einen roten Mantel", "einen roten Mantel trägt"),
        ("tragen", "present", True, "carry a red coat", "tragen einen roten Mantel", "einen roten Mantel tragen"),
        ("tragen", "past", True, "carried a red coat", "trugen einen roten Mantel", "einen roten Mantel trugen"),
        ("kaufen", "past", True, "bought a red coat", "kauften einen roten Mantel", "einen roten Mantel kauften"),
        (
            "ansehen",
            "present",
            False,
            "looks at a red coat",
            "sieht einen roten Mantel an",
            "einen roten Mantel ansieht",
        ),
        (
            "mitbringen",
            "perfect",
            False,
            "has brought along a red coat",
            "hat einen roten Mantel mitgebracht",
            "einen roten Mantel mitgebracht hat",
        ),
        (
            "abholen",
            "modal",
            True,
            "can pick up a red coat",
            "können einen roten Mantel abholen",
            "einen roten Mantel abholen können",
        ),
        (
            "suchen",
            "modal",
            False,
            "can look for a red coat",
            "kann einen roten Mantel suchen",
            "einen roten Mantel suchen kann",
        ),
    ],
)
def test_forms_of_the_verb(verb, tense, is_plural, english, main, last):
    said = clause(verb, tense, is_plural, time=("", ""))
    subjects = ("the teachers", "die Lehrer") if is_plural else ("the teacher", "der Lehrer")
    assert said.english() == f"{subjects[0]} {english}"
    assert said.german() == f"{subjects[1]} {main}"
    assert said.german_verb_last() == f"{subjects[1]} {last}"


def test_every_sentence_has_one_translation():
    rng = random.Random(0)
    translations = {}
    for _ in range(5000):
        english, german = random_sentence(rng)
        assert translations.setdefault(english, german) == german
        assert english[-1] == german[-1]
        assert (english[0] + german[0]).isupper()
        assert "  " not in english + german
    assert {english[-1] for english in translations} == {".", "?"}
    assert any(", weil " in german for german in translations.values())


def test_pronouns_have_the_gender_of_their_noun():
    rng = random.Random(1)
    pronouns = {}
    for _ in range(4000):
        english, german = random_sentence(rng)
        if english.endswith((" it.", " them.")):
            pronouns.setdefault(english.rsplit(" ", 1)[1], set()).add(german.rsplit(" ", 1)[1])
            thing = next((noun for noun in THINGS if f" {noun.english} and " in english), None)
            if thing is not None:
                assert german.endswith({"m": " ihn.", "f": " sie.", "n": " es."}[thing.gender])
    assert pronouns == {"it.": {"ihn.", "sie.", "es."}, "them.": {"sie."}}


def test_table():
    table = generate_phrases(300, seed=5)
    assert table.column_names == ["source", "target"]
    assert len(set(table["source"])) == 300
    assert generate_phrases(100, seed=5).to_list() == table.to_list()[:100]
    assert generate_phrases(100, seed=6).to_list() != table.to_list()[:100]
    with pytest.raises(ValueError, match="num_pairs=0 must be at least 1"):
        generate_phrases(0)


def test_phrases_tell_their_number():
    assert noun_phrase(NOUNS["cat"], "the", True, None).is_plural
    assert not Phrase("she", {}, "f").is_plural
