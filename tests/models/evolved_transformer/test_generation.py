"""`generate`: every way of decoding gives what the model without a cache says, row by row, or is refused."""

import copy

import pytest
import torch
from models.evolved_transformer.small_models import (
    EXACT,
    QUIET,
    STRUCTURES,
    VOCAB_SIZE,
    pair_model,
    random_ids,
    small_model,
    word_tokenizer,
)
from models.model_tools import greedy, greedy_without_cache
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, pipeline
from transformers.modeling_outputs import BaseModelOutput

from hf_efficient import EvolvedTransformerCache

PADDED_PROMPTS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [0, 0, 6, 7, 8, 9, 3], [0, 0, 0, 0, 0, 0, 9]])
PROMPT_MASK = (PADDED_PROMPTS != 0).long()

# What differs in decoding: how many heads each slot has, and whether there are positions.
every_structure = pytest.mark.parametrize("structure", ["two_blocks", "as_many_wide_heads", "one_wide_head"])


def build(structure="two_blocks", **changes):
    return small_model(**(STRUCTURES[structure] | changes))


@every_structure
def test_every_step_s_logits_equal_those_of_one_pass(structure):
    """For text without repetition, in a batch with pads."""
    model = build(structure)
    output = model.generate(
        PADDED_PROMPTS,
        attention_mask=PROMPT_MASK,
        max_new_tokens=14,
        no_repeat_ngram_size=2,
        output_logits=True,
        return_dict_in_generate=True,
        **QUIET,
    )
    assert type(output.past_key_values) is EvolvedTransformerCache
    given = torch.stack(output.logits, dim=1)
    for row in range(3):
        num_pads = 7 - PROMPT_MASK[row].sum()
        sequence = output.sequences[row, num_pads:][None]
        with torch.no_grad():
            expected = model(sequence, use_cache=False)
        # `generate` keeps logits in float32.
        torch.testing.assert_close(given[row].double(), expected.logits[0, -15:-1], rtol=1e-5, atol=1e-5)
        assert len(set(sequence[0].tolist())) > 3


@every_structure
def test_greedy_equals_feeding_the_whole_prefix(structure):
    model, prompt = build(structure), random_ids(2, 5)
    expected = greedy_without_cache(model, prompt, 14)
    assert torch.equal(greedy(model, prompt, 14), expected)
    assert torch.equal(greedy(model, prompt, 14, use_cache=False), expected)
    assert torch.equal(greedy(model, prompt, 14, prefill_chunk_size=2), expected)


@every_structure
def test_padded_batch_equals_each_prompt_alone(structure):
    model = build(structure)
    for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}):
        output = model.generate(PADDED_PROMPTS, attention_mask=PROMPT_MASK, max_new_tokens=8, **QUIET, **settings)
        for row in range(3):
            prompt = PADDED_PROMPTS[row : row + 1][:, PROMPT_MASK[row].bool()]
            assert torch.equal(output[row : row + 1, 7:], greedy(model, prompt, 8)[:, -8:])


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"length_penalty": 0.6, "early_stopping": True}])
@every_structure
def test_beam_search_equals_beam_search_without_cache(structure, mode):
    model, prompt = build(structure), random_ids(2, 4)
    settings = {"num_beams": 4, "max_new_tokens": 12, "num_return_sequences": 3, "pad_token_id": 0, "eos_token_id": 1}
    settings |= {"attention_mask": torch.ones_like(prompt), **mode}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        outputs.append(model.generate(prompt, use_cache=use_cache, **settings))
    assert torch.equal(*outputs)


@every_structure
def test_sampling_several_sequences_equals_sampling_without_cache(structure):
    model, prompt = build(structure), random_ids(2, 4)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        settings = {"do_sample": True, "max_new_tokens": 12, "use_cache": use_cache, "num_return_sequences": 3}
        mask = torch.ones_like(prompt)
        outputs.append(model.generate(prompt, attention_mask=mask, temperature=2.0, **settings, **QUIET))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (6, 16)


@pytest.mark.parametrize("whole", [True, False], ids=["all_ids", "new_ids"])
@every_structure
def test_a_conversation_goes_on_with_the_cache_kept(structure, whole):
    model, prompt = build(structure), random_ids(2, 4)
    output = greedy(model, prompt, 5, return_dict_in_generate=True)
    for seed in (9, 10):
        ids = torch.cat([output.sequences, random_ids(2, 3, seed=seed)], dim=1)
        expected = greedy_without_cache(model, ids, 4)
        settings = {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, **QUIET}
        cache = output.past_key_values
        num_held = cache.get_seq_length()
        assert num_held == ids.shape[1] - 4
        given = ids if whole else ids[:, num_held:]
        output = model.generate(given, max_new_tokens=4, past_key_values=cache, **settings)
        assert torch.equal(output.sequences[:, -4:], expected[:, -4:])
        assert output.past_key_values is cache
        output.sequences = expected


