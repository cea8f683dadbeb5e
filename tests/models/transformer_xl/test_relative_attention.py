"""Relative attention against the loop over the equations: both forms, forward and every gradient."""

import itertools
import math

import pytest
import torch
from models.transformer_xl.small_models import EXACT, HALF

from hf_efficient.models.transformer_xl import recomputed_attention
from hf_efficient.models.transformer_xl.relative_attention import (
    memory_attention_mask,
    position_scores,
    relative_attention,
    relative_shift,
    sinusoid_table,
)
from hf_efficient.models.transformer_xl.relative_attention_reference import (
    relative_attention_reference,
    sinusoid_reference,
)

BATCH, HEADS, HEAD_DIM, HIDDEN_SIZE = 2, 2, 3, 4
CPU = torch.device("cpu")

# query_len, memory_len, clamp_len, window (keys a query sees at most), dead slots of each row
CASES = {
    "no_memory": (5, 0, -1, None, None),
    "one_token_no_memory": (1, 0, -1, None, None),
    "one_token": (1, 7, -1, None, None),
    "one_token_clamped": (1, 7, 3, None, None),
    "one_token_window": (1, 6, -1, 4, None),
    "one_token_dead": (1, 4, -1, None, (3, 0)),
    "memory": (4, 7, -1, None, None),
    "odd": (7, 11, -1, None, None),
    "clamp_1": (3, 4, 1, None, None),
    "clamp_inside": (5, 6, 4, None, None),
    "clamp_is_length": (3, 4, 6, None, None),
    "clamp_beyond": (3, 4, 50, None, None),
    "window": (5, 6, -1, 4, None),
    "window_1": (5, 3, -1, 1, None),
    "window_inside_segment": (7, 2, -1, 3, None),
    "window_beyond": (4, 3, -1, 99, None),
    "dead": (4, 5, -1, None, (5, 2)),
    "all": (5, 6, 3, 4, (1, 6)),
}


