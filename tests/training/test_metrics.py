"""Figures of a run."""

import math
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator

from hf_efficient.training import bits_per_byte, bits_per_character, perplexity
from hf_efficient.training.metrics import LossTotals, TokenMeter


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(24.0)) == pytest.approx(24.0)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_bits_per_byte():
    # One token a byte: enwik8's bits per character are nats / ln 2.
    assert bits_per_byte(math.log(2), num_tokens=100, num_bytes=100) == pytest.approx(1.0)
    # 4 bytes a token; a document end without bytes is paid for.
    assert bits_per_byte(2 * math.log(2), num_tokens=25, num_bytes=100) == pytest.approx(0.5)
    assert bits_per_byte(2 * math.log(2), num_tokens=26, num_bytes=100) == pytest.approx(0.52)


def test_bits_per_character():
    text = "Gödel"
    assert bits_per_character(math.log(2), num_tokens=6, num_characters=len(text)) == pytest.approx(6 / 5)
    with pytest.raises(ValueError, match="num_characters=0 must be positive"):
        bits_per_character(1.0, num_tokens=1, num_characters=0)


@pytest.mark.parametrize(("tokens", "size", "name"), [(0, 1, "num_tokens=0"), (1, 0, "num_bytes=0")])
def test_empty_text_is_refused(tokens, size, name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        bits_per_byte(1.0, num_tokens=tokens, num_bytes=size)


GROWTH = """
import torch
from hf_efficient.training import peak_memory_mb

before = peak_memory_mb()
torch.ones(64 * 2**20)
print(peak_memory_mb("cpu") - before)
"""


def test_peak_memory_grows():
    # In a process of its own: this one's peak may lie in an earlier test.
    finished = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True)
    assert 200 < float(finished.stdout) < 600


def test_loss_totals_weigh_tokens_not_batches():
    totals = LossTotals("cpu")
    totals.add(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5, 6, 7]]))
    totals.add(torch.tensor([[10.0, 0.0, 0.0]]), torch.tensor([[5, -100, -100]]))
    assert totals.mean(Accelerator(cpu=True)) == 4.0


def test_loss_totals_without_tokens_are_nan():
    assert math.isnan(LossTotals("cpu").mean(Accelerator(cpu=True)))


def test_loss_totals_keep_small_terms():
    totals = LossTotals("cpu")
    labels = torch.ones(1, 1, dtype=torch.int64)
    for loss in (1e8, 1.0, 1.0):
        totals.add(torch.tensor([[loss]]), labels)
    assert totals.mean(Accelerator(cpu=True)) * 3 == 1e8 + 2


def test_token_meter_leaves_pauses_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = TokenMeter()
    assert meter.lap() == meter.tokens_per_second == 0.0
    meter.start()
    meter.add(torch.tensor(300))
    meter.add(100)
    now += 3.0
    meter.start()
    with meter.paused():
        now += 50.0
    now += 1.0
    assert meter.lap() == 100.0
    meter.add(50)
    now += 1.0
    assert meter.lap() == 50.0
    assert meter.num_tokens == 450
    assert meter.tokens_per_second == 90.0
