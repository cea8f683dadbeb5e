"""The papers' learning rates: what the Trainer's schedules give against tensor2tensor's formulas."""

import math

import pytest
import torch
from training.small_pairs import evolved_transformer, prepare
from transformers import Adafactor

from hf_efficient.training import SCHEDULES, PairTrainer, PairTrainingArguments, constant_then_inverse_sqrt

STEPS, WARMUP, HIDDEN = 300, 40, 16


def formula(name: str, n: int) -> float:
    """tensor2tensor's product of factors at update n (utils/learning_rate.py), with N = STEPS and w = WARMUP."""
    constant, rsqrt_hidden_size = 2.0, HIDDEN**-0.5
    linear_warmup = min(1.0, n / WARMUP)
    rsqrt_decay = max(n, WARMUP) ** -0.5
    cosine = math.cos((max(n, WARMUP) - WARMUP) * math.pi / (STEPS - WARMUP)) / 2 + 0.5
    return {
        "transformer": constant * linear_warmup * rsqrt_decay * rsqrt_hidden_size,
        "evolved_transformer": constant / WARMUP**0.5 * linear_warmup * cosine * rsqrt_hidden_size,
        "evolved_transformer_tiny": constant / WARMUP**0.5 * cosine * rsqrt_hidden_size,
        "meena": 0.01 * min(1.0, (WARMUP / max(n, 1)) ** 0.5),
    }[name]


def rates(name, folder) -> list[float]:
    """The learning rate of every update, by the scheduler that the Trainer makes of the settings."""

    settings = SCHEDULES[name](hidden_size=HIDDEN, max_steps=STEPS, warmup_steps=WARMUP)
    args = PairTrainingArguments(str(folder), max_steps=STEPS, use_cpu=True, **settings)
    tokenizer, tokens = prepare()
    trainer = PairTrainer(evolved_transformer(), args, train_dataset=tokens, processing_class=tokenizer)
    trainer.create_optimizer_and_scheduler(STEPS)
    optimizer = trainer.optimizer
    assert isinstance(optimizer, Adafactor if name == "meena" else torch.optim.AdamW)
    if name != "meena":
        assert optimizer.defaults["betas"] == (0.9, 0.997)
        assert optimizer.defaults["eps"] == 1e-9
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        trainer.lr_scheduler.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_formula(name, tmp_path):
    expected = [formula(name, n) for n in range(STEPS)]
    assert rates(name, tmp_path) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_published_numbers():
    """The base model's: 8,000 steps of warm-up to 2 / sqrt(8000 * 512)."""
    settings = SCHEDULES["evolved_transformer"](hidden_size=512, max_steps=100_000)
    assert settings["learning_rate"] == pytest.approx(9.882e-4, rel=1e-3)
    assert settings["warmup_steps"] == 8000
    assert SCHEDULES["meena"](hidden_size=2560, max_steps=738_000)["constant_steps"] == 10_000


def test_decay_begins_after_the_constant_steps():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = constant_then_inverse_sqrt(optimizer, 4)
    found = []
    for _ in range(17):
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert found[:5] == [1.0] * 5
    assert found[16] == pytest.approx(0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_numbers_below_one_are_refused(name):
    for argument in ("hidden_size", "max_steps", "warmup_steps"):
        arguments = {"hidden_size": 16, "max_steps": 10, "warmup_steps": 2} | {argument: 0}
        with pytest.raises(ValueError, match=f"{argument}=0 must be at least 1"):
            SCHEDULES[name](**arguments)


def test_a_cosine_needs_updates_after_the_warm_up():
    for name in ("evolved_transformer", "evolved_transformer_tiny"):
        with pytest.raises(ValueError, match="warmup_steps=8000 must be less than max_steps=8000"):
            SCHEDULES[name](hidden_size=16, max_steps=8000)
