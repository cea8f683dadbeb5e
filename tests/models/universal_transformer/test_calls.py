"""What a call may be given: inputs, positions, and how deep it goes."""

import itertools

import pytest
import torch
from models.universal_transformer.small_models import EXACT, HALTING, random_ids, small_model
from models.universal_transformer.whole_models import (
    TWO_STACKS,
    VARIANTS,
    assert_all_close,
    encoder_model,
    every_variant,
    gradients,
    seq2seq_model,
)
from transformers.modeling_outputs import BaseModelOutput

from hf_efficient import UniversalTransformerModel

# --- inputs ---


@every_variant
@torch.no_grad()
def test_inputs_embeds_equal_input_ids(name):
    model, ids = small_model(**VARIANTS[name]), random_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, **EXACT)


@torch.no_grad()
def test_embeddings_are_scaled_and_the_pad_s_is_zero_on_request():
    ids = torch.tensor([[0, 3, 0, 2]])
    model = small_model()
    embedding = model.get_input_embeddings()
    torch.testing.assert_close(embedding(ids), embedding.weight[ids] * 8**0.5, **EXACT)
    embedding = small_model(scale_embeddings=False).get_input_embeddings()
    torch.testing.assert_close(embedding(ids), embedding.weight[ids], **EXACT)
    embedding = small_model(zero_pad_embedding=True).get_input_embeddings()
    assert (embedding(ids)[ids == 0] == 0).all()
    torch.testing.assert_close(embedding(ids)[ids != 0], embedding.weight[ids[ids != 0]] * 8**0.5, **EXACT)
    assert (embedding.weight[0] != 0).any()


@pytest.mark.parametrize("name", ["fixed", "act", "rotary", "learned", "concat"])
@torch.no_grad()
def test_positions_are_honoured(name):
    model, ids = small_model(**VARIANTS[name]), random_ids(2, 7)
    counted = torch.arange(7)[None]
    expected = model(ids).logits
    for positions in (counted, counted.expand(2, -1)):
        torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, **EXACT)
    other = model(ids, position_ids=counted * 2 + 3).logits
    assert (other - expected).abs().max() > 1e-3


@torch.no_grad()
def test_texts_in_one_row_are_apart_if_positions_say_so():
    for changes in HALTING.values():
        model, ids = small_model(**changes), random_ids(1, 9)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        packed = model(ids, position_ids=positions, use_cache=False).logits
        parts = [model(part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:])]
        torch.testing.assert_close(packed, torch.cat(parts, dim=1), **EXACT)

    model = small_model(transition="separable_convolution")
    with pytest.raises(ValueError, match="start again.*'separable_convolution'.*'feed_forward'"):
        model(ids, position_ids=positions)


@torch.no_grad()
def test_mask_of_four_dimensions_is_taken_as_it_is():
    model, ids = small_model(halting="act"), random_ids(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, model(ids).logits, **EXACT)
    itself = torch.eye(6, dtype=torch.bool)[None, None].expand(2, 1, -1, -1)
    assert (model(ids, attention_mask=itself).logits - model(ids).logits).abs().max() > 1e-3


