"""The memory from segment to segment: against each row alone, and against one long pass."""

import pytest
import torch
from models.transformer_xl.naive_transformer_xl import NaiveRows
from models.transformer_xl.small_models import (
    EXACT,
    MODES,
    SINGLE,
    VARIANTS,
    assert_rows_equal,
    log_probs,
    random_ids,
    small_model,
)

# Where every query of a long pass sees what it would see of the memory, cutting the pass changes nothing.
CUTTABLE = {
    name: changes | {"mem_len": changes.get("mem_len", 9) if changes.get("same_length") else 40}
    for name, changes in VARIANTS.items()
    if name != "no_memory" and (changes.get("same_length") or changes.get("memory_init") != "zeros")
}
CUTS = {"one_by_one": [1] * 20, "uneven": [3, 1, 9, 2, 5], "short_then_long": [2, 18]}

PATTERNS = {
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [1, 1, 0, 0, 1]],
    "empty_rows": [[0, 0, 0, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]],
    "nothing": [[0] * 5] * 3,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("variant", CUTTABLE)
def test_segments_equal_one_pass(variant, cut, mode):
    model = small_model(**CUTTABLE[variant])
    ids = random_ids(2, 20)
    cache = model.create_cache()
    with MODES[mode]():
        whole = log_probs(model(ids))
        parts = [log_probs(model(part, past_key_values=cache)) for part in ids.split(cut, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)


def test_segments_differ_from_one_pass_where_memory_is_short():
    """The property above is not trivial: without `same_length` a short memory forgets."""
    model = small_model(mem_len=3)
    ids = random_ids(2, 20)
    cache = model.create_cache()
    parts = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(5, dim=1)], dim=1)
    whole = model(ids).logits
    torch.testing.assert_close(parts[:, :5], whole[:, :5], **EXACT)
    assert ((parts - whole)[:, 9:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_change_from_hidden_states_to_keys_and_values_is_exact(variant):
    """Training's memory is taken over by evaluation; then gradients are asked for in evaluation, and again not."""
    model = small_model(**VARIANTS[variant])
    rows, cache = NaiveRows(model, 2), model.create_cache()
    modes = [torch.enable_grad, torch.enable_grad, torch.no_grad, torch.no_grad, torch.enable_grad, torch.no_grad]
    holes, empty, right = [[1, 1, 0, 1], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 0, 1, 1]], [[1, 0, 0, 0], [0, 1, 1, 1]]
    patterns = [None, holes, None, empty, None, right]
    model.train()
    for step, (mode, pattern) in enumerate(zip(modes, patterns, strict=True)):
        if step == 2:
            model.eval()
        mask = None if pattern is None else torch.tensor(pattern)
        ids = random_ids(2, 4, seed=step)
        with mode():
            output = model(ids, attention_mask=mask, past_key_values=cache)
        with torch.no_grad():
            assert_rows_equal(output, rows.feed(ids, mask), mask)
        assert cache.holds_keys == (step >= 2)


def test_keys_and_values_are_refused_in_training():
    model = small_model()
    ids = random_ids(2, 4)
    with torch.no_grad():
        cache = model(ids).past_key_values
    model.train()
    with pytest.raises(ValueError, match="past_key_values was filled in evaluation.*no gradient.*new cache"):
        model(ids, past_key_values=cache)
    cache.reset()
    model(ids, past_key_values=cache)
    assert not cache.holds_keys


def test_training_mode_without_gradients_keeps_hidden_states():
    """So that an evaluation of the training loss does not freeze the keys of old weights into the memory."""
    model = small_model().train()
    with torch.no_grad():
        cache = model(random_ids(2, 4)).past_key_values
    assert not cache.holds_keys
    model(random_ids(2, 4), past_key_values=cache)


def test_hidden_states_follow_the_weights():
    """Memory of hidden states is projected anew with the weights as they are now (spec 5.5)."""
    model = small_model().train()
    first, second = random_ids(1, 4, seed=1), random_ids(1, 4, seed=2)
    cache, rows = model.create_cache(), NaiveRows(model, 1)
    model(first, past_key_values=cache)
    rows.feed(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert_rows_equal(model(second, past_key_values=cache), rows.feed(second))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("variant", ["plain", "short_memory", "no_memory", "same_length", "zeros", "everything"])
def test_padded_rows_equal_rows_alone_through_several_segments(variant, pattern, mode):
    model = small_model(**VARIANTS[variant])
    rows, cache = NaiveRows(model, 3), model.create_cache()
    mask = torch.tensor(PATTERNS[pattern])
    others = [None, mask.roll(1, 0), torch.tensor(PATTERNS["holes"]), None]
    seen = torch.ones(3, 0, dtype=torch.long)
    with MODES[mode]():
        for step, segment_mask in enumerate([mask, *others]):
            ids = random_ids(3, 5, seed=step)
            real = torch.ones(3, 5, dtype=torch.long) if segment_mask is None else segment_mask
            seen = torch.cat([seen, real], dim=1)
            given = seen if step % 2 else segment_mask  # the mask of all tokens so far, or of this segment
            output = model(ids, attention_mask=given, past_key_values=cache)
            assert output.logits.isfinite().all()
            with torch.no_grad():
                assert_rows_equal(output, rows.feed(ids, segment_mask), segment_mask)
            expected = [len(memory[0]) for memory in rows.memories]
            assert cache.row_lengths.tolist() == expected
            assert cache.get_seq_length() == 5 * (step + 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32])
def test_every_dtype_of_mask_means_the_same(dtype):
    model = small_model()
    ids, mask = random_ids(3, 5), torch.tensor(PATTERNS["holes"])
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, expected)