def test_conversations_of_unequal_length_go_on_together():
    """Left-padded, with one cache kept; each is what it is alone."""
    model, settings = build(), {"max_new_tokens": 5, "return_dict_in_generate": True, **QUIET}
    output = model.generate(PADDED_PROMPTS, attention_mask=PROMPT_MASK, **settings)
    ids = torch.cat([output.sequences, random_ids(3, 2, seed=9)], dim=1)
    mask = torch.cat([PROMPT_MASK, torch.ones_like(ids[:, 7:])], dim=1)
    longer = model.generate(ids, attention_mask=mask, past_key_values=output.past_key_values, **settings).sequences
    for row in range(3):
        alone = ids[row : row + 1][:, mask[row].bool()]
        assert torch.equal(longer[row, -5:], greedy_without_cache(model, alone, 5)[0, -5:])


def test_one_prompt_can_be_continued_twice():
    """From copies of its cache."""
    model, prompt = build(), random_ids(1, 12)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    for seed in (5, 6):
        ids = torch.cat([prompt, random_ids(1, 2, seed=seed)], dim=1)
        output = greedy(model, ids, 6, past_key_values=copy.deepcopy(cache))
        assert torch.equal(output, greedy_without_cache(model, ids, 6))


def test_generation_stops_at_eos_and_rows_that_go_on_are_not_disturbed():
    model, prompt = build(), random_ids(4, 5)
    free = greedy(model, prompt, 14)
    eos = int(free[0, 8])
    mask = torch.ones_like(prompt)
    output = model.generate(prompt, attention_mask=mask, max_new_tokens=14, eos_token_id=eos, pad_token_id=0)
    for row in range(4):
        ends = (free[row, 5:] == eos).nonzero()
        end = 5 + int(ends[0]) + 1 if len(ends) else output.shape[1]
        assert torch.equal(output[row, :end], free[row, :end])
        assert (output[row, end:] == 0).all()


def test_generation_from_embeddings_equals_generation_from_ids():
    model = build()
    expected = model.generate(PADDED_PROMPTS, attention_mask=PROMPT_MASK, max_new_tokens=6, **QUIET)[:, 7:]
    embeddings = model.get_input_embeddings()(PADDED_PROMPTS).detach()
    output = model.generate(inputs_embeds=embeddings, attention_mask=PROMPT_MASK, max_new_tokens=6, **QUIET)
    assert torch.equal(output, expected)


# --- drafts that are checked several tokens at a time ---------------------------------------------------------


def llama():
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def helper_settings(helper, model):
    return {
        "same_model": lambda: {"assistant_model": copy.deepcopy(model)},
        "other_model": lambda: {"assistant_model": build("one_block", seed=7)},
        "llama": lambda: {"assistant_model": llama()},
        "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 3},
    }[helper]()


@pytest.mark.parametrize("helper", ["same_model", "other_model", "llama", "prompt_lookup"])
@pytest.mark.parametrize("structure", ["two_blocks", "one_block", "as_many_wide_heads"])
def test_assisted_decoding_equals_greedy(helper, structure):
    model = build(structure)
    # Repetition, so that looking up the prompt finds something.
    prompt = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    output = greedy(model, prompt, 40, **helper_settings(helper, model))
    assert torch.equal(output, greedy_without_cache(model, prompt, 40))


@pytest.mark.parametrize("helper", ["same_model", "prompt_lookup"])
def test_assisted_decoding_behind_pads_equals_greedy(helper):
    model, prompt = build(), torch.tensor([[0, 0, 0, 1, 2, 3, 1, 2, 3, 1, 2]])
    settings = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 20, **QUIET}
    output = model.generate(prompt, **settings, **helper_settings(helper, model))
    assert torch.equal(output[:, 3:], greedy_without_cache(model, prompt[:, 3:], 20))