BAD_CALLS = [
    ({}, "exactly one of input_ids and inputs_embeds"),
    ({"input_ids": random_ids(2, 5), "inputs_embeds": torch.zeros(2, 5, 8)}, "exactly one of input_ids"),
    ({"input_ids": random_ids(5)}, r"input_ids is torch.int64 of shape \(5,\).*\(batch, length\)"),
    ({"input_ids": torch.zeros(2, 5)}, "input_ids is torch.float32.*whole numbers"),
    ({"input_ids": torch.full((1, 3), 17)}, "ids from 17 to 17, but vocab_size=17.*resize_token_embeddings"),
    ({"input_ids": torch.full((1, 3), -1)}, "ids from -1 to -1"),
    ({"inputs_embeds": torch.zeros(2, 5, 7)}, r"inputs_embeds is torch.float32 of shape \(2, 5, 7\).*length, 8\)"),
    ({"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 4)}, r"\(2, 4\), but must be \(2, 5\)"),
    ({"input_ids": random_ids(2, 5), "attention_mask": torch.full((2, 5), -1e9)}, "attention_mask holds -1.*give 1"),
    (
        {"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.int64)},
        r"torch.int64 of shape \(2, 1, 5, 5\).*\(batch, 1, 5, 5\): bool",
    ),
    ({"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 1, 5, 4)}, r"\(2, 1, 5, 4\).*\(batch, 1, 5, 5\)"),
    ({"input_ids": random_ids(2, 5), "position_ids": torch.arange(4)[None]}, r"\(1, 4\).*\(2, 5\) or \(1, 5\)"),
    ({"input_ids": random_ids(2, 5), "position_ids": torch.arange(5)[None] - 1}, "begins at -1; give numbers from 0"),
    ({"input_ids": random_ids(1, 5), "num_steps": 0}, "num_steps=0 is no number of steps.*from 1"),
    ({"input_ids": random_ids(1, 5), "num_steps": 2.0}, "num_steps=2.0 is no number"),
    ({"input_ids": random_ids(1, 5), "num_steps": True}, "num_steps=True is no number"),
    ({"input_ids": random_ids(1, 5), "num_steps": 6}, "num_steps=6.*max_steps=5 rows.*'sinusoid' or 'none'"),
    ({"input_ids": random_ids(1, 5), "min_steps": 2}, "min_steps=2.*halting='none'.*num_steps"),
    ({"input_ids": random_ids(1, 5), "exit_threshold": 0.5}, "exit_threshold=0.5.*halting='none'"),
    ({"input_ids": random_ids(1, 5), "past_key_values": ((1, 2),)}, "past_key_values is a tuple.*Cache"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_call_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small_model(dtype=torch.float32)(**call)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_steps": 0}, "min_steps=0 is no number of steps"),
        ({"min_steps": 2.5}, "min_steps=2.5 is no number of steps"),
        ({"min_steps": 4, "num_steps": 3}, "min_steps=4 is more than num_steps=3"),
        ({"exit_threshold": 1.0}, r"exit_threshold=1.0 is outside \(0, 1\)"),
        ({"exit_threshold": 0}, r"exit_threshold=0 is outside \(0, 1\)"),
        ({"exit_threshold": "0.5"}, r"exit_threshold='0.5' is outside"),
    ],
)
def test_impossible_depth_of_a_call_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(halting="act")(random_ids(1, 4), **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "decoder_input_ids and decoder_inputs_embeds, or labels"),
        ({"decoder_input_ids": random_ids(3, 4)}, r"\(2, 5, 8\), but must be \(3, length, 8\)"),
        ({"decoder_input_ids": random_ids(2, 4), "decoder_attention_mask": torch.ones(2, 5)}, r"must be \(2, 4\)"),
        ({"decoder_input_ids": random_ids(2, 4), "labels": random_ids(2, 5)}, r"labels has shape \(2, 5\)"),
        ({"labels": torch.full((2, 4), 17)}, "ids from 17|holds ids from"),
    ],
)
def test_bad_call_of_both_stacks_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        seq2seq_model()(random_ids(2, 5), **call)


def test_encoder_s_output_must_fit():
    model, ids = seq2seq_model(), random_ids(2, 4)
    states = torch.zeros(2, 5, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 9\).*\(2, 5, 8\)"):
        model(encoder_outputs=(states,), attention_mask=torch.ones(2, 9), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="attention_mask holds -1.*give 1 for tokens"):
        model(encoder_outputs=(states,), attention_mask=torch.full((2, 5), -1e9), decoder_input_ids=ids)
    with pytest.raises(ValueError, match=r"\(2, 1, 5, 5\).*\(batch, 1, 4, 5\)"):
        model(encoder_outputs=(states,), attention_mask=torch.ones(2, 1, 5, 5).bool(), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="length, 8"):
        model(encoder_outputs=(states[..., :3],), decoder_input_ids=ids)


@torch.no_grad()
def test_a_mask_of_four_dimensions_for_the_source():
    model, source, target = seq2seq_model(), random_ids(2, 6), random_ids(2, 4, seed=3)
    states = model.get_encoder()(source).last_hidden_state
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    expected = model(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=target).logits
    for whole in (mask.bool(), (1.0 - mask.double()) * -1e9):
        given = whole[:, None, None].expand(-1, 1, 4, -1)
        logits = model(encoder_outputs=(states,), attention_mask=given, decoder_input_ids=target).logits
        torch.testing.assert_close(logits, expected, **EXACT)
    every = model(encoder_outputs=(states,), decoder_input_ids=target).logits
    assert (every - expected).abs()[0].max() > 1e-3


@torch.no_grad()
def test_a_cache_of_another_source_is_refused():
    model, target = seq2seq_model(), random_ids(2, 4, seed=3)
    cache = model(random_ids(2, 6), decoder_input_ids=target).past_key_values
    with pytest.raises(ValueError, match="6 encoder positions.*states have 5; pass a new cache"):
        model(random_ids(2, 5), decoder_input_ids=target, past_key_values=cache)


def test_learned_positions_end():
    model = small_model(position_signal="learned", max_position_embeddings=8, max_position_offset=3)
    model(random_ids(1, 8))
    with pytest.raises(ValueError, match="9 tokens is longer than the 8 positions.*shorten it, or use.*'sinusoid'"):
        model(random_ids(1, 9))
    model.train()(random_ids(1, 5))
    with pytest.raises(ValueError, match="6 tokens is longer than the 5 positions.*max_position_offset=3 in training"):
        model(random_ids(1, 6))
    # Pads take no position.
    model.eval()(random_ids(1, 9), attention_mask=torch.tensor([[0] + [1] * 8]))


@torch.no_grad()
def test_encoder_s_output_can_be_given():
    model, source, target = seq2seq_model(halting="act"), random_ids(2, 6), random_ids(2, 4, seed=3)
    expected = model(source, decoder_input_ids=target)
    encoded = model.get_encoder()(source)
    for given in (encoded, (encoded.last_hidden_state,), BaseModelOutput(last_hidden_state=encoded.last_hidden_state)):
        output = model(encoder_outputs=given, decoder_input_ids=target)
        torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    assert torch.equal(model(encoder_outputs=encoded, decoder_input_ids=target).ponder_loss, expected.ponder_loss)
    embeds = model.get_input_embeddings()
    output = model(inputs_embeds=embeds(source), decoder_inputs_embeds=embeds(target))
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)


# --- depth ---


@pytest.mark.parametrize("name", ["fixed", "act", "act_stale", "act_evolving", "interpolation"])
@torch.no_grad()
def test_number_of_steps_of_a_call_is_that_of_a_shallower_model(name):
    model, ids = small_model(**HALTING[name]), random_ids(2, 6)
    for num_steps in (1, 2, 4):
        shallow = small_model(max_steps=5, **HALTING[name])
        shallow.load_state_dict(model.state_dict())
        shallow.config.max_steps = num_steps
        torch.testing.assert_close(model(ids, num_steps=num_steps).logits, shallow(ids).logits, **EXACT)
    deep = small_model(step_signal="sinusoid", **HALTING[name])
    assert (deep(ids, num_steps=9).logits - deep(ids).logits).abs().max() > (1e-3 if name == "fixed" else -1)


@torch.no_grad()
def test_halting_can_be_set_for_a_call():
    model, ids = small_model(halting="act"), random_ids(3, 8)
    usual = model(ids)
    counts = [model(ids, exit_threshold=threshold).ponder_times.mean() for threshold in (0.01, 0.5, 0.999)]
    assert counts[0] < counts[1] < counts[2]
    given = model(ids, exit_threshold=model.config.halting_threshold)
    assert torch.equal(given.ponder_times, usual.ponder_times)
    at_least = model(ids, min_steps=3)
    assert at_least.ponder_times.min() == 3
    longer = usual.ponder_times > 3
    assert torch.equal(at_least.ponder_times[longer], usual.ponder_times[longer])
    for given, expected in (
        (model(ids, min_steps=5), 5),
        (model(ids, num_steps=1), 1),
        (model(ids, num_steps=2, min_steps=2), 2),
    ):
        assert (given.ponder_times == expected).all()
    assert model.config.min_steps == 1


@pytest.mark.parametrize("name", [name for name in HALTING if name != "fixed"])
@torch.no_grad()
def test_weights_of_the_steps_are_those_of_the_probabilities(name):
    """Ponder times, remainders and the output follow from what is reported of the steps."""
    model, ids = encoder_model(norm_position="post", **HALTING[name]), random_ids(3, 7)
    output = model(ids, output_step_hidden_states=True)
    total = torch.zeros(3, 7, dtype=torch.float64)
    expected = torch.zeros_like(output.last_hidden_state)
    times, remainders = torch.zeros_like(total), torch.zeros_like(total)
    for step, probability in enumerate(output.halting_probabilities):
        live = remainders == 0
        halts = live & ((total + probability > model.config.halting_threshold) | (step == 4))
        weight = torch.where(halts, 1 - total, probability) * live
        remainders += torch.where(halts, 1 - total, torch.zeros_like(total))
        total += probability * (live & ~halts)
        times += live
        states = output.step_hidden_states[step + 1]
        keep = 1 - weight[..., None] if model.config.act_output == "interpolation" else 1
        expected = expected * keep + weight[..., None] * states
    assert torch.equal(output.ponder_times, times)
    torch.testing.assert_close(output.remainders, remainders, **EXACT)
    torch.testing.assert_close(output.last_hidden_state, expected, **EXACT)
    torch.testing.assert_close(output.ponder_loss, (times + remainders).mean(), **EXACT)


@torch.no_grad()
def test_halted_states_are_copied():
    model, ids = small_model(halting="act"), random_ids(3, 7)
    output = model.model(ids, output_step_hidden_states=True)
    assert len(output.step_hidden_states) == 6
    for step in range(5):
        before, after = output.step_hidden_states[step : step + 2]
        assert torch.equal((before != after).any(-1), output.ponder_times > step)


@torch.no_grad()
def test_pads_count_on_request():
    ids, mask = random_ids(2, 6), torch.ones(2, 6)
    mask[1, 3:] = 0
    model = encoder_model(halting="act")
    output = model(ids, attention_mask=mask)
    expected = (output.ponder_times + output.remainders)[mask.bool()].mean()
    torch.testing.assert_close(output.ponder_loss, expected, **EXACT)
    model.config.count_padding = True
    counted = model(ids, attention_mask=mask)
    assert (counted.ponder_times > 0).all()
    torch.testing.assert_close(counted.ponder_loss, (counted.ponder_times + counted.remainders).mean(), **EXACT)
    tokens = mask.bool()
    torch.testing.assert_close(counted.last_hidden_state[tokens], output.last_hidden_state[tokens], **EXACT)


@torch.no_grad()
def test_sequences_can_halt_as_a_whole():
    model, ids = encoder_model(halting="act", halting_scope="sequence"), random_ids(4, 6)
    mask = torch.ones(4, 6)
    mask[1, 4:], mask[2, :2] = 0, 0
    output = model(ids, attention_mask=mask)
    assert output.ponder_times.shape == output.remainders.shape == (4, 6)
    assert output.halting_probabilities.shape == (5, 4, 6)
    assert (output.ponder_times == output.ponder_times[:, :1]).all()
    for row, tokens in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, tokens])
        torch.testing.assert_close(output.last_hidden_state[row, tokens], alone.last_hidden_state[0], **EXACT)
        assert output.ponder_times[row, 0] == alone.ponder_times[0, 0]
    expected = (output.ponder_times + output.remainders)[:, 0].mean()
    torch.testing.assert_close(output.ponder_loss, expected, **EXACT)


