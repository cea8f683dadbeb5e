"""What a call may be given: ids or embeddings, masks, positions, an encoder's output; and what is refused."""

import pytest
import torch
from models.evolved_transformer.small_models import EXACT, STRUCTURES, pair_model, random_ids, small_model
from models.evolved_transformer.whole_models import STACKS
from transformers.modeling_outputs import BaseModelOutput

from hf_efficient import EvolvedTransformerEncoderModel, EvolvedTransformerModel


@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_inputs_embeds_equal_input_ids(name):
    model, ids = small_model(**STRUCTURES[name]), random_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, **EXACT)


@torch.no_grad()
def test_embeddings_are_scaled_and_the_pad_s_is_zero_on_request():
    ids = torch.tensor([[0, 3, 0, 2]])
    embedding = small_model().get_input_embeddings()
    torch.testing.assert_close(embedding(ids), embedding.weight[ids] * 8**0.5, **EXACT)
    embedding = small_model(scale_embeddings=False).get_input_embeddings()
    torch.testing.assert_close(embedding(ids), embedding.weight[ids], **EXACT)
    embedding = small_model(zero_pad_embedding=True).get_input_embeddings()
    assert (embedding(ids)[ids == 0] == 0).all()
    torch.testing.assert_close(embedding(ids)[ids != 0], embedding.weight[ids[ids != 0]] * 8**0.5, **EXACT)
    assert (embedding.weight[0] != 0).any()


@torch.no_grad()
def test_the_encoder_s_bias_is_added_to_its_embeddings_alone():
    model, source, target = pair_model(encoder_input_bias=True), random_ids(2, 6), random_ids(2, 4, seed=3)
    embeds = model.get_input_embeddings()
    plain = pair_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    bias = model.model.encoder.input_bias.bias
    expected = plain(inputs_embeds=embeds(source) + bias, decoder_inputs_embeds=embeds(target))
    torch.testing.assert_close(model(source, decoder_input_ids=target).logits, expected.logits, **EXACT)


@torch.no_grad()
def test_positions_are_honoured():
    ids, counted = random_ids(2, 7), torch.arange(7)[None]
    for model in (small_model(), small_model(EvolvedTransformerEncoderModel, **STACKS["encoder"])):
        expected = model(ids)[0]
        for positions in (counted, counted.expand(2, -1)):
            torch.testing.assert_close(model(ids, position_ids=positions)[0], expected, **EXACT)
        assert (model(ids, position_ids=counted * 2 + 3)[0] - expected).abs().max() > 1e-3
    model = small_model(position_signal="none")
    assert torch.equal(model(ids, position_ids=counted * 2 + 3).logits, model(ids).logits)


@torch.no_grad()
def test_positions_of_the_decoder_are_honoured():
    model, source, target = pair_model(), random_ids(1, 5), random_ids(1, 4, seed=3)
    expected = model(source, decoder_input_ids=target).logits
    counted = torch.arange(4)[None]
    given = model(source, decoder_input_ids=target, decoder_position_ids=counted).logits
    torch.testing.assert_close(given, expected, **EXACT)
    assert (
        model(source, decoder_input_ids=target, decoder_position_ids=counted + 2).logits - given
    ).abs().max() > 1e-3


@torch.no_grad()
def test_position_signal_is_that_of_tensor2tensor():
    """Sines in the first half, cosines in the second; wavelengths from 2 pi to 20000 pi."""
    model = small_model(EvolvedTransformerModel, num_decoder_layers=1)
    embeds = torch.zeros(1, 3, 8, dtype=torch.float64)
    (states, _) = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    for position in range(3):
        for index in range(4):
            angle = torch.tensor(position / 10000 ** (index / 3), dtype=torch.float64)
            torch.testing.assert_close(states[0, position, index], angle.sin(), **EXACT)
            torch.testing.assert_close(states[0, position, 4 + index], angle.cos(), **EXACT)


