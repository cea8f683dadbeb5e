"""Scores of a pass over a text, against one long forward pass."""

import math

import pytest
import torch
from datasets import Dataset

from hf_efficient import TransformerXLConfig, TransformerXLForCausalLM
from hf_efficient.cli.scoring import score_lanes
from hf_efficient.data import segment_lanes

LENGTH = 50


@pytest.fixture
def model():
    config = TransformerXLConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, mem_len=64
    )
    return TransformerXLForCausalLM(config).eval()


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (LENGTH,), generator=generator)
    return Dataset.from_dict({"input_ids": [ids.tolist()], "num_bytes": [120]})


def whole_pass(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()


def test_memory_makes_segments_one_long_pass(model, tokens):
    score = score_lanes(model, segment_lanes(tokens, 1, 8))
    assert score.loss == pytest.approx(whole_pass(model, tokens[0]["input_ids"]), rel=1e-5)
    assert (score.num_tokens, score.num_bytes) == (LENGTH, 120)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(score.loss / math.log(2) * LENGTH / 120)
    assert score.as_dict()["tokens_per_second"] > 0


def test_without_memory_each_segment_stands_alone(model, tokens):
    ids = tokens[0]["input_ids"]
    with torch.no_grad():
        starts = range(0, LENGTH, 10)
        logits = torch.cat([model(input_ids=torch.tensor([ids[start : start + 10]])).logits[0] for start in starts])
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
    score = score_lanes(model, segment_lanes(tokens, 1, 10), carry_memory=False)
    assert score.loss == pytest.approx(expected, rel=1e-5)


def test_the_logits_are_not_computed(model, tokens):
    kept = []
    model.register_forward_hook(lambda module, inputs, output: kept.append(output.logits.shape[1]))
    score_lanes(model, segment_lanes(tokens, 1, 10))
    assert kept == [1] * 5


def test_lanes_start_without_memory(model, tokens):
    ids = tokens[0]["input_ids"]
    lanes = segment_lanes(tokens, 2, 8)
    halves = [whole_pass(model, half) for half in (ids[: LENGTH // 2], ids[LENGTH // 2 :])]
    assert score_lanes(model, lanes).loss == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_progress_bar_on_request(model, tokens, capsys):
    score_lanes(model, segment_lanes(tokens, 1, 8))
    assert capsys.readouterr().err == ""
    score_lanes(model, segment_lanes(tokens, 1, 8), progress="Reading")
    assert "Reading" in capsys.readouterr().err
