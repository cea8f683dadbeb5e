"""The words of `phrases`, English and German: nouns, verbs, adjectives, numbers, days and times."""

import random
from typing import NamedTuple


class Pair(NamedTuple):
    """Words in both languages."""

    english: str
    german: str


class Noun(NamedTuple):
    """gender: "m", "f" or "n". No noun here changes in the accusative."""

    english: str
    english_plural: str
    german: str
    german_plural: str
    gender: str


class Verb(NamedTuple):
    """A verb with an accusative object.

    english: infinitive, third person, past, participle; `particle` follows. german: infinitive, third person singular
    of present and past, participle; `prefix` is separable, and left out of all but the participle. is_for_all: the
    object may be a living thing.
    """

    english: tuple[str, str, str, str]
    german: tuple[str, str, str, str]
    particle: str = ""
    prefix: str = ""
    is_for_all: bool = True


LIVING = [
    Noun("brother", "brothers", "Bruder", "Brüder", "m"),
    Noun("sister", "sisters", "Schwester", "Schwestern", "f"),
    Noun("child", "children", "Kind", "Kinder", "n"),
    Noun("girl", "girls", "Mädchen", "Mädchen", "n"),
    Noun("teacher", "teachers", "Lehrer", "Lehrer", "m"),
    Noun("doctor", "doctors", "Arzt", "Ärzte", "m"),
    Noun("daughter", "daughters", "Tochter", "Töchter", "f"),
    Noun("son", "sons", "Sohn", "Söhne", "m"),
    Noun("dog", "dogs", "Hund", "Hunde", "m"),
    Noun("cat", "cats", "Katze", "Katzen", "f"),
    Noun("horse", "horses", "Pferd", "Pferde", "n"),
    Noun("aunt", "aunts", "Tante", "Tanten", "f"),
]
THINGS = [
    Noun("car", "cars", "Auto", "Autos", "n"),
    Noun("apple", "apples", "Apfel", "Äpfel", "m"),
    Noun("book", "books", "Buch", "Bücher", "n"),
    Noun("flower", "flowers", "Blume", "Blumen", "f"),
    Noun("key", "keys", "Schlüssel", "Schlüssel", "m"),
    Noun("letter", "letters", "Brief", "Briefe", "m"),
    Noun("lamp", "lamps", "Lampe", "Lampen", "f"),
    Noun("table", "tables", "Tisch", "Tische", "m"),
    Noun("house", "houses", "Haus", "Häuser", "n"),
    Noun("bottle", "bottles", "Flasche", "Flaschen", "f"),
    Noun("bicycle", "bicycles", "Fahrrad", "Fahrräder", "n"),
    Noun("bag", "bags", "Tasche", "Taschen", "f"),
    Noun("coat", "coats", "Mantel", "Mäntel", "m"),
    Noun("picture", "pictures", "Bild", "Bilder", "n"),
    Noun("clock", "clocks", "Uhr", "Uhren", "f"),
    Noun("hat", "hats", "Hut", "Hüte", "m"),
]
VERBS = [
    Verb(("see", "sees", "saw", "seen"), ("sehen", "sieht", "sah", "gesehen")),
    Verb(("buy", "buys", "bought", "bought"), ("kaufen", "kauft", "kaufte", "gekauft"), is_for_all=False),
    Verb(("find", "finds", "found", "found"), ("finden", "findet", "fand", "gefunden")),
    Verb(("paint", "paints", "painted", "painted"), ("malen", "malt", "malte", "gemalt")),
    Verb(("need", "needs", "needed", "needed"), ("brauchen", "braucht", "brauchte", "gebraucht")),
    Verb(("forget", "forgets", "forgot", "forgotten"), ("vergessen", "vergisst", "vergaß", "vergessen")),
    Verb(("carry", "carries", "carried", "carried"), ("tragen", "trägt", "trug", "getragen"), is_for_all=False),
    Verb(("sell", "sells", "sold", "sold"), ("verkaufen", "verkauft", "verkaufte", "verkauft"), is_for_all=False),
    Verb(("look", "looks", "looked", "looked"), ("suchen", "sucht", "suchte", "gesucht"), particle="for"),
    Verb(("pick", "picks", "picked", "picked"), ("holen", "holt", "holte", "abgeholt"), "up", "ab"),
    Verb(("bring", "brings", "brought", "brought"), ("bringen", "bringt", "brachte", "mitgebracht"), "along", "mit"),
    Verb(("look", "looks", "looked", "looked"), ("sehen", "sieht", "sah", "angesehen"), "at", "an"),
]
ADJECTIVES = [
    Pair("old", "alt"),
    Pair("young", "jung"),
    Pair("small", "klein"),
    Pair("big", "groß"),
    Pair("beautiful", "schön"),
]
THING_ADJECTIVES = [
    *(pair for pair in ADJECTIVES if pair.english != "young"),
    Pair("new", "neu"),
    Pair("red", "rot"),
    Pair("green", "grün"),
    Pair("black", "schwarz"),
    Pair("heavy", "schwer"),
]
# Prepositions and their case.
PREPOSITIONS = [
    (Pair("with", "mit"), "dative"),
    (Pair("without", "ohne"), "accusative"),
]
PRONOUNS = [(Pair("he", "er"), False), (Pair("she", "sie"), False), (Pair("we", "wir"), True)]
# Verbs before an infinitive: the third person, and the German plural.
MODALS = [(Pair("can", "kann"), "können"), (Pair("must", "muss"), "müssen"), (Pair("will", "wird"), "werden")]
# Verbs before "that": singular and plural.
SPEECH = [
    (Pair("says", "sagt"), Pair("say", "sagen")),
    (Pair("knows", "weiß"), Pair("know", "wissen")),
    (Pair("believes", "glaubt"), Pair("believe", "glauben")),
]
TENSES = ("present", "past", "perfect", "modal")
# When something happens, and the tenses that go with it.
TIMES = [
    (Pair("today", "heute"), ("present", "modal")),
    (Pair("now", "jetzt"), ("present",)),
    (Pair("tomorrow", "morgen"), ("modal",)),
    (Pair("yesterday", "gestern"), ("past",)),
    (Pair("last week", "letzte Woche"), ("past",)),
]
WEEKDAYS = [
    Pair("Monday", "Montag"),
    Pair("Tuesday", "Dienstag"),
    Pair("Wednesday", "Mittwoch"),
    Pair("Thursday", "Donnerstag"),
    Pair("Friday", "Freitag"),
    Pair("Saturday", "Samstag"),
    Pair("Sunday", "Sonntag"),
]
MONTHS = [
    Pair("January", "Januar"),
    Pair("February", "Februar"),
    Pair("March", "März"),
    Pair("April", "April"),
    Pair("May", "Mai"),
    Pair("June", "Juni"),
    Pair("July", "Juli"),
    Pair("August", "August"),
    Pair("September", "September"),
    Pair("October", "Oktober"),
    Pair("November", "November"),
    Pair("December", "Dezember"),
]

