"""Scores against a float64 pass of each sample alone, the order, and what is refused."""

import copy
import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, set_seed

from hf_efficient import (
    EvolvedTransformerConfig,
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
    UniversalTransformerConfig,
    UniversalTransformerForCausalLM,
    UniversalTransformerForConditionalGeneration,
)
from hf_efficient.generation import sample_and_rank

VOCAB_SIZE, PAD, EOS = 11, 0, 1
IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
UNIVERSAL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_steps": 2}


def with_opinions(model):
    """`model` in evaluation mode with weights so large that it finds some tokens much likelier than others."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    return model.eval()


def universal(encoder):
    config = UniversalTransformerConfig(
        vocab_size=VOCAB_SIZE, is_encoder_decoder=encoder, is_decoder=not encoder, **IDS, **UNIVERSAL
    )
    kind = UniversalTransformerForConditionalGeneration if encoder else UniversalTransformerForCausalLM
    return kind(config)


def evolved(encoder):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    config = EvolvedTransformerConfig(
        vocab_size=VOCAB_SIZE, is_encoder_decoder=encoder, is_decoder=not encoder, **IDS, **sizes
    )
    return (EvolvedTransformerForConditionalGeneration if encoder else EvolvedTransformerForCausalLM)(config)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, **sizes, **IDS))


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_SIZE, **sizes, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
    )


MODELS = {
    "evolved_seq2seq": lambda: evolved(encoder=True),
    "evolved_causal": lambda: evolved(encoder=False),
    "universal_seq2seq": lambda: universal(encoder=True),
    "universal_causal": lambda: universal(encoder=False),
    "t5": t5,
    "gpt2": gpt2,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    set_seed(0)
    return with_opinions(MODELS[request.param]())


@pytest.fixture(scope="module")
def causal():
    set_seed(0)
    return with_opinions(universal(encoder=False))


PROMPTS = ([7, 3, 9, 2], [5, 8])


def batch_of(model):
    """The prompts as a batch, padded where the model wants it."""
    longest = max(map(len, PROMPTS))
    pads = [[PAD] * (longest - len(prompt)) for prompt in PROMPTS]
    if model.config.is_encoder_decoder:
        rows = [prompt + pad for prompt, pad in zip(PROMPTS, pads, strict=True)]
    else:
        rows = [pad + prompt for prompt, pad in zip(PROMPTS, pads, strict=True)]
    input_ids = torch.tensor(rows)
    return input_ids, (input_ids != PAD).long()


def answer_tokens(model, sequence, prompt_length):
    """What a sequence says before its end: without prompt or start, eos and what follows."""
    tokens = sequence.tolist()[1 if model.config.is_encoder_decoder else prompt_length :]
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@torch.no_grad()
def true_score(model, prompt, tokens):
    """Mean log-probability of `tokens` after `prompt` under a float64 model: one row, no pads, no cache."""
    if not tokens:
        return float("-inf")
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        logits = model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *tokens[:-1]]])
        ).logits[0]
    else:
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
    return sum(log_probabilities[step, token].item() for step, token in enumerate(tokens)) / len(tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 9},
        {"top_p": 0.95, "repetition_penalty": 1.5},
        {"samples_per_pass": 4},
        {"min_new_tokens": 3},
    ],
)
def test_scores_are_those_of_the_untempered_model(model, settings):
    input_ids, mask = batch_of(model)
    exact = copy.deepcopy(model).double()
    output = sample_and_rank(model, input_ids, mask, num_samples=6, max_new_tokens=6, temperature=3.0, **settings)
    assert output.candidates.shape[:2] == (2, 6)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        for number in range(6):
            tokens = answer_tokens(model, output.candidates[row, number], input_ids.shape[1])
            lengths.add(len(tokens))
            assert output.candidate_lengths[row, number] == len(tokens)
            assert output.candidate_scores[row, number].item() == pytest.approx(
                true_score(exact, prompt, tokens), abs=2e-5
            )
    assert len(lengths) > 1  # some ended, some did not


def test_best_comes_first(model):
    input_ids, mask = batch_of(model)
    output = sample_and_rank(model, input_ids, mask, num_samples=8, max_new_tokens=5)
    assert (output.candidate_scores.diff(dim=1).nan_to_num(0) <= 0).all()
    assert torch.equal(output.sequences, output.candidates[:, 0])
    assert torch.equal(output.scores, output.candidate_scores[:, 0])
    assert output.candidate_scores[:, 0].isfinite().all()


def test_one_sample_is_generates(model):
    input_ids, mask = batch_of(model)
    set_seed(5)
    output = sample_and_rank(model, input_ids, mask, num_samples=1, max_new_tokens=6, temperature=0.7)
    set_seed(5)
    sampled = model.generate(
        input_ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=6
    )
    assert torch.equal(output.sequences, sampled)


def test_seed_decides(causal):
    def draw(seed):
        set_seed(seed)
        return sample_and_rank(causal, *batch_of(causal), num_samples=4, max_new_tokens=6).candidates

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_rows_of_a_batch_are_answered_as_alone(model):
    """At a temperature near zero chance has no part, so the two can be compared."""
    input_ids, mask = batch_of(model)
    settings = {"num_samples": 2, "max_new_tokens": 5, "temperature": 1e-4}
    together = sample_and_rank(model, input_ids, mask, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = sample_and_rank(model, torch.tensor([prompt]), **settings)
        expected = answer_tokens(model, alone.sequences[0], len(prompt))
        assert answer_tokens(model, together.sequences[row], input_ids.shape[1]) == expected
        assert together.scores[row].item() == pytest.approx(alone.scores.item(), abs=1e-5)


def test_passes_of_unequal_length_are_padded(causal):
    set_seed(0)
    output = sample_and_rank(
        causal, torch.tensor([[5, 8]]), num_samples=8, samples_per_pass=1, temperature=2.0, max_new_tokens=12
    )
    assert len(set(output.candidate_lengths[0].tolist())) > 2
    for sequence, length in zip(output.candidates[0], output.candidate_lengths[0], strict=True):
        assert set(sequence[2 + length + 1 :].tolist()) <= {PAD}


def test_text_that_ends_at_once_comes_last(causal):
    input_ids = torch.tensor([[5, 8]])
    output = sample_and_rank(causal, input_ids, num_samples=60, temperature=3.0, max_new_tokens=3)
    is_empty = output.candidate_lengths[0] == 0
    assert 0 < is_empty.sum() < 60
    assert torch.equal(output.candidate_scores[0].isneginf(), is_empty)
    assert is_empty.sort().values.equal(is_empty)
    every = sample_and_rank(causal, input_ids, num_samples=3, max_new_tokens=1, eos_token_id=list(range(VOCAB_SIZE)))
    assert every.scores.isneginf().all()


def test_longest_length_saved_with_the_model_does_not_count(causal, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = copy.deepcopy(causal)
    model.generation_config.max_length = 5
    output = sample_and_rank(model, torch.tensor([[5, 8]]), num_samples=2, max_new_tokens=9, min_new_tokens=9)
    assert output.sequences.shape[1] == 11
    assert caplog.text == ""  # no warning either


def test_several_tokens_may_end_a_text(causal):
    set_seed(0)
    output = sample_and_rank(causal, torch.tensor([[5, 8]]), num_samples=20, max_new_tokens=6, eos_token_id=[EOS, 4])
    for sequence, length in zip(output.candidates[0, :, 2:].tolist(), output.candidate_lengths[0], strict=True):
        assert length == next((i for i, token in enumerate(sequence) if token in (EOS, 4)), len(sequence))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"samples_per_pass": 0}, "samples_per_pass=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"num_beams": 4}, "num_beams=4 cannot be set: .* call model.generate"),
        ({"num_return_sequences": 3}, "num_return_sequences=3 cannot be set: its name here is num_samples"),
        ({"do_sample": False}, "do_sample=False cannot be set"),
        ({"max_length": 9}, "max_length=9 cannot be set: give max_new_tokens"),
        ({"stop_strings": ["."]}, "stop_strings=.* cannot be set: .* give eos_token_id"),
    ],
)
def test_refused(causal, settings, message):
    with pytest.raises(ValueError, match=message):
        sample_and_rank(causal, torch.tensor([[5, 8]]), **settings)


def test_training_mode_and_a_row_without_batch_are_refused(causal):
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        sample_and_rank(copy.deepcopy(causal).train(), torch.tensor([[5, 8]]))
    with pytest.raises(ValueError, match=r"input_ids has the shape \(2,\)"):
        sample_and_rank(causal, torch.tensor([5, 8]))
