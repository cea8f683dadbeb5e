"""Plain data is read as pickle reads it; code in a pickle never runs; damage gives one kind of error."""

import collections
import contextlib
import io
import os
import pickle
import random
import re
import time

import pytest

from hf_efficient.conversion.restricted_pickle import GlobalName, InertRecord, MalformedPickle, read_pickle


def read(content: bytes, **kwargs):
    return read_pickle(io.BytesIO(content), **kwargs)


PLAIN = {
    "numbers": [0, 1, -1, 255, 256, -70000, 2**31, 2**100, -(2**100), 0.5, float("inf"), True, False, None],
    "text": ["", "word", "naïve 東京 😀", "x" * 300, b"", b"bytes", b"y" * 300, bytearray(b"z")],
    "nested": {"a": (1,), "b": (1, 2), "c": (1, 2, 3), "d": (1, 2, 3, 4), "e": {"f": [[], {}, ()]}, 7: {1, 2}},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_read_as_pickle_reads_it(protocol):
    content = pickle.dumps(PLAIN, protocol=protocol)
    expected = PLAIN if protocol >= 5 else {**PLAIN, "text": PLAIN["text"][:-1]}  # bytearray needs protocol 5
    found = read(content)
    if protocol < 5:
        found["text"] = found["text"][:-1]
    if protocol < 3:  # bytes are written as calls of a codec there, which stay records
        assert [type(value) for value in found["text"][4:]] == [InertRecord] * 3
        found["text"], expected["text"] = found["text"][:4], expected["text"][:4]
    assert found == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_dicts_of_the_standard_library_become_dicts(protocol):
    ordered = collections.OrderedDict([("b", 1), ("a", 2)])
    counter = collections.Counter("aab")
    found = read(pickle.dumps([ordered, counter], protocol=protocol))
    assert [type(value) for value in found] == [dict, dict]
    assert [list(value.items()) for value in found] == [[("b", 1), ("a", 2)], [("a", 2), ("b", 1)]]


def test_shared_values_stay_shared():
    shared = ["word"]
    found = read(pickle.dumps({"first": shared, "second": shared, "third": ["word"]}))
    assert found["first"] is found["second"]
    assert found["first"] is not found["third"]


def test_stream_is_left_behind_the_pickle():
    stream = io.BytesIO(pickle.dumps("one") + pickle.dumps("two") + b"rest")
    assert [read_pickle(stream), read_pickle(stream), stream.read()] == ["one", "two", b"rest"]


class Settings:
    """A class of its own, for pickles of objects."""

    def __init__(self, **values):
        self.__dict__.update(values)


class Words(list):
    """A kind of list with attributes."""


class Table(dict):
    """A kind of dict."""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_objects_become_records_of_what_they_hold(protocol):
    words = Words(["a", "b"])
    words.language = "en"
    found = read(pickle.dumps([Settings(lower_case=True), words, Table(key=1), Settings], protocol=protocol))
    assert [record.fields for record in found[:3]] == [{"lower_case": True}, {"language": "en"}, {}]
    assert found[1].items or found[1].arguments[-1] == ["a", "b"]  # protocols 0 and 1 pass them as an argument
    assert found[2].entries or found[2].arguments[-1] == {"key": 1}
    assert found[3] == GlobalName(f"{__name__}.Settings")


# --- code -------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(target: str) -> dict[str, bytes]:
    """Pickles each of which makes the folder `target` when pickle.load reads it, by different instructions."""
    path = target.encode()
    return {
        "REDUCE": pickle.dumps({"sym2idx": Calls(os.mkdir, target)}),
        "in a list": pickle.dumps([1, Calls(exec, f"import os; os.mkdir({target!r})")]),
        "GLOBAL": b"cos\nmkdir\n(S'" + path + b"'\ntR.",
        "OBJ": b"(cos\nmkdir\nS'" + path + b"'\no.",
        "INST": b"(S'" + path + b"'\nios\nmkdir\n.",
        "through getattr": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "mkdir"))[:-1]
        + b"(S'"
        + path
        + b"'\ntR.",
    }


@pytest.mark.parametrize("kind", payloads(""))
def test_code_never_runs(tmp_path, kind):
    target = tmp_path / "made"
    content = payloads(str(target))[kind]
    with contextlib.suppress(MalformedPickle):
        read(content)
    assert not target.exists()
    pickle.loads(content)  # what it would have done elsewhere, so that the check above can fail
    assert target.exists()