@pytest.mark.parametrize("kind", ["uniform", "poisson_lognormal"])
def test_random_depth_in_training(kind):
    settings = {"random_depth": kind, "step_signal": "sinusoid", "max_steps": 4}
    model, ids = small_model(**settings).train(), random_ids(1, 3)
    depths = []
    for seed in range(300):
        torch.manual_seed(seed)
        depths.append(len(model.model(ids, output_step_hidden_states=True).step_hidden_states) - 1)
    assert min(depths) == 1
    mean = sum(depths) / len(depths)
    assert mean == pytest.approx(2.5 if kind == "uniform" else 4, abs=0.4)
    assert (max(depths) == 4) == (kind == "uniform")
    # Not in evaluation, not when the call says how many.
    state = torch.get_rng_state()
    for given, expected in ((model(ids, num_steps=3, output_hidden_states=True), 3), (model.eval()(ids), None)):
        assert expected is None or len(given.hidden_states) == expected + 1
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(ids).logits, model(ids, num_steps=4).logits, **EXACT)


def test_random_depth_stays_within_a_learned_table():
    model = small_model(random_depth="poisson_lognormal", mean_training_steps=9, max_steps=4).train()
    for seed in range(20):
        torch.manual_seed(seed)
        model(random_ids(1, 3))