@pytest.mark.parametrize("mode", MODES)
def test_what_stands_at_pads_has_no_effect(mode):
    model = small_model()
    mask = torch.tensor(PATTERNS["holes"])
    outputs = []
    for pad in (0, 16):
        cache, segments = model.create_cache(), []
        with MODES[mode]():
            for step in range(3):
                ids = random_ids(3, 5, seed=step).masked_fill(mask == 0, pad)
                segments.append(model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()])
        outputs.append(torch.stack(segments))
    assert torch.equal(*outputs)


def test_gradients_of_a_padded_batch_are_the_sum_of_rows_alone():
    model = small_model(pre_norm=True).train()
    rows, cache = NaiveRows(model, 3), model.create_cache()
    masks = [torch.tensor(PATTERNS["left"]), torch.tensor(PATTERNS["holes"])]
    for step, mask in enumerate(masks):
        ids = random_ids(3, 5, seed=step)
        output = model(ids, attention_mask=mask, past_key_values=cache)
        segments = rows.feed(ids, mask)
    weights = torch.randn(17, dtype=torch.float64)
    given = (log_probs(output) * weights)[mask.bool()].sum()
    wanted = sum((segment.log_probs * weights).sum() for segment in segments)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(given, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["left", "right", "holes", "empty_rows"])
def test_hidden_states_and_attentions_of_a_padded_batch(pattern, mode):
    """Each token's own, in the columns of the input; nothing looks at a pad."""
    model = small_model()
    rows, cache = NaiveRows(model, 3), model.create_cache()
    mask = torch.tensor(PATTERNS[pattern])
    for step in range(2):
        ids = random_ids(3, 5, seed=step)
        memory_length = cache.memory_length
        held = [len(memory[0]) for memory in rows.memories]
        with MODES[mode]():
            output = model(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                output_hidden_states=True,
                output_attentions=True,
            )
        for row, segment in enumerate(rows.feed(ids, mask)):
            tokens = mask[row].nonzero().squeeze(-1)
            if segment is None:
                continue
            hidden_states = torch.stack([states[row, tokens] for states in output.hidden_states])
            torch.testing.assert_close(hidden_states, segment.hidden_states, **EXACT)
            attentions = torch.stack([weights[row, :, tokens] for weights in output.attentions])
            columns = torch.cat([torch.arange(memory_length - held[row], memory_length), memory_length + tokens])
            torch.testing.assert_close(attentions[..., columns], segment.attentions, **EXACT)
            others = torch.ones(memory_length + 5, dtype=torch.bool)
            others[columns] = False
            assert (attentions[..., others] == 0).all()