def test_a_cache_kept_from_assisted_decoding_goes_on():
    model, prompt = build(), random_ids(1, 5)
    settings = {"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True}
    output = greedy(model, prompt, 20, **settings)
    ids = torch.cat([output.sequences, random_ids(1, 2, seed=8)], dim=1)
    expected = greedy_without_cache(model, ids, 9)
    assert torch.equal(greedy(model, ids, 9, past_key_values=output.past_key_values), expected)


@pytest.mark.parametrize("assistant", ["same_model", "prompt_lookup"])
def test_assisted_decoding_behind_an_encoder_equals_greedy(assistant):
    model, ids = pair_model(), random_ids(1, 6)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "pad_token_id": 0}
    helpers = {"same_model": {"assistant_model": pair_model()}, "prompt_lookup": {"prompt_lookup_num_tokens": 2}}
    assert torch.equal(model.generate(ids, **settings, **helpers[assistant]), model.generate(ids, **settings))


def test_exit_from_an_early_block_is_refused():
    with pytest.raises(ValueError, match="assistant_early_exit=1 is not possible.*prompt_lookup_num_tokens"):
        greedy(build(), random_ids(1, 4), 2, assistant_early_exit=1)


# --- caches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["static", "offloaded_static", "offloaded", "quantized"])
@pytest.mark.parametrize("make", [build, pair_model])
def test_other_caches_cannot_be_asked_for(make, implementation):
    model = make()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"cache_implementation='{implementation}' .*leave it out"):
        greedy(model, random_ids(1, 3), 2, cache_implementation=implementation)
    assert not calls


def test_the_dynamic_cache_asked_for_is_the_model_s_own():
    model, prompt = build(), random_ids(1, 3)
    output = greedy(model, prompt, 12, cache_implementation="dynamic", return_dict_in_generate=True)
    assert type(output.past_key_values) is EvolvedTransformerCache
    assert torch.equal(output.sequences, greedy_without_cache(model, prompt, 12))


@pytest.mark.parametrize("make", [build, pair_model])
def test_other_caches_are_refused_before_work_starts(make):
    model = make()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for cache in (DynamicCache(), EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(ValueError, match=r"no place for what the convolutions.*EvolvedTransformerCache\(config\)"):
            greedy(model, random_ids(1, 3), 2, past_key_values=cache)
    deeper = EvolvedTransformerCache(make(num_decoder_layers=5).config)
    with pytest.raises(ValueError, match="made for 5 decoder blocks"):
        greedy(model, random_ids(1, 3), 2, past_key_values=deeper)
    assert not calls


def test_packed_texts_are_refused():
    model = build()
    with pytest.raises(ValueError, match="generate_batch packs several texts.*pad them on the left and call generate"):
        model.generate_batch([[1, 2, 3], [4, 5]], generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0))


def test_an_empty_cache_may_be_passed():
    model, pair, prompt = build(), pair_model(), random_ids(2, 3)
    expected = greedy(model, prompt, 5)
    assert torch.equal(greedy(model, prompt, 5, past_key_values=EvolvedTransformerCache(model.config)), expected)
    expected = greedy(pair, prompt, 5)
    cache = EvolvedTransformerCache(pair.config)
    assert torch.equal(greedy(pair, prompt, 5, past_key_values=cache), expected)
    assert cache.get_seq_length() == 5


# --- encoder and decoder -------------------------------------------------------------------------------------

SOURCE_MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])