def test_random_depth_is_one_for_both_stacks():
    model = small_model(UniversalTransformerModel, random_depth="uniform", **TWO_STACKS).train()
    ids = random_ids(1, 3)
    for seed in range(10):
        torch.manual_seed(seed)
        output = model(ids, decoder_input_ids=ids, output_step_hidden_states=True)
        assert len(output.step_hidden_states) == len(output.encoder_step_hidden_states)


def test_only_the_last_steps_get_gradients():
    """As if what came before were a constant."""
    model, ids = small_model(input_injection=True, backprop_steps=2, step_signal="none").train(), random_ids(2, 5)
    given = gradients(model, model(ids, labels=ids).loss)
    model.config.backprop_steps = None
    whole = gradients(model, model(ids, labels=ids).loss)
    stack = model.model.decoder
    inject = stack.injection.forward
    calls = itertools.count()

    def cut(rows: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        return inject(rows.detach() if next(calls) == 3 else rows, prepared)

    stack.injection.forward = cut
    expected = gradients(model, model(ids, labels=ids).loss)
    assert_all_close(given, expected, **EXACT)
    assert (whole["model.embed_tokens.weight"] - given["model.embed_tokens.weight"]).abs().max() > 1e-6
    assert all(torch.isfinite(gradient).all() for gradient in given.values())


def test_positions_are_shifted_in_training_alike_for_both_stacks():
    settings = {"max_position_offset": 50, "step_signal": "none", "max_steps": 1}
    model, ids = small_model(UniversalTransformerModel, **settings, **TWO_STACKS), random_ids(2, 5)
    expected = model(ids, decoder_input_ids=ids).last_hidden_state
    torch.testing.assert_close(expected, model(ids, decoder_input_ids=ids).last_hidden_state, rtol=0, atol=0)
    model.train()
    torch.manual_seed(1)
    shifted = model(ids, decoder_input_ids=ids)
    torch.manual_seed(1)
    offsets = torch.randint(0, 51, (2, 1))
    positions = torch.arange(5)[None] + offsets
    assert offsets[0] != offsets[1]
    model.eval()
    given = model(ids, position_ids=positions, decoder_input_ids=ids, decoder_position_ids=positions)
    torch.testing.assert_close(shifted.last_hidden_state, given.last_hidden_state, **EXACT)
    torch.testing.assert_close(shifted.encoder_last_hidden_state, given.encoder_last_hidden_state, **EXACT)