def draw_inputs(query_len: int, key_len: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Random tensors of all arguments that carry gradient."""
    shapes = {
        "query": (BATCH, HEADS, query_len, HEAD_DIM),
        "key": (BATCH, HEADS, key_len, HEAD_DIM),
        "value": (BATCH, HEADS, key_len, HEAD_DIM),
        "position_weight": (HEADS, HEAD_DIM, HIDDEN_SIZE),
        "content_bias": (HEADS, HEAD_DIM),
        "position_bias": (HEADS, HEAD_DIM),
    }
    return {name: torch.randn(*shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def run_optimised(inputs, case, implementation):
    """`relative_attention` called as the model calls it."""
    query_len, memory_len, clamp_len, window, dead = case
    num_rows = memory_len + query_len + 1
    num_rows = min(num_rows, clamp_len + 1) if clamp_len > 0 else num_rows
    table = sinusoid_table(num_rows, HIDDEN_SIZE, inputs["query"].dtype, CPU)
    row_lengths = None if dead is None else memory_len - torch.tensor(dead)
    others = {name: tensor for name, tensor in inputs.items() if name != "position_weight"}
    return relative_attention(
        **others,
        position_key=torch.einsum("rd,hkd->hrk", table, inputs["position_weight"]),
        mask=memory_attention_mask(query_len, memory_len, row_lengths, window, CPU),
        implementation=implementation,
    )


def use_small_tiles(monkeypatch, scores):
    """Cut the attention of training as a long segment is cut: into heads, and these into a few queries."""
    monkeypatch.setattr(recomputed_attention, "CPU_TILE_SCORES", scores)
    monkeypatch.setattr(recomputed_attention, "MIN_TILE_QUERIES", 2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "sdpa_without_gradient", "sdpa_by_head", "sdpa_by_query"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference_forward_and_every_gradient(case, implementation, monkeypatch):
    if implementation == "sdpa_in_blocks":  # as long segments are computed: a few queries at a time
        monkeypatch.setattr(recomputed_attention, "CPU_TILE_SCORES", 1)
        monkeypatch.setattr(recomputed_attention, "MIN_TILE_QUERIES", 2)
    query_len, memory_len, clamp_len, window, dead = case
    inputs = draw_inputs(query_len, memory_len + query_len)
    num_dead = None if dead is None else torch.tensor(dead)
    expected, expected_weights = relative_attention_reference(
        **inputs, clamp_len=clamp_len, window=window, num_dead=num_dead
    )
    with torch.set_grad_enabled(implementation != "sdpa_without_gradient"):
        output, weights = run_optimised(inputs, case, implementation.split("_")[0])
    torch.testing.assert_close(output, expected, **EXACT)
    if implementation == "eager":
        torch.testing.assert_close(weights, expected_weights, **EXACT)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)
        assert (weights[expected_weights == 0] == 0).all()
    else:
        assert weights is None
    if implementation == "sdpa_without_gradient":
        return
    upstream = torch.randn_like(expected)
    for name, tensor in inputs.items():
        (wanted,) = torch.autograd.grad(expected, tensor, upstream, retain_graph=True)
        (given,) = torch.autograd.grad(output, tensor, upstream, retain_graph=True)
        torch.testing.assert_close(given, wanted, **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_equation_term_counts(implementation):
    """Each of the four terms of eq. 5 moves the output, so that none can be dropped unseen by the comparison above."""
    case = CASES["memory"]
    inputs = {name: tensor.detach() for name, tensor in draw_inputs(4, 11).items()}
    output, _ = run_optimised(inputs, case, implementation)
    for name in ("query", "key", "position_weight", "content_bias", "position_bias"):
        without, _ = run_optimised(inputs | {name: torch.zeros_like(inputs[name])}, case, implementation)
        assert (output - without).abs().max() > 1e-3, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_of_the_same_dtype(dtype, implementation):
    case = CASES["all"]
    inputs = {name: tensor.detach().to(dtype) for name, tensor in draw_inputs(5, 11).items()}
    exact, _ = run_optimised({name: tensor.double() for name, tensor in inputs.items()}, case, implementation)
    output, _ = run_optimised(inputs, case, implementation)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, **HALF)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_large_scores_stay_finite(implementation):
    """Scores near the end of float16's range neither overflow at masked keys nor leak into them."""
    inputs = {name: tensor.detach().half() for name, tensor in draw_inputs(5, 11).items()}
    inputs["query"], inputs["key"] = inputs["query"] * 100, inputs["key"] * 100
    output, _ = run_optimised(inputs, CASES["all"], implementation)
    assert output.isfinite().all()
    inputs["value"][:, :, -1] = 1000  # seen by the last query alone
    changed, _ = run_optimised(inputs, CASES["all"], implementation)
    assert torch.equal(changed[:, :, :-1], output[:, :, :-1])


def test_dropout_drops_probabilities_and_scales_the_rest():
    case = CASES["memory"]
    query_len, memory_len = case[:2]
    inputs = {name: tensor.detach() for name, tensor in draw_inputs(query_len, 11).items()}
    _, plain = run_optimised(inputs, case, "eager")
    table = sinusoid_table(12, HIDDEN_SIZE, torch.float64, CPU)
    arguments = {name: inputs[name] for name in ("query", "key", "value", "content_bias", "position_bias")}
    arguments["position_key"] = torch.einsum("rd,hkd->hrk", table, inputs["position_weight"])
    arguments["mask"] = memory_attention_mask(query_len, memory_len, None, None, CPU)
    output, dropped = relative_attention(**arguments, dropout=0.25, implementation="eager")
    is_kept = dropped != 0
    torch.testing.assert_close(dropped[is_kept], plain[is_kept] / 0.75, **EXACT)
    assert 0 < (is_kept.sum() / (plain != 0).sum()) < 1
    torch.testing.assert_close(output, dropped @ inputs["value"], **EXACT)
    # The fused form draws its own mask; its mean over many draws is the output without dropout.
    outputs = [relative_attention(**arguments, dropout=0.25)[0] for _ in range(2000)]
    expected, _ = relative_attention(**arguments)
    assert not torch.equal(outputs[0], outputs[1])
    assert (torch.stack(outputs).mean(0) - expected).abs().max() < 0.12


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "sdpa_in_tiles"])
def test_gradients_belong_to_the_weights_that_were_dropped(implementation, monkeypatch):
    """Checked by finite differences with the same seed: the backward pass must know which ones these were."""
    if implementation == "sdpa_in_tiles":
        use_small_tiles(monkeypatch, 1)
    inputs = draw_inputs(3, 5)
    arguments = {name: inputs[name] for name in ("query", "key", "value", "content_bias", "position_bias")}
    arguments["position_key"] = torch.randn(HEADS, 4, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    mask = memory_attention_mask(3, 2, torch.tensor([0, 2]), None, CPU)

    def attend(*tensors):
        torch.manual_seed(3)
        given = dict(zip(arguments, tensors, strict=True))
        return relative_attention(**given, mask=mask, dropout=0.5, implementation=implementation.split("_")[0])[0]

    assert not torch.equal(attend(*arguments.values()), relative_attention(**arguments, mask=mask)[0])
    assert torch.autograd.gradcheck(attend, tuple(arguments.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_keeps_no_scores(dropout):
    """What is kept for the backward pass grows with T + S, not with T times S."""
    query_len, key_len = 48, 160
    inputs = draw_inputs(query_len, key_len, torch.float32)
    position_key = torch.randn(HEADS, key_len + 1, HEAD_DIM, requires_grad=True)
    arguments = {name: inputs[name] for name in ("query", "key", "value", "content_bias", "position_bias")}
    mask = memory_attention_mask(query_len, key_len - query_len, None, None, CPU)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        relative_attention(**arguments, position_key=position_key, mask=mask, dropout=dropout)
    assert 0 < max(sizes) < BATCH * HEADS * query_len * key_len
    assert max(sizes) == query_len * key_len  # the mask, one for all heads and rows


def test_unknown_implementation_is_refused():
    inputs = draw_inputs(4, 11)
    with pytest.raises(ValueError, match=r"implementation='flash'.*eager, sdpa"):
        run_optimised(inputs, CASES["memory"], "flash")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_missing_mask_is_refused_for_several_queries(implementation):
    inputs = draw_inputs(4, 4)
    position_key = torch.randn(HEADS, 5, HEAD_DIM, dtype=torch.float64)
    arguments = {name: tensor for name, tensor in inputs.items() if name != "position_weight"}
    with pytest.raises(ValueError, match="mask=None with 4 queries.*pass a causal mask"):
        relative_attention(**arguments, position_key=position_key, implementation=implementation)


@pytest.mark.parametrize("hidden_size", [2, 4, 10])
@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_sinusoid_table_is_the_equation_oldest_first(num_rows, hidden_size):
    table = sinusoid_table(num_rows, hidden_size, torch.float64, CPU)
    expected = [sinusoid_reference(num_rows - 1 - row, hidden_size) for row in range(num_rows)]
    torch.testing.assert_close(table, torch.stack(expected), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinusoid_table_is_exact_for_long_distances(dtype):
    """Whole numbers above 256 do not exist in bfloat16: angles formed there would be off by up to 2."""
    table = sinusoid_table(3001, 16, dtype, CPU)
    assert table.dtype == dtype
    exact = torch.stack([sinusoid_reference(3000 - row, 16) for row in range(3001)])
    # Angles up to 3000 in float32 carry an error of 2e-4; the rest is the rounding of the result.
    torch.testing.assert_close(table.double(), exact, rtol=0, atol=4e-4 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("query_len", [1, 2, 5])
@pytest.mark.parametrize("memory_len", [0, 1, 6])
def test_relative_shift_is_its_definition(query_len, memory_len):
    key_len = memory_len + query_len
    scores = torch.randn(BATCH, HEADS, query_len, key_len + 1)
    shifted = relative_shift(scores)
    assert shifted.shape == (BATCH, HEADS, query_len, key_len)
    for i, j in itertools.product(range(query_len), range(key_len)):
        if j <= memory_len + i:
            assert torch.equal(shifted[..., i, j], scores[..., i, j + query_len - i])


@pytest.mark.parametrize("num_rows", [1, 2, 5, 9, 10, 11, 30])
@pytest.mark.parametrize("query_len", [1, 4])
def test_position_scores_are_products_with_the_row_of_the_distance(query_len, num_rows):
    key_len = 9
    query = torch.randn(BATCH, HEADS, query_len, HEAD_DIM, dtype=torch.float64)
    position_key = torch.randn(HEADS, num_rows, HEAD_DIM, dtype=torch.float64)
    scores = position_scores(query, position_key, key_len)
    assert scores.shape == (BATCH, HEADS, query_len, key_len)
    for i, j in itertools.product(range(query_len), range(key_len)):
        distance = key_len - query_len + i - j
        if distance >= 0:
            row = num_rows - 1 - min(distance, num_rows - 1)
            expected = torch.einsum("bhk,hk->bh", query[:, :, i], position_key[:, row])
            torch.testing.assert_close(scores[:, :, i, j], expected, **EXACT)


@pytest.mark.parametrize("row_lengths", [None, (0, 3), (3, 3), (0, 0)])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 50])
@pytest.mark.parametrize("query_len", [1, 2, 5])
@pytest.mark.parametrize("memory_len", [0, 3])
def test_mask_is_its_definition(query_len, memory_len, window, row_lengths):
    lengths = None if row_lengths is None else tuple(min(length, memory_len) for length in row_lengths)
    mask = memory_attention_mask(
        query_len, memory_len, None if lengths is None else torch.tensor(lengths), window, CPU
    )
    expected = torch.zeros(BATCH, 1, query_len, memory_len + query_len, dtype=torch.bool)
    for b, i, j in itertools.product(range(BATCH), range(query_len), range(memory_len + query_len)):
        here = memory_len + i
        is_real = lengths is None or j >= memory_len - lengths[b]
        expected[b, 0, i, j] = j <= here and is_real and here - j < (math.inf if window is None else window)
    if mask is None:
        assert expected.all()
    else:
        assert mask.dtype == torch.bool
        assert torch.equal(mask.expand_as(expected), expected)
    assert expected.any(-1).all(), "a query without a live key would have no probabilities"


def test_one_query_without_limits_needs_no_mask():
    assert memory_attention_mask(1, 5, None, None, CPU) is None
    assert memory_attention_mask(1, 5, None, 6, CPU) is None
    assert memory_attention_mask(1, 5, None, 5, CPU) is not None


@pytest.mark.parametrize("frozen", ["query", "key", "value", "position_weight", "content_bias", "position_bias"])
def test_gradients_of_the_others_when_one_is_frozen(frozen):
    """As in fine-tuning of some of the weights, where the forms with and without kept scores change places."""
    inputs = draw_inputs(4, 11)
    inputs[frozen] = inputs[frozen].detach()
    expected, _ = relative_attention_reference(**inputs)
    output, _ = run_optimised(inputs, CASES["memory"], "sdpa")
    tensors = {name: tensor for name, tensor in inputs.items() if name != frozen}
    wanted = torch.autograd.grad(expected.square().sum(), list(tensors.values()))
    given = torch.autograd.grad(output.square().sum(), list(tensors.values()))
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