def pair_greedy_without_cache(model, ids, mask, start, count):
    """Greedy decoding by whole passes behind decoder ids (B, L): (B, L + count)."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, decoder_input_ids=start, use_cache=False).logits
        start = torch.cat([start, logits[:, -1:].argmax(-1)], dim=1)
    return start


@every_structure
def test_greedy_decoding_behind_an_encoder(structure):
    model, ids = pair_model(**STRUCTURES[structure]), random_ids(3, 6)
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    expected = pair_greedy_without_cache(model, ids, SOURCE_MASK, start, 14)
    settings = {"attention_mask": SOURCE_MASK, "max_new_tokens": 14, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), expected)
    for row in range(3):
        source = ids[row : row + 1, SOURCE_MASK[row].bool()]
        alone = model.generate(source, attention_mask=torch.ones_like(source), max_new_tokens=14, pad_token_id=0)
        assert torch.equal(alone, expected[row : row + 1])


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 6, "length_penalty": 0.6, "num_return_sequences": 4},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=["beams", "penalty", "sampling", "sampled_beams"],
)
@every_structure
def test_decoding_behind_an_encoder_equals_decoding_without_cache(structure, mode):
    model, ids = pair_model(**STRUCTURES[structure]), random_ids(3, 6)
    settings = {"attention_mask": SOURCE_MASK, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 1, **mode}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outputs.append(model.generate(ids, use_cache=use_cache, **settings))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_an_encoder_s_output_may_be_passed(mode):
    model, ids = pair_model(), random_ids(3, 6)
    settings = {"attention_mask": SOURCE_MASK, "max_new_tokens": 8, "pad_token_id": 0, **mode}
    torch.manual_seed(1)
    expected = model.generate(ids, **settings)
    with torch.no_grad():
        states = model.get_encoder()(ids, attention_mask=SOURCE_MASK).last_hidden_state
    torch.manual_seed(1)
    # transformers repeats it in place.
    output = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=states), **settings)
    assert torch.equal(output, expected)


def test_decoder_prompts_of_unequal_length():
    """Left-padded, with a mask; each row is what it is alone."""
    model, ids = pair_model(), random_ids(2, 6)
    prompts = torch.tensor([[0, 4, 5, 6, 7], [0, 0, 0, 0, 9]])
    mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0}
    output = model.generate(ids, decoder_input_ids=prompts, decoder_attention_mask=mask, **settings)
    for row, start in enumerate((0, 3)):
        prompt = prompts[row : row + 1, start:]
        expected = pair_greedy_without_cache(model, ids[row : row + 1], None, prompt, 12)
        assert torch.equal(output[row, 5:], expected[0, -12:])


# --- lengths, outputs, pipelines -----------------------------------------------------------------------------


def test_lengths_are_kept():
    model, pair, prompt = build(), pair_model(), random_ids(2, 5)
    assert greedy(model, prompt, 1).shape == (2, 6)
    mask = torch.ones_like(prompt)
    assert model.generate(prompt, attention_mask=mask, max_length=9, **QUIET).shape == (2, 9)
    assert pair.generate(prompt, attention_mask=mask, max_length=9, pad_token_id=0).shape == (2, 9)
    settings = {"attention_mask": mask, "pad_token_id": 0, "eos_token_id": greedy(model, prompt, 1)[:, -1].tolist()}
    assert model.generate(prompt, max_new_tokens=9, **settings).shape == (2, 6)
    assert model.generate(prompt, min_new_tokens=4, max_new_tokens=9, **settings).shape[1] >= 5 + 4


def test_outputs_of_every_step_can_be_returned():
    model = build()
    model.set_attn_implementation("eager")
    settings = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    output = greedy(model, random_ids(2, 4), 3, output_logits=True, **settings)
    assert len(output.attentions) == len(output.hidden_states) == len(output.logits) == 3
    with torch.no_grad():
        whole = model(output.sequences, output_hidden_states=True, use_cache=False)
    for step in range(3):
        assert len(output.attentions[step]) == model.config.num_hidden_layers
        for states, expected in zip(output.hidden_states[step], whole.hidden_states, strict=True):
            torch.testing.assert_close(states[:, -1], expected[:, 3 + step], **EXACT)
        for weights in output.attentions[step]:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)


def test_attentions_to_the_encoder_can_be_returned():
    model, ids = pair_model(), random_ids(2, 6)
    model.set_attn_implementation("eager")
    settings = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 3, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert len(output.cross_attentions) == len(output.decoder_attentions) == 3
    for step in output.cross_attentions:
        assert [weights.shape for weights in step] == [(2, 2, 1, 6)] * 4


def test_generation_says_nothing(capfd):
    """Neither on stdout nor on stderr, and warnings are errors in these tests."""
    model = build()
    model.generate(PADDED_PROMPTS, attention_mask=PROMPT_MASK, max_new_tokens=4, **QUIET)
    greedy(model, random_ids(1, 3), 4, num_beams=2)
    greedy(model, random_ids(1, 3), 4, prompt_lookup_num_tokens=2)
    config = GenerationConfig(do_sample=True, max_new_tokens=4, pad_token_id=0)
    for generator in (model, pair_model()):
        generator.generate(random_ids(1, 3), attention_mask=torch.ones(1, 3), generation_config=config)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_text_generation_pipeline():
    model, tokenizer = build(), word_tokenizer()
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    for batch_size in (1, 3):
        outputs = generator(texts, batch_size=batch_size, generation_config=config)
        for text, (output,) in zip(texts, outputs, strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            expected = tokenizer.decode(greedy_without_cache(model, ids, 6)[0], skip_special_tokens=True)
            # The pipeline joins prompt and new text without the space between words.
            assert output["generated_text"].replace(" ", "") == expected.replace(" ", "")
