"""Feeding a text piece by piece with a cache gives what one pass gives; and at what cost."""

import random
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from models.evolved_transformer.small_models import (
    EXACT,
    HALF,
    SINGLE,
    STRUCTURES,
    pair_model,
    random_ids,
    small_model,
)
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_efficient import EvolvedTransformerCache
from hf_efficient.models.evolved_transformer.layers_evolved_transformer import EvolvedTransformerAttention

pytestmark = pytest.mark.usefixtures("no_grad")

every_structure = pytest.mark.parametrize("structure", STRUCTURES)
LENGTH = 25


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def feed(model, ids, sizes, cache=None):
    """Feed `ids` (B, S) in pieces of the sizes given; returns the logits (B, S, V) of all."""
    cache = EvolvedTransformerCache(model.config) if cache is None else cache
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], dim=1)


@every_structure
def test_token_by_token_in_chunks_and_after_crop(structure):
    """Texts longer than all the convolutions look back together, 10 + 6."""
    model, ids = small_model(**STRUCTURES[structure]), random_ids(3, LENGTH)
    expected = model(ids, use_cache=False).logits
    for sizes in ([1] * LENGTH, [4, 1, 13, 1, 6], [LENGTH]):
        cache = EvolvedTransformerCache(model.config)
        torch.testing.assert_close(feed(model, ids, sizes, cache), expected, **EXACT)
        assert cache.get_seq_length() == LENGTH

    cache = EvolvedTransformerCache(model.config)
    cache.activate_past_recording()
    feed(model, torch.cat([ids[:, :15], random_ids(3, 9, seed=7)], dim=1), [13, 1, 10], cache)
    cache.crop(-9)
    torch.testing.assert_close(feed(model, ids[:, 15:], [1, 9], cache), expected[:, 15:], **EXACT)


@pytest.mark.parametrize("size", range(1, LENGTH + 1))
def test_chunks_of_every_size(size):
    model, ids = small_model(), random_ids(2, LENGTH)
    torch.testing.assert_close(feed(model, ids, size), model(ids, use_cache=False).logits, **EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)])
def test_other_precisions(dtype, tolerance):
    """Small weights, so that the logits are of size 1."""
    model, ids = small_model(dtype=dtype), random_ids(2, LENGTH)
    for parameter in model.parameters():
        parameter.mul_(0.5)
    expected = model(ids, use_cache=False).logits
    assert expected.dtype == dtype
    for sizes in ([1] * LENGTH, [7, 1, 17]):
        torch.testing.assert_close(feed(model, ids, sizes), expected, **tolerance)


def test_batch_equals_rows_alone():
    model, ids = small_model(), random_ids(4, 14)
    logits = feed(model, ids, [11, 1, 1, 1])
    for row in range(4):
        alone = feed(model, ids[row : row + 1], [11, 1, 1, 1])
        torch.testing.assert_close(logits[row : row + 1], alone, **EXACT)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_structure
def test_left_padded_rows_equal_rows_alone(structure, implementation):
    """Pads before a text are what the convolutions find before it anyway: nothing."""
    model = small_model(**STRUCTURES[structure])
    model.set_attn_implementation(implementation)
    ids, lengths = random_ids(3, 14), (14, 6, 1)
    mask = torch.stack([torch.arange(14) >= 14 - length for length in lengths]).long()
    more = random_ids(3, 8, seed=2)
    for first, sizes in ([14], [8]), ([1] * 14, [1] * 8), ([3, 11], [1, 6, 1]):
        cache = EvolvedTransformerCache(model.config)
        whole, seen, pieces = torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1), []
        for piece in whole.split([*first, *sizes], dim=1):
            end = cache.get_seq_length() + piece.shape[1]
            pieces.append(model(piece, attention_mask=seen[:, :end], past_key_values=cache).logits)
        logits = torch.cat(pieces, dim=1)
        for row, length in enumerate(lengths):
            expected = model(whole[row : row + 1, 14 - length :], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, 14 - length :], expected, **EXACT)


