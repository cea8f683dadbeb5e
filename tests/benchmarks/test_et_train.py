"""The training sides of the Evolved Transformer at toy size, and their check."""

import importlib

import et_train
import pytest
import torch
from et_training import Evolved, Marian
from harness import CheckFailed, Settings, Side

SMALL = {"vocab_size": 50}
EVOLVED = et_train.evolved("tiny") | SMALL
MARIAN = et_train.marian("tiny") | SMALL
BATCH = {"batch_size": 4, "length": 8}


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
    monkeypatch.setattr(et_train, "Worker", SameProcess)


def pair(**changes):
    ours = Side("et_training", "Evolved", {"model": EVOLVED, **BATCH})
    return ours, Side("et_training", "Marian", {"model": MARIAN | changes, **BATCH})


def test_both_sides_get_the_same_batch():
    ours, peer = Evolved(model=EVOLVED, **BATCH).batch, Marian(model=MARIAN, **BATCH).batch
    for name, tensor in ours.items():
        assert torch.equal(tensor, peer[name])
    assert ours["attention_mask"].sum(dim=1).tolist() == [8, 6, 8, 6]
    assert ((ours["labels"] == -100) == (ours["attention_mask"] == 0)).all()


@pytest.mark.parametrize(("side", "model"), [(Evolved, EVOLVED), (Marian, MARIAN)])
def test_a_step_moves_every_parameter_and_leaves_no_gradient(side, model):
    side = side(model=model, **BATCH)
    before = {name: value.clone() for name, value in side.model.named_parameters() if value.requires_grad}
    side.run()
    assert all(value.grad is None for value in side.model.parameters())
    after = dict(side.model.named_parameters())
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]


def test_check_finds_what_it_looks_for(monkeypatch):
    found = et_train.check(*pair(), Settings(threads=1))
    assert len(found["parameters, ours and peer"]) == 2
    with pytest.raises(CheckFailed, match="not the same size"):
        et_train.check(*pair(decoder_layers=3), Settings(threads=1))
    with monkeypatch.context() as patch:
        patch.setattr(Evolved, "is_padding_ignored", lambda side: False)
        with pytest.raises(CheckFailed, match="loss of ours depends on what stands at pads"):
            et_train.check(*pair(), Settings(threads=1))
    monkeypatch.setattr(Marian, "losses", lambda side, steps: [1.0, 1.5])
    with pytest.raises(CheckFailed, match="loss of peer does not fall"):
        et_train.check(*pair(), Settings(threads=1))


def test_cases_are_of_equal_dropout():
    for case in et_train.CASES:
        for side in et_train.sides(case):
            assert {name: side.options["model"][name] for name in et_train.DROPOUT} == et_train.DROPOUT
