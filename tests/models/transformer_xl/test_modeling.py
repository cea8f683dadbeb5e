"""The whole model against the naive one, segment after segment in every variant, and what a call may touch."""

import copy

import pytest
import torch
from models.transformer_xl.naive_transformer_xl import NaiveTransformerXL
from models.transformer_xl.small_models import EXACT, MODES, VARIANTS, log_probs, random_ids, small_config, small_model
from transformers import DynamicCache

from hf_efficient import TransformerXLForCausalLM, TransformerXLModel

SEGMENTS = (3, 7, 1, 5)
IMPLEMENTATIONS = ["eager", "sdpa"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_equal_naive_model(variant, mode):
    model = small_model(**VARIANTS[variant])
    naive = NaiveTransformerXL(model)
    cache, memories = model.create_cache(), [None, None]
    with MODES[mode]():
        for length in SEGMENTS:
            ids = random_ids(2, length, seed=length)
            output = model(ids, past_key_values=cache, output_hidden_states=True, output_attentions=True)
            for row in range(2):
                expected = naive.segment(ids[row].tolist(), memories[row])
                memories[row] = expected.memory
                torch.testing.assert_close(log_probs(output)[row], expected.log_probs, **EXACT)
                hidden_states = torch.stack([states[row] for states in output.hidden_states])
                torch.testing.assert_close(hidden_states, expected.hidden_states, **EXACT)
                attentions = torch.stack([weights[row] for weights in output.attentions])
                torch.testing.assert_close(attentions, expected.attentions, **EXACT)
            assert cache.holds_keys == (mode == "keys_and_values")
            assert cache.memory_length == len(memories[0][0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_attention_equals_eager(variant, mode):
    model = small_model(**VARIANTS[variant])
    outputs = {}
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        cache = model.create_cache()
        with MODES[mode]():
            outputs[implementation] = [
                log_probs(model(random_ids(2, length), past_key_values=cache)) for length in SEGMENTS
            ]
    for eager, fused in zip(outputs["eager"], outputs["sdpa"], strict=True):
        torch.testing.assert_close(eager, fused, **EXACT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_naive_model(variant, implementation):
    """Every parameter: W_k and W_v also receive what comes through the memory's positions, which hold no gradient."""
    model = small_model(**VARIANTS[variant]).train()
    model.set_attn_implementation(implementation)
    naive = NaiveTransformerXL(model)
    cache, memory, loss, expected = model.create_cache(), None, 0.0, 0.0
    for step in range(2):  # the first one against what the memory starts from
        ids = random_ids(1, 4 + step, seed=step)
        loss = loss + model(ids, past_key_values=cache, labels=ids).loss
        segment = naive.segment(ids[0].tolist(), memory)
        memory = segment.memory
        expected = expected - segment.log_probs[range(3 + step), ids[0, 1:].tolist()].mean()
    torch.testing.assert_close(loss, expected, **EXACT)
    parameters = dict(model.named_parameters())
    given = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    wanted = torch.autograd.grad(expected, list(parameters.values()), materialize_grads=True)
    for name, one, other in zip(parameters, given, wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")
        # A query that sees only itself has one probability, 1, whatever its score.
        if ".self_attn." in name and variant != "same_length_one":
            assert (other != 0).any(), name


def test_padding_token_has_the_gradient_of_any_other_token():
    """Pads get none because they are masked; a token that doubles as pad, as `<eos>` often does, must learn."""
    gradients = []
    for pad_token_id in (None, 3):
        model = small_model(pad_token_id=pad_token_id, eos_token_id=3, tie_word_embeddings=False)
        ids = torch.tensor([[3, 4, 3, 5]])
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], **EXACT)


@pytest.mark.parametrize("variant", ["plain", "adaptive_shrinking", "narrow_embedding"])
def test_inputs_embeds_equal_input_ids(variant):
    model = small_model(**VARIANTS[variant])
    cache, other = model.create_cache(), model.create_cache()
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1]])
    for step in range(3):
        ids = random_ids(2, 4, seed=step)
        expected = model(ids, attention_mask=mask, past_key_values=cache).logits
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(
            model(inputs_embeds=embeddings, attention_mask=mask, past_key_values=other).logits, expected
        )


def test_inputs_embeds_receive_gradient():
    model = small_model()
    embeddings = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=embeddings, labels=random_ids(1, 4)).loss.backward()
    assert (embeddings.grad[0, :3] != 0).any(-1).all()