def test_pads_inside_a_row_keep_their_places():
    """The convolutions find zeros there, in one pass as in pieces."""
    model, ids = small_model(), random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 4:9] = mask[1, 12:14] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert not torch.allclose(expected, model(ids, use_cache=False).logits)
    for sizes in ([1] * LENGTH, [6, 1, 6, 12]):
        cache, pieces = EvolvedTransformerCache(model.config), []
        for piece in ids.split(sizes, dim=1):
            end = cache.get_seq_length() + piece.shape[1]
            pieces.append(model(piece, attention_mask=mask[:, :end], past_key_values=cache).logits)
        is_token = mask.bool()
        torch.testing.assert_close(torch.cat(pieces, dim=1)[is_token], expected[is_token], **EXACT)


@pytest.mark.slow
def test_compiled_decoding_is_one_graph():
    """And the graph of one token serves however many came before it."""
    model, ids = small_model(num_decoder_layers=1), random_ids(2, 15)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    cache = EvolvedTransformerCache(model.config)
    logits = [compiled(piece, past_key_values=cache).logits for piece in ids.split([5] + [1] * 10, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits, **EXACT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_selecting_rows_between_calls():
    """What beam search does."""
    model, ids = small_model(), random_ids(3, 13)
    chosen, more = torch.tensor([2, 0, 0, 1]), random_ids(4, 3, seed=5)
    cache = EvolvedTransformerCache(model.config)
    feed(model, ids, [12, 1], cache)
    cache.batch_select_indices(chosen)
    logits = feed(model, more, [1, 2], cache)
    expected = model(torch.cat([ids[chosen], more], dim=1), use_cache=False).logits
    torch.testing.assert_close(logits, expected[:, 13:], **EXACT)


@pytest.mark.parametrize("seed", range(6))
def test_any_course_of_events(seed):
    """Tokens fed and taken back, rows chosen and repeated, in random order."""
    choose = random.Random(seed)
    model, ids = small_model(), random_ids(2, 0)
    cache = EvolvedTransformerCache(model.config)
    cache.activate_past_recording()
    for turn in range(14):
        new = random_ids(ids.shape[0], choose.choice([1, 1, 2, 7, 12]), seed=turn)
        ids = torch.cat([ids, new], dim=1)
        expected = model(ids, use_cache=False).logits[:, -new.shape[1] :]
        torch.testing.assert_close(model(new, past_key_values=cache).logits, expected, **EXACT)
        event = choose.choice(["crop", "select", "repeat", "nothing"])
        if event == "crop":
            count = choose.randint(0, min(ids.shape[1], 20))
            cache.crop(-count)
            ids = ids[:, : ids.shape[1] - count]
        elif event == "select":
            rows = torch.tensor(choose.choices(range(ids.shape[0]), k=choose.randint(1, 3)))
            choose.choice([cache.batch_select_indices, cache.reorder_cache])(rows)
            ids = ids[rows]
        elif event == "repeat" and ids.shape[0] < 4:
            cache.batch_repeat_interleave(2)
            ids = ids.repeat_interleave(2, dim=0)


def test_gradients_flow_through_a_call_with_a_cache():
    """Those of the new tokens: the earlier ones are constants."""
    with torch.enable_grad():
        model, ids = small_model(), random_ids(2, 7)
        with torch.no_grad():
            cache = model(ids[:, :4], use_cache=True).past_key_values
        embeds = model.get_input_embeddings()(ids[:, 4:]).detach().requires_grad_()
        model(inputs_embeds=embeds, past_key_values=cache).logits.square().sum().backward()
        whole = model.get_input_embeddings()(ids).detach()
        new = whole[:, 4:].clone().requires_grad_()
        logits = model(inputs_embeds=torch.cat([whole[:, :4], new], dim=1), use_cache=False).logits
        logits[:, 4:].square().sum().backward()
    torch.testing.assert_close(embeds.grad, new.grad, **EXACT)


def test_the_cache_does_not_keep_the_graph():
    with torch.enable_grad():
        model, ids = small_model(), random_ids(2, 7)
        cache = model(ids, use_cache=True).past_key_values
        model(ids, past_key_values=cache).logits.sum().backward()
    for layer in cache.layers:
        assert not any(buffer.requires_grad for buffer in layer.window.buffers)
        assert layer.convolution_rows is None or not any(rows.requires_grad for rows in layer.convolution_rows)


@pytest.mark.parametrize("build", [small_model, pair_model])
def test_other_caches_are_refused(build):
    model, ids = build(), random_ids(1, 3)
    arguments = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    plain = DynamicCache(), StaticCache(model.config, max_cache_len=8)
    for cache in (*plain, EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(
            ValueError, match="no place for what the convolutions look back to.*EvolvedTransformerCache"
        ):
            model(ids, past_key_values=cache, **arguments)
    with pytest.raises(TypeError, match="past_key_values is a tuple"):
        model(ids, past_key_values=(), **arguments)


def test_a_cache_with_other_rows_is_refused():
    model = small_model()
    cache = EvolvedTransformerCache(model.config)
    model(random_ids(2, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="The cache holds 2 rows"):
        model(random_ids(3, 1), past_key_values=cache)


# --- encoder and decoder ------------------------------------------------------------------------------------


@contextmanager
def count_projections(model):
    """Counts how often each attention of the model makes keys."""
    counts = dict.fromkeys(model.modules(), 0)
    original = EvolvedTransformerAttention.project_keys

    def counted(self, rows):
        counts[self] += 1
        return original(self, rows)

    with mock.patch.object(EvolvedTransformerAttention, "project_keys", counted):
        yield counts


@every_structure
def test_decoder_behind_an_encoder(structure):
    model, ids, targets = pair_model(**STRUCTURES[structure]), random_ids(2, 6, seed=3), random_ids(2, 20)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    expected = model(ids, attention_mask=mask, decoder_input_ids=targets, use_cache=False).logits
    for given in (None, EvolvedTransformerCache(model.config)):
        cache, encoder_outputs, logits = given, None, []
        with count_projections(model) as counts:
            for piece in targets.split([3, 1, 1, 12, 3], dim=1):
                output = model(
                    input_ids=None if encoder_outputs else ids,
                    encoder_outputs=encoder_outputs,
                    attention_mask=mask,
                    decoder_input_ids=piece,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                encoder_outputs = (output.encoder_last_hidden_state,)
                logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **EXACT)
        assert isinstance(cache, EncoderDecoderCache)
        assert isinstance(cache.self_attention_cache, EvolvedTransformerCache)
        for block in model.model.decoder.layers:
            assert counts[block.wide_cross_attention] == counts[block.cross_attention] == 1
            assert counts[block.wide_self_attention] == counts[block.self_attention] == 5


def test_rows_of_a_pair_are_selected_with_what_they_attend_to():
    model, ids, targets = pair_model(), random_ids(3, 6, seed=3), random_ids(3, 12)
    chosen, more = torch.tensor([2, 0, 0, 1]), random_ids(4, 2, seed=5)
    output = model(ids, decoder_input_ids=targets, use_cache=True)
    output.past_key_values.batch_select_indices(chosen)
    states = (output.encoder_last_hidden_state[chosen],)
    logits = model(encoder_outputs=states, decoder_input_ids=more, past_key_values=output.past_key_values).logits
    whole = torch.cat([targets[chosen], more], dim=1)
    expected = model(ids[chosen], decoder_input_ids=whole, use_cache=False).logits
    torch.testing.assert_close(logits, expected[:, 12:], **EXACT)


def test_a_cache_that_was_reset_serves_another_source():
    model, ids, targets = pair_model(), random_ids(3, 6, seed=3), random_ids(3, 12)
    cache = model(random_ids(2, 9), decoder_input_ids=random_ids(2, 4), use_cache=True).past_key_values
    cache.reset()
    logits = model(ids, decoder_input_ids=targets, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids, decoder_input_ids=targets, use_cache=False).logits, **EXACT)


def test_left_padded_targets_behind_an_encoder():
    """As transformers' `generate` makes them from decoder prompts of unequal length."""
    model, ids, targets = pair_model(), random_ids(2, 6, seed=3), random_ids(2, 12)
    mask = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
    cache, encoder_outputs, logits = None, (model.get_encoder()(ids).last_hidden_state,), []
    for end, piece in zip((9, 10, 12), targets.split([9, 1, 2], dim=1), strict=True):
        output = model(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=piece,
            decoder_attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    logits = torch.cat(logits, dim=1)
    for row, start in enumerate((0, 5)):
        expected = model(ids[row : row + 1], decoder_input_ids=targets[row : row + 1, start:], use_cache=False).logits
        torch.testing.assert_close(logits[row : row + 1, start:], expected, **EXACT)
