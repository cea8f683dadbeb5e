"""Low precision, determinism, compilation and copies."""

import copy

import pytest
import torch
from models.transformer_xl.naive_transformer_xl import NaiveRows
from models.transformer_xl.small_models import (
    EXACT,
    HALF,
    MODES,
    VARIANTS,
    assert_rows_equal,
    log_probs,
    random_ids,
    small_model,
)

from hf_efficient import TransformerXLForSequenceClassification, TransformerXLForTokenClassification

LOW = [torch.bfloat16, torch.float16]
SOME_VARIANTS = ["plain", "pre_norm", "zeros_same_length", "adaptive_shrinking", "everything"]
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]])


def tame(model):
    """Weights of the size that training gives, so that what is compared is precision and not chaos."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("layer_norm.weight"):
                parameter.mul_(0.4)
    return model


def run_segments(model, mode, mask=None, labels=True):
    """Probabilities and losses of four segments with carried memory."""
    cache, outputs = model.create_cache(), []
    with MODES[mode]():
        for step in range(4):
            ids = random_ids(2, 5, seed=step)
            probabilities = log_probs(model(ids, attention_mask=mask, past_key_values=copy.deepcopy(cache))).exp()
            loss = model(ids, attention_mask=mask, past_key_values=cache, labels=ids).loss
            outputs.append((probabilities.detach(), loss))
    return outputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("variant", SOME_VARIANTS)
def test_autocast_is_close(variant, dtype, mode):
    model = tame(small_model(dtype=torch.float32, **VARIANTS[variant]))
    exact = run_segments(model, mode, MASK)
    with torch.autocast("cpu", dtype=dtype):
        low = run_segments(model, mode, MASK)
    for (probabilities, loss), (expected, expected_loss) in zip(low, exact, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(probabilities.float(), expected, **HALF)
        torch.testing.assert_close(loss, expected_loss, **HALF)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("variant", SOME_VARIANTS)
def test_training_step_under_autocast_has_close_gradients(variant, dtype):
    model = tame(small_model(dtype=torch.float32, **VARIANTS[variant])).train()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            losses = [loss for _, loss in run_segments(model, "hidden_states", MASK)]
        gradients.append(torch.autograd.grad(sum(losses), list(model.parameters()), materialize_grads=True))
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1])
    exact, low = (torch.cat([gradient.flatten() for gradient in one]) for one in gradients)
    # A ReLU near zero that rounding switches on or off changes a twelfth of a gradient here; hence no entrywise bound.
    assert torch.cosine_similarity(exact, low, dim=0) > 0.98
    assert abs(low.norm() / exact.norm() - 1) < 0.2


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_memory_made_under_autocast_serves_without_and_the_other_way_round(mode, first):
    model = tame(small_model(dtype=torch.float32))
    exact = run_segments(model, mode)
    cache = model.create_cache()
    for step in range(4):
        ids = random_ids(2, 5, seed=step)
        enabled = first if step < 2 else not first
        with MODES[mode](), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            probabilities = log_probs(model(ids, past_key_values=cache)).exp()
        torch.testing.assert_close(probabilities.detach().float(), exact[step][0], **HALF)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("variant", SOME_VARIANTS)
def test_half_precision_model_is_close(variant, dtype, mode, implementation):
    model = tame(small_model(dtype=torch.float32, **VARIANTS[variant])).to(dtype)
    exact = copy.deepcopy(model).double()  # with the weights rounded, so that only the computation differs
    model.set_attn_implementation(implementation)
    low, expected = run_segments(model, mode, MASK), run_segments(exact, mode, MASK)
    for (probabilities, loss), (expected_probabilities, expected_loss) in zip(low, expected, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(probabilities.double(), expected_probabilities, **HALF)
        torch.testing.assert_close(loss.double(), expected_loss, **HALF)


@pytest.mark.parametrize("cls", [TransformerXLForSequenceClassification, TransformerXLForTokenClassification])
def test_half_precision_heads_run(cls):
    model = small_model(cls, dtype=torch.bfloat16, num_labels=3)
    labels = torch.tensor([1, 2]) if cls is TransformerXLForSequenceClassification else random_ids(2, 5) % 3
    output = model(random_ids(2, 5), attention_mask=MASK, labels=labels)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_long_memory_in_bfloat16_keeps_its_positions():
    """Distances beyond 256 are no whole numbers of bfloat16; tables made in it would scramble a long memory."""
    model = tame(small_model(dtype=torch.float32, mem_len=900, num_hidden_layers=1)).to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].self_attn.position_bias.mul_(8)  # attention follows position
    exact, cache, other = copy.deepcopy(model).double(), model.create_cache(), model.create_cache()
    with torch.no_grad():
        for step in range(8):
            ids = random_ids(1, 110, seed=step)
            low = log_probs(model(ids, past_key_values=cache)).exp()
            expected = log_probs(exact(ids, past_key_values=other)).exp()
            torch.testing.assert_close(low.double(), expected, **HALF)


def test_memory_follows_a_change_of_dtype():
    """Trained in float32, evaluated in bfloat16, with the memory of training."""
    for mode in MODES:
        model = tame(small_model(dtype=torch.float32))
        exact = run_segments(model, mode)
        cache = model.create_cache()
        with MODES[mode]():
            for step in range(4):
                model.to(torch.float32 if step < 2 else torch.bfloat16)
                probabilities = log_probs(model(random_ids(2, 5, seed=step), past_key_values=cache)).exp()
                torch.testing.assert_close(probabilities.detach().float(), exact[step][0], **HALF)


def test_scores_near_the_end_of_float16_do_not_give_nan():
    """Here q . k exceeds 65504, the largest number of float16, and q . k / sqrt(head_dim) does not."""
    model = small_model(dtype=torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.k_proj.weight.mul_(30)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = model.create_cache()
        with torch.no_grad():
            for step in range(3):
                output = model(random_ids(2, 5, seed=step), attention_mask=MASK, past_key_values=cache)
                assert output.logits.isfinite().all()


@pytest.mark.parametrize("is_training", [True, False])
def test_same_call_same_bits(is_training):
    model = small_model(dtype=torch.float32, cutoffs=[5, 11], dropout=0.2).train(is_training)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        segments = run_segments(model, "hidden_states", MASK)
        gradients = torch.autograd.grad(sum(loss for _, loss in segments), list(model.parameters()))
        results.append([*(probabilities for probabilities, _ in segments), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_inference_mode_gives_the_same_and_its_memory_can_be_used_outside():
    model = small_model(**VARIANTS["zeros"])
    rows, cache = NaiveRows(model, 2), model.create_cache()
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad]
    for step, mode in enumerate(modes):
        ids = random_ids(2, 4, seed=step)
        with mode():
            output = model(ids, past_key_values=cache)
            cache.reset_rows(torch.tensor([step == 1, False]))
        assert_rows_equal(output, rows.feed(ids))
        rows.reset([0] if step == 1 else [])
        if output.logits.requires_grad:
            output.logits.sum().backward()


def test_copied_model_is_independent():
    model = small_model(**VARIANTS["everything"])
    other, ids = copy.deepcopy(model), random_ids(2, 5)
    expected = model(ids).logits
    torch.testing.assert_close(other(ids).logits, expected, **EXACT)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.config.mem_len = 1
    other.resize_token_embeddings(20)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_compiled_model_is_one_graph_and_gives_the_same(variant, masked):
    model = small_model(**VARIANTS[variant])
    settings = {"use_cache": False, "attention_mask": MASK if masked else None}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for gradients in (torch.no_grad, torch.enable_grad):
        with gradients():
            ids = random_ids(2, 5)
            torch.testing.assert_close(compiled(ids, **settings).logits, model(ids, **settings).logits, **EXACT)


def test_compiled_training_step_is_one_graph_and_gives_the_same():
    model = small_model(pre_norm=True).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = random_ids(2, 5)
    losses = [one(ids, labels=ids, use_cache=False).loss for one in (compiled, model)]
    torch.testing.assert_close(*losses, **EXACT)
    given, wanted = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["plain", "adaptive_shrinking", "everything"])
def test_compiled_model_carries_memory(variant, mode):
    """Graphs may break at the memory, results may not change; pads, losses and lengths that vary included."""
    model = small_model(**VARIANTS[variant])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    caches = model.create_cache(), model.create_cache()
    with MODES[mode]():
        for step, length in enumerate((5, 5, 1, 1, 3)):
            ids = random_ids(2, length, seed=step)
            mask = MASK if step == 1 else None
            settings = {"attention_mask": mask, "labels": ids if step < 2 else None}
            given = compiled(ids, past_key_values=caches[0], **settings)
            expected = model(ids, past_key_values=caches[1], **settings)
            for name in ("loss", "logits"):
                one, other = getattr(given, name), getattr(expected, name)
                if other is not None:
                    torch.testing.assert_close(one, other, **EXACT)
            assert caches[0].row_lengths.tolist() == caches[1].row_lengths.tolist()


@pytest.mark.slow
def test_dtype_matrix_of_generation():
    """Greedy tokens of a model with clear preferences are the same in every precision."""
    model = small_model(dtype=torch.float32, mem_len=8, same_length=True, tie_word_embeddings=False)
    ids = random_ids(3, 6)
    expected = copy.deepcopy(model).double()
    for dtype in (torch.float32, *LOW):
        one = copy.deepcopy(model).to(dtype)
        output = one.generate(ids, max_new_tokens=20, pad_token_id=0)
        with torch.no_grad():
            probabilities = expected(output, use_cache=False).logits.softmax(-1)[:, 5:-1]
        chosen = probabilities.gather(-1, output[:, 6:, None]).squeeze(-1)
        assert (chosen > probabilities.amax(-1) - 0.05).all()