# --- numbers and times -----------------------------------------------------------------------------------------------

SMALL = [
    Pair("zero", "null"),
    Pair("one", "eins"),
    Pair("two", "zwei"),
    Pair("three", "drei"),
    Pair("four", "vier"),
    Pair("five", "fünf"),
    Pair("six", "sechs"),
    Pair("seven", "sieben"),
    Pair("eight", "acht"),
    Pair("nine", "neun"),
    Pair("ten", "zehn"),
    Pair("eleven", "elf"),
    Pair("twelve", "zwölf"),
    Pair("thirteen", "dreizehn"),
    Pair("fourteen", "vierzehn"),
    Pair("fifteen", "fünfzehn"),
    Pair("sixteen", "sechzehn"),
    Pair("seventeen", "siebzehn"),
    Pair("eighteen", "achtzehn"),
    Pair("nineteen", "neunzehn"),
]
# From twenty.
TENS = [
    Pair("twenty", "zwanzig"),
    Pair("thirty", "dreißig"),
    Pair("forty", "vierzig"),
    Pair("fifty", "fünfzig"),
    Pair("sixty", "sechzig"),
    Pair("seventy", "siebzig"),
    Pair("eighty", "achtzig"),
    Pair("ninety", "neunzig"),
]
ENGLISH_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
GERMAN_ORDINALS = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}


def number(value: int) -> Pair:
    """A number from 0 to 999 in words."""
    hundreds, rest = divmod(value, 100)
    if hundreds:
        english, german = SMALL[hundreds].english, _bound(hundreds)
        end = number(rest) if rest else Pair("", "")
        return Pair(f"{english} hundred{f' and {end.english}' if rest else ''}", f"{german}hundert{end.german}")
    tens, ones = divmod(value, 10)
    if tens < 2:
        return SMALL[value]
    english, german = TENS[tens - 2]
    return Pair(f"{english}-{SMALL[ones].english}", f"{_bound(ones)}und{german}") if ones else TENS[tens - 2]


def _bound(digit: int) -> str:
    """A German digit before another part of the number: "eins" loses its s."""
    return "ein" if digit == 1 else SMALL[digit].german


def day_of_month(day: int, month: int) -> Pair:
    """When, as "on the third of March", day and month from 1."""
    english, german = number(day)
    head, _, last = english.rpartition("-")
    if last in ENGLISH_ORDINALS:
        last = ENGLISH_ORDINALS[last]
    else:
        last = f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th"
    stem = GERMAN_ORDINALS.get(day, f"{german}{'t' if day < 20 else 'st'}")
    english_month, german_month = MONTHS[month - 1]
    return Pair(f"on the {f'{head}-' if head else ''}{last} of {english_month}", f"am {stem}en {german_month}")


def time_of_day(hour: int, minute: int) -> Pair:
    """When, as "at half past three"; hour from 1 to 12, minute 0 or a multiple of 5 up to 20 or from 40, 15, 30, 45.

    German counts half hours towards the next: half past three is "halb vier".
    """
    following = hour % 12 + 1
    if minute == 0:
        return Pair(f"at {number(hour).english} o'clock", f"um {'ein' if hour == 1 else number(hour).german} Uhr")
    if minute == 30:
        return Pair(f"at half past {number(hour).english}", f"um halb {number(following).german}")
    distance = min(minute, 60 - minute)
    english, german = ("a quarter", "Viertel") if distance == 15 else number(distance)
    shown, english_word, german_word = (hour, "past", "nach") if minute < 30 else (following, "to", "vor")
    return Pair(
        f"at {english} {english_word} {number(shown).english}", f"um {german} {german_word} {number(shown).german}"
    )


def random_time(rng: random.Random) -> tuple[Pair, tuple[str, ...]]:
    """When something happens, and the tenses that go with it."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(TIMES)
    if kind < 0.6:
        english, german = rng.choice(WEEKDAYS)
        return Pair(f"on {english}", f"am {german}"), TENSES[:2]
    if kind < 0.8:
        return day_of_month(rng.randint(1, 31), rng.randint(1, 12)), TENSES[:2]
    return time_of_day(rng.randint(1, 12), rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50, 55))), TENSES[:2]