MASKED = {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 0]])}


@pytest.mark.parametrize(
    ("positions", "given"),
    [
        ([0, 1, 2, 0, 1, 2, 3], {}),
        ([0, 1, 2, 2, 3, 4, 5], {}),
        ([0, 0, 1, 1, 1, 2, 2], MASKED),
        ([9, 3, 4, 9, 2, 5, 9], MASKED),
    ],
)
def test_several_texts_in_a_row_are_refused(positions, given):
    for model in (small_model(), small_model(EvolvedTransformerEncoderModel, **STACKS["encoder"])):
        with pytest.raises(ValueError, match="position_ids start again within a row.*a row of its own"):
            model(random_ids(1, 7), position_ids=torch.tensor([positions]), **given)


@torch.no_grad()
def test_positions_of_pads_may_be_anything():
    """transformers writes 1 there."""
    model, ids = small_model(), random_ids(1, 7)
    expected = model(ids, **MASKED).logits
    for positions in ([1, 0, 1, 1, 2, 3, 1], [0, 0, 1, 1, 2, 3, 3]):
        given = model(ids, position_ids=torch.tensor([positions]), **MASKED).logits
        tokens = MASKED["attention_mask"].bool()
        torch.testing.assert_close(given[tokens], expected[tokens], **EXACT)


@torch.no_grad()
def test_mask_of_four_dimensions_is_taken_as_it_is():
    model, ids = small_model(), random_ids(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, model(ids).logits, **EXACT)
    itself = torch.eye(6, dtype=torch.bool)[None, None].expand(2, 1, -1, -1)
    assert (model(ids, attention_mask=itself).logits - model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
@torch.no_grad()
def test_mask_of_any_type(dtype):
    model, ids = small_model(), random_ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, expected)


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
    ({"input_ids": random_ids(2, 5), "position_ids": torch.arange(5.0)[None]}, "torch.float32.*whole numbers"),
    ({"input_ids": random_ids(1, 5), "past_key_values": ((1, 2),)}, "past_key_values is a tuple.*Cache"),
    ({"input_ids": random_ids(2, 5), "labels": random_ids(2, 4)}, r"labels has shape \(2, 4\)"),
    ({"input_ids": random_ids(2, 5), "shift_labels": random_ids(2, 4)}, r"shift_labels has shape \(2, 4\)"),
    ({"input_ids": random_ids(1, 3), "labels": torch.full((1, 3), 17)}, "labels holds ids from 17 to 17"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_call_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small_model(dtype=torch.float32)(**call)


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
        pair_model()(random_ids(2, 5), **call)


def test_encoder_s_output_must_fit():
    model, ids = pair_model(), random_ids(2, 4)
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
def test_encoder_s_output_can_be_given():
    model, source, target = pair_model(), random_ids(2, 6), random_ids(2, 4, seed=3)
    expected = model(source, decoder_input_ids=target)
    encoded = model.get_encoder()(source)
    states = encoded.last_hidden_state
    for given in (encoded, (states,), {"last_hidden_state": states}, BaseModelOutput(last_hidden_state=states)):
        output = model(encoder_outputs=given, decoder_input_ids=target)
        torch.testing.assert_close(output.logits, expected.logits, **EXACT)
        assert torch.equal(output.encoder_last_hidden_state, states)
    embeds = model.get_input_embeddings()
    output = model(inputs_embeds=embeds(source), decoder_inputs_embeds=embeds(target))
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)


@torch.no_grad()
def test_a_cache_of_another_source_is_refused():
    model, target = pair_model(), random_ids(2, 4, seed=3)
    cache = model(random_ids(2, 6), decoder_input_ids=target).past_key_values
    with pytest.raises(ValueError, match="keys of 6 encoder positions.*states have 5; pass a new cache"):
        model(random_ids(2, 5), decoder_input_ids=target, past_key_values=cache)