@pytest.mark.parametrize("variant", ["plain", "adaptive"])
@pytest.mark.parametrize("keep", [1, 3, 4, 5, 9, torch.tensor([4, 0, 2]), torch.tensor([0])])
def test_logits_to_keep_selects_positions(keep, variant):
    model = small_model(**VARIANTS[variant])
    ids = random_ids(2, 5)
    full = model(ids).logits
    kept = model(ids, logits_to_keep=keep).logits
    expected = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    torch.testing.assert_close(kept, expected, **EXACT)


@pytest.mark.parametrize("variant", ["plain", "adaptive"])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("keep", [1, 4, 5, 9, torch.tensor([4, 3, 2, 1, 0]), torch.tensor([3, 2, 1, 0])])
def test_logits_to_keep_does_not_change_the_loss(keep, name, variant):
    model = small_model(**VARIANTS[variant])
    ids = random_ids(2, 5)
    expected = model(ids, **{name: ids})
    output = model(ids, logits_to_keep=keep, **{name: ids})
    torch.testing.assert_close(output.losses, expected.losses, **EXACT)
    torch.testing.assert_close(output.loss, expected.loss, **EXACT)


def test_hidden_states_and_attentions_come_on_request_only():
    model = small_model()
    output = model(random_ids(1, 3))
    assert output.hidden_states is None
    assert output.attentions is None
    output = model.model(random_ids(1, 3), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    assert output.hidden_states[-1] is output.last_hidden_state


def test_config_can_request_outputs():
    model = small_model()
    model.config.output_hidden_states = True
    assert len(model(random_ids(1, 3)).hidden_states) == 3
    assert model(random_ids(1, 3), output_hidden_states=False).hidden_states is None


def test_tuple_output_holds_the_same():
    model = small_model()
    ids = random_ids(1, 4)
    output = model(ids, labels=ids)
    loss, losses, logits, cache = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(losses, output.losses)
    assert torch.equal(logits, output.logits)
    assert cache.get_seq_length() == 4


def test_memory_is_returned_when_asked_for():
    model = small_model()
    ids = random_ids(2, 3)
    assert model(ids).past_key_values.get_seq_length() == 3
    assert model(ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 3
    cache = model.create_cache()
    assert model(ids, past_key_values=cache).past_key_values is cache
    assert model(ids, past_key_values=cache, use_cache=False).past_key_values in (None, cache)
    assert cache.get_seq_length() >= 3


def test_nothing_is_kept_between_calls():
    """The same call gives the same bits whatever was called before it, and leaves module and config as they were."""
    model = small_model(cutoffs=[5, 11], same_length=True)
    ids = random_ids(2, 5)
    expected = model(ids, labels=ids).loss
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    cache = model.create_cache()
    with torch.no_grad():
        for step in range(3):
            model(random_ids(2, 4 + step), past_key_values=cache, attention_mask=torch.ones(2, 4 + step))
    model(random_ids(1, 9), output_attentions=True)
    assert model.config.to_dict() == config
    for name, module in model.named_modules():
        assert dict(vars(module)) == attributes[name], name
    assert torch.equal(model(ids, labels=ids).loss, expected)


def test_tensors_of_the_caller_are_not_modified():
    model = small_model(cutoffs=[5, 11])
    tensors = {
        "input_ids": random_ids(2, 5),
        "attention_mask": torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]),
        "labels": torch.tensor([[-100] * 5, [1, 2, -100, 16, -100]]),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    cache = model.create_cache()
    for mode in MODES:
        with MODES[mode]():
            model(**tensors, past_key_values=cache)
            model(tensors["input_ids"], shift_labels=tensors["labels"], past_key_values=cache)
            embeddings = model.get_input_embeddings()(tensors["input_ids"]).detach()
            copied = embeddings.clone()
            model(inputs_embeds=embeddings, attention_mask=tensors["attention_mask"], past_key_values=cache)
            assert torch.equal(embeddings, copied)
        cache = model.create_cache()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


def test_evaluation_leaves_the_random_generator_alone():
    model = small_model(dropout=0.5, attention_dropout=0.5)
    ids = random_ids(2, 5)
    state = torch.get_rng_state()
    cache = model.create_cache()
    first = model(ids, past_key_values=cache, labels=ids).loss
    model(ids, past_key_values=cache, output_attentions=True)
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(ids, labels=ids).loss, first)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": random_ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 8)},
            ValueError,
            "exactly one of input_ids and inputs_embeds",
        ),
        ({"input_ids": random_ids(3)}, ValueError, r"input_ids.*\(3,\)"),
        ({"inputs_embeds": torch.zeros(2, 3, 7)}, ValueError, r"inputs_embeds.*\(2, 3, 7\).*length, 8"),
        ({"inputs_embeds": torch.zeros(3, 8)}, ValueError, r"inputs_embeds.*\(3, 8\)"),
        (
            {"input_ids": random_ids(2, 3), "attention_mask": torch.ones(2, 2)},
            ValueError,
            r"attention_mask has shape \(2, 2\).*\(2, 3\)",
        ),
        (
            {"input_ids": random_ids(2, 3), "attention_mask": torch.ones(1, 3)},
            ValueError,
            r"attention_mask has shape \(1, 3\).*\(2, 3\)",
        ),
        (
            {"input_ids": random_ids(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)},
            ValueError,
            r"attention_mask has shape \(2, 1, 3, 3\).*\(2, 3\)",
        ),
        (
            {"input_ids": random_ids(2, 3), "past_key_values": ((1, 2),)},
            TypeError,
            "past_key_values is a tuple.*create_cache",
        ),
        (
            {"input_ids": random_ids(2, 3), "past_key_values": DynamicCache()},
            TypeError,
            "past_key_values is a DynamicCache.*create_cache",
        ),
        (
            {"input_ids": random_ids(2, 3), "shift_labels": random_ids(2, 2)},
            ValueError,
            r"shift_labels has shape \(2, 2\).*\(2, 3\)",
        ),
        (
            {"input_ids": random_ids(2, 3), "labels": random_ids(2, 2)},
            ValueError,
            r"labels has shape \(2, 2\).*\(2, 3\)",
        ),
    ],
)
def test_illegal_argument_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        small_model(dtype=torch.float32)(**arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"labels": random_ids(2, 3)},
        {"labels": torch.full((2, 4), 17)},
        {"shift_labels": torch.full((2, 4), -7)},
        {"attention_mask": torch.ones(2, 3)},
        {"input_ids": torch.full((2, 4), 17)},
        {"input_ids": random_ids(3, 4)},
    ],
    ids=["labels_shape", "label", "shift_label", "mask_shape", "id", "batch"],
)
def test_refused_call_leaves_the_memory_as_it_was(arguments, mode):
    """So that the call can be repeated with the mistake mended."""
    model = small_model()
    cache = model.create_cache()
    with MODES[mode]():
        model(random_ids(2, 4), past_key_values=cache)
        before = cache.state_dict()
        with pytest.raises(ValueError, match="."):
            model(**({"input_ids": random_ids(2, 4)} | arguments), past_key_values=cache)
    after = cache.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_empty_inputs_give_empty_outputs():
    model = small_model()
    assert model(random_ids(2, 0)).logits.shape == (2, 0, 17)
    assert model(random_ids(0, 3)).logits.shape == (0, 3, 17)
    cache = model.create_cache()
    with torch.no_grad():
        model(random_ids(2, 3), past_key_values=cache)
        model(random_ids(2, 0), past_key_values=cache)
        assert cache.get_seq_length() == 3
        continued = model(random_ids(2, 2), past_key_values=cache).logits
        whole = model(torch.cat([random_ids(2, 3), random_ids(2, 2)], dim=1)).logits
    torch.testing.assert_close(continued, whole[:, 3:], **EXACT)


@pytest.mark.parametrize("cls", [TransformerXLModel, TransformerXLForCausalLM])
@pytest.mark.parametrize("method", ["normal", "uniform"])
def test_initialisation_is_the_original_release_s(cls, method):
    settings = {"init_method": method, "initializer_range": 0.3, "init_range": 0.2, "proj_init_std": 0.05}
    model = cls(small_config(cutoffs=[5, 11], div_val=2, hidden_size=64, vocab_size=400, **settings))
    for name, parameter in model.named_parameters():
        if "layer_norm.weight" in name:
            mean, std = 1.0, 0.3
        elif name.endswith(".bias") or name.endswith("cluster_bias"):
            assert (parameter == 0).all(), name
            continue
        elif "projections" in name:
            mean, std = 0.0, 0.05
        else:
            mean, std = 0.0, 0.3 if method == "normal" else 0.2 / 3**0.5
        # 5 standard errors of the mean; the standard deviation of n draws has a relative error of sqrt(1 / 2n).
        assert abs(parameter.mean() - mean) < 5 * std / parameter.numel() ** 0.5, name
        assert abs(parameter.std() / std - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
        if method == "uniform" and mean == 0 and "projections" not in name:
            assert parameter.abs().max() <= 0.2, name
