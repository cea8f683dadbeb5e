"""The decoding sides of the Evolved Transformer at toy size, and their check."""

import importlib

import et_decode
import pytest
from et_decoding import Evolved, Marian
from harness import CheckFailed, Settings, Side

SMALL = {"vocab_size": 50}
EVOLVED = et_decode.evolved("tiny") | SMALL
MARIAN = et_decode.marian("tiny") | SMALL
ONE_THREAD = Settings(threads=1)


class SameProcess:
    """A `Worker` without a process, which would spend its time on imports."""

    def __init__(self, side, threads):
        self.side = getattr(importlib.import_module(side.module), side.name)(**side.options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, method, **arguments):
        return getattr(self.side, method)(**arguments)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr(et_decode, "Worker", SameProcess)
    monkeypatch.setattr(et_decode, "CHECKED_LENGTH", 6)


@pytest.mark.parametrize(("side", "model"), [(Evolved, EVOLVED), (Marian, MARIAN)])
@pytest.mark.parametrize("work", [{}, {"num_rows": 3}, {"num_beams": 2}, {"use_cache": False}])
def test_every_translation_has_the_length_asked_for(side, model, work):
    side = side(model=model, length=5, source_length=4, **work)
    assert side.generate().shape == (work.get("num_rows", 1), 6)
    side.run()
    assert side.units == 5


def test_a_translation_that_ends_earlier_is_no_measurement():
    side = Evolved(model=EVOLVED, length=5)
    side.settings.max_new_tokens = 3
    with pytest.raises(RuntimeError, match="have 3 tokens, not 5"):
        side.run()


def pair(**changes):
    return (
        Side("et_decoding", "Evolved", {"model": EVOLVED, "length": 9}),
        Side("et_decoding", "Marian", {"model": MARIAN | changes, "length": 9}),
    )


def test_check(monkeypatch):
    found = et_decode.check(*pair(), ONE_THREAD)
    ours, theirs = found["parameters, ours and peer"]
    # The formulas of the paper's appendix, and a Transformer's layers with the biases that Marian has.
    assert ours == 3 * (21.5 * 128**2 + 64 * 128) + 4 * (28.5 * 128**2 + 62.5 * 128) + 4 * 128 + 50 * 128
    assert 0.9 < theirs / ours < 1.1
    with pytest.raises(CheckFailed, match="not the same size"):
        et_decode.check(*pair(decoder_layers=3), ONE_THREAD)
    monkeypatch.setattr(et_decode, "LOGIT_TOLERANCE", -1.0)
    with pytest.raises(CheckFailed, match="Logits of decoding and of one pass differ"):
        et_decode.check(*pair(), ONE_THREAD)


def test_sides_do_the_same_work():
    for case in et_decode.CASES:
        ours, peer = et_decode.sides(case)
        assert {**ours.options, "model": None, "use_cache": None} == {**peer.options, "model": None, "use_cache": None}
    assert et_decode.sides("64 tokens, no cache")[1].options["use_cache"] is False