def all_tensors(value, found=None, visited=None):
    """Every tensor that can be reached from an object."""
    found, visited = [] if found is None else found, set() if visited is None else visited
    if id(value) in visited:
        return found
    visited.add(id(value))
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            all_tensors(item, found, visited)
    elif isinstance(value, (list, tuple)):
        for item in value:
            all_tensors(item, found, visited)
    elif hasattr(value, "__dict__"):
        all_tensors(vars(value), found, visited)
    return found


@pytest.mark.parametrize("variant", ["plain", "zeros_pre_norm", "clamped"])
def test_memory_never_carries_gradient(variant):
    model = small_model(**VARIANTS[variant])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    for is_training, starts_frozen in [(True, False), (False, False), (False, True)]:
        model.train(is_training)
        cache = model.create_cache()
        if starts_frozen:
            with torch.no_grad():
                model(random_ids(2, 4), past_key_values=cache)
        for step in range(3):
            output = model(random_ids(2, 4), past_key_values=cache, attention_mask=mask if step == 1 else None)
            tensors = all_tensors(cache)
            assert tensors
            assert not any(tensor.requires_grad for tensor in tensors)
            output.logits.sum().backward()
        long = model(random_ids(2, 300), past_key_values=cache)  # beyond every table that was kept
        assert not any(tensor.requires_grad for tensor in all_tensors(cache))
        long.logits.sum().backward()


def test_gradient_stops_at_the_segment():
    model = small_model().train()
    cache = model.create_cache()
    first = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    second = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=first, past_key_values=cache)
    model(inputs_embeds=second, past_key_values=cache).logits.sum().backward()
    assert first.grad is None
    assert (second.grad != 0).any()


@pytest.mark.parametrize("is_first_frozen", [True, False])
def test_gradient_of_two_segments_in_evaluation(is_first_frozen):
    """Keys of the first segment may be needed for its backward pass after the second was fed."""
    model = small_model()
    model.requires_grad_(False)
    for layer in model.model.layers:  # as when only some projections are tuned
        layer.self_attn.q_proj.weight.requires_grad_(True)
        layer.self_attn.r_proj.weight.requires_grad_(True)
    cache, rows = model.create_cache(), NaiveRows(model, 2)
    if is_first_frozen:
        with torch.inference_mode():
            model(random_ids(2, 4), past_key_values=cache)
        rows.feed(random_ids(2, 4))
    given, wanted = 0.0, 0.0
    for step in range(2):
        ids = random_ids(2, 4, seed=step)
        given = given + log_probs(model(ids, past_key_values=cache)).square().sum()
        wanted = wanted + sum(segment.log_probs.square().sum() for segment in rows.feed(ids))
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for one, other in zip(torch.autograd.grad(given, tuned), torch.autograd.grad(wanted, tuned), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_no_view_of_what_the_caller_gets(mode):
    model = small_model()
    cache, rows = model.create_cache(), NaiveRows(model, 2)
    with MODES[mode]():
        for step in range(3):
            ids = random_ids(2, 4, seed=step)
            embeddings = model.get_input_embeddings()(ids).detach()
            output = model(inputs_embeds=embeddings, past_key_values=cache, output_hidden_states=True)
            assert_rows_equal(output, rows.feed(ids))
            embeddings.fill_(7)
            for states in output.hidden_states:
                states.detach().fill_(7)


@pytest.mark.parametrize("mem_len", [1, 3])
def test_window_moves_on_for_thousands_of_steps(mem_len):
    """A step sees itself and mem_len older tokens, which is what one pass sees with same_length and one slot more."""
    steps = 1500
    model = small_model(mem_len=mem_len, num_hidden_layers=1, clamp_len=2)
    ids = random_ids(2, steps)
    cache = model.create_cache()
    lengths = [1] * 700 + [40, 3, 1, 90, 1, 1, 33, 31] + [1] * 600
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids[:, :700].split(1, dim=1)]
        model.config.same_length, model.config.mem_len = True, mem_len + 1
        whole = model(ids[:, :700]).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)
    window = small_model(mem_len=mem_len + 1, num_hidden_layers=1, clamp_len=2, same_length=True)
    cache = window.create_cache()
    with torch.no_grad():
        whole = window(ids).logits
        parts = [window(part, past_key_values=cache).logits for part in ids.split(lengths, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)
    assert cache.get_seq_length() == steps
    assert cache.memory_length == mem_len + 1


def test_long_window_moves_over_itself():
    """Where more than half of the buffer is in use, what moves back to its front overlaps the place it came from."""
    model = small_model(mem_len=100, num_hidden_layers=1, same_length=True)
    ids = random_ids(1, 300)
    cache = model.create_cache()
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(1, dim=1)]
        whole = model(ids).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)