def test_state_never_reaches_a_class_or_function():
    # BUILD on a class: pickle would set attributes of the class itself.
    content = b"\x80\x02c" + f"{__name__}\nSettings\n".encode() + b"}U\x05addedK\x01sb."
    assert read(content) == GlobalName(f"{__name__}.Settings")
    assert not hasattr(Settings, "added")


def test_listed_functions_get_the_arguments():
    content = pickle.dumps([Calls(os.mkdir, "x", 2)])
    name = f"{os.mkdir.__module__}.mkdir"
    assert read(content, rebuild={name: lambda *arguments: arguments}) == [("x", 2)]


def test_persistent_ids():
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", 7) if value == "outside" else None

    buffer = io.BytesIO()
    Pickler(buffer).dump(["inside", "outside"])
    assert read(buffer.getvalue(), persistent=lambda identifier: identifier) == ["inside", ("storage", 7)]
    with pytest.raises(MalformedPickle, match="outside the pickle"):
        read(buffer.getvalue())


# --- damage -----------------------------------------------------------------------------------------------

MALFORMED = {
    "empty": (b"", "no pickle instruction"),
    "text": (b"hello world", "instruction"),
    "truncated": (pickle.dumps(list(range(100)))[:-3], "instruction"),
    "escape sequence that no string has": (b"S'\\o'\n.", "no pickle instruction"),
    "no operand": (b".", "lacks its operand"),
    "operand below the mark": (b"K\x01(.", "lacks its operand"),
    "no mark": (b"K\x01t.", "lacks its mark"),
    "unknown memo": (b"h\x05.", "never stored"),
    "odd dict": (b"(K\x01d.", "without its value"),
    "append to a number": (b"K\x01K\x02a.", "append to a int"),
    "assign into a list": (b"]K\x01K\x02s.", "assign into a list"),
    "unhashable key": (b"}]K\x02s.", "a list as dict key"),
    "nested key": (b"}K\x01\x85\x85K\x02s.", "a tuple as dict key"),
    "arguments that are no tuple": (b"cos\nmkdir\nK\x01R.", "not a tuple"),
    "class name that is no string": (b"K\x01K\x02\x93.", "not a string"),
    "extension registry": (b"\x82\x01.", "EXT1"),
    "out-of-band buffer": (b"\x97.", "NEXT_BUFFER"),
    "length beyond the end": (b"\x8e" + b"\xff" * 7 + b"\x7f" + b"abc.", "no pickle instruction"),
    "dict of a number": (b"ccollections\nOrderedDict\nK\x01\x85R.", "dict made from a int"),
    "set of a number": (b"cbuiltins\nset\nK\x01\x85R.", "set made from a int"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_pickles_are_refused(kind):
    content, reason = MALFORMED[kind]
    with pytest.raises(MalformedPickle, match=re.escape(reason)):
        read(content)


def test_every_truncation_is_refused():
    content = pickle.dumps(PLAIN)
    for length in range(len(content)):
        with pytest.raises(MalformedPickle):
            read(content[:length])


def flip_bits(content: bytes, generator: random.Random) -> bytes:
    """The content with one to three bits changed."""
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_changed_bits_give_a_value_or_the_one_error(protocol):
    generator = random.Random(protocol)
    records = [Settings(symbols=["a", "b"], ids={"a": 0, "b": 1}), Words("ab"), Calls(os.getcwd), PLAIN]
    content = pickle.dumps(records, protocol=protocol)
    refused = 0
    for _ in range(2000):
        try:
            read(flip_bits(content, generator))
        except MalformedPickle:
            refused += 1
    assert refused > 500


def test_deep_nesting_neither_recurses_nor_takes_long():
    start = time.perf_counter()
    depth = 200_000
    for content in (b"]" * depth + b"a" * (depth - 1) + b".", b")" + b"\x85" * depth + b"."):
        assert isinstance(read(content), list | tuple)
    with pytest.raises(MalformedPickle, match="dict key"):
        read(b"}" + b")" + b"\x85" * depth + b"K\x01s.")
    assert time.perf_counter() - start < 30