@pytest.mark.parametrize("length", [1, 50, 3000])
def test_memory_takes_no_more_room_than_its_length(length):
    """Buffers are a fixed slack longer than mem_len, however long a segment or a stream is."""
    model = small_model(mem_len=8, num_hidden_layers=1)
    cache = model.create_cache()
    with torch.no_grad():
        for _ in range(3 if length > 1 else 200):
            model(random_ids(1, length), past_key_values=cache)
    held = sum(tensor.numel() for tensor in all_tensors(cache.layers[0].window))
    assert held <= 2 * 8 * (8 + 40)
    with torch.enable_grad():
        cache = model(random_ids(1, length)).past_key_values
    hidden_states = cache.layers[0].hidden_states
    assert hidden_states.untyped_storage().size() <= 8 * 8 * 8


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_can_use_another_length_than_training(mode):
    model = small_model(mem_len=2)
    ids = random_ids(1, 12)
    model.config.mem_len, model.config.same_length, model.config.clamp_len = 5, True, 3
    other = small_model(mem_len=5, same_length=True, clamp_len=3)
    caches = model.create_cache(), other.create_cache()
    with MODES[mode]():
        for part in ids.split(4, dim=1):
            given = model(part, past_key_values=caches[0]).logits
            assert torch.equal(given, other(part, past_key_values=caches[1]).logits)


def test_clamp_len_may_change_while_a_memory_is_in_use():
    """The kept position table belongs to a clamp_len; another one must not reuse it."""
    model = small_model(mem_len=20)
    ids = random_ids(1, 15)
    cache, rows = model.create_cache(), NaiveRows(model, 1)
    with torch.no_grad():
        for part, clamp_len in zip(ids.split(3, dim=1), (-1, 2, 4, -1, 3), strict=True):
            model.config.clamp_len = clamp_len
            assert_rows_equal(model(part, past_key_values=cache), rows.feed(part))


def test_float32_stays_close_over_a_long_stream():
    """No drift: the hundredth segment is as close to float64 as the first."""
    exact = small_model(mem_len=16, same_length=True)
    single = small_model(mem_len=16, same_length=True, dtype=torch.float32)
    caches = exact.create_cache(), single.create_cache()
    with torch.no_grad():
        for step in range(100):
            ids = random_ids(1, 7, seed=step)
            expected = exact(ids, past_key_values=caches[0]).logits
            given = single(ids, past_key_values=caches[1]).logits
            torch.testing.assert_close(given.double(), expected, **SINGLE)
