"""What can be done to a memory: every operation on rows against each row recomputed alone, or refused."""

import copy

import pytest
import torch
from models.transformer_xl.naive_transformer_xl import NaiveRows
from models.transformer_xl.small_models import (
    MODES,
    VARIANTS,
    assert_rows_equal,
    random_ids,
    small_config,
    small_model,
)
from safetensors.torch import load_file, save_file

from hf_efficient import TransformerXLCache

HOLES = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
# How the memory was filled before the operation: the mask of each segment.
HISTORIES = {"one_segment": [None], "full": [None, None, None], "padded": [HOLES, None, HOLES.roll(1, 0)]}


class Stream:
    """A model with a cache and, beside them, the naive rows that say what must come out."""

    def __init__(self, num_rows=3, mode="keys_and_values", history=(), **changes):
        self.model = small_model(**changes)
        self.cache, self.rows = self.model.create_cache(), NaiveRows(self.model, num_rows)
        self.mode, self.num_segments = MODES[mode], 0
        for mask in history:
            self.feed(mask=mask)

    def feed(self, length=4, mask=None):
        """Feed one more segment to both and compare."""
        self.num_segments += 1
        ids = random_ids(len(self.rows.memories), length, seed=self.num_segments)
        with self.mode():
            output = self.model(ids, attention_mask=mask, past_key_values=self.cache)
        with torch.no_grad():
            assert_rows_equal(output, self.rows.feed(ids, mask), mask)
        assert self.cache.row_lengths.tolist() == [len(memory[0]) for memory in self.rows.memories]


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture(params=HISTORIES.values(), ids=HISTORIES)
def history(request):
    return request.param


@pytest.fixture(params=["same_length", "zeros_pre_norm"])
def variant(request):
    return VARIANTS[request.param]


def test_new_cache_is_empty_and_takes_any_batch():
    model = small_model()
    cache = model.create_cache()
    assert isinstance(cache, TransformerXLCache)
    assert (cache.batch_size, cache.memory_length, cache.get_seq_length()) == (-1, 0, 0)
    assert cache.row_lengths is None
    assert not cache.holds_keys
    cache.reset_rows(torch.tensor([True, False]))  # nothing to forget, whatever the batch will be
    model(random_ids(5, 3), past_key_values=cache)
    assert (cache.batch_size, cache.memory_length, cache.get_seq_length()) == (5, 3, 3)


def test_lengths_follow_the_segments(mode):
    stream = Stream(mode=mode, mem_len=6)
    for length, held in [(4, 4), (1, 5), (4, 6), (9, 6)]:
        assert stream.cache.get_mask_sizes(length, 0) == (
            stream.cache.memory_length + length,
            stream.cache.get_seq_length() - stream.cache.memory_length,
        )
        stream.feed(length)
        assert stream.cache.memory_length == held
    assert stream.cache.get_seq_length() == 18
    assert stream.cache.row_lengths.dtype == torch.int64
    assert stream.cache.row_lengths.tolist() == [6, 6, 6]
    assert stream.cache.get_max_length() == -1


@pytest.mark.parametrize("reset", [(True, False, True), (True,) * 3, (False,) * 3])
def test_reset_rows_begin_anew_and_others_go_on(reset, history, variant, mode):
    stream = Stream(mode=mode, history=history, **variant)
    stream.cache.reset_rows(torch.tensor(reset))
    stream.rows.reset([row for row in range(3) if reset[row]])
    stream.feed()
    stream.cache.reset_rows(torch.tensor([False, True, False]))
    stream.rows.reset([1])
    stream.feed(1)
    stream.feed(mask=HOLES)
    stream.feed(5)


def test_reset_rows_before_the_memory_changes_its_kind(variant):
    stream = Stream(mode="hidden_states", history=[None, HOLES], **variant)
    stream.cache.reset_rows(torch.tensor([True, False, False]))
    stream.rows.reset([0])
    stream.mode = torch.no_grad
    stream.feed()
    stream.cache.reset_rows(torch.tensor([False, False, True]))
    stream.rows.reset([2])
    stream.feed()


@pytest.mark.parametrize("memory_init", ["empty", "zeros"])
def test_reset_rows_without_memory_slots(memory_init, mode):
    stream = Stream(mode=mode, history=[None], mem_len=0, memory_init=memory_init)
    stream.cache.reset_rows(torch.tensor([True, False, False]))
    stream.feed()


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([True, False]),
        torch.tensor([[True, False, True]]),
        torch.tensor([1, 0, 1]),
        torch.tensor(True),
    ],
)
def test_reset_rows_refuses_other_masks(rows, mode):
    stream = Stream(mode=mode, history=[None])
    with pytest.raises(ValueError, match=r"rows must be a bool tensor of shape \(3,\)"):
        stream.cache.reset_rows(rows)
    stream.feed()


def test_reset_forgets_everything_and_takes_another_batch(history, variant, mode):
    stream = Stream(mode=mode, history=history, **variant)
    stream.cache.reset()
    assert (stream.cache.batch_size, stream.cache.memory_length, stream.cache.get_seq_length()) == (-1, 0, 0)
    stream.rows = NaiveRows(stream.model, 2)
    stream.feed()
    stream.feed(mask=HOLES[:2])


@pytest.mark.parametrize(("method", "order"), [("reorder_cache", [1, 1, 0]), ("batch_select_indices", [2, 0, 1])])
def test_rows_can_be_reordered(method, order, history, variant, mode):
    stream = Stream(mode=mode, history=history, **variant)
    getattr(stream.cache, method)(torch.tensor(order))
    stream.rows.select(order)
    stream.feed()
    stream.feed(mask=HOLES)


def test_rows_can_be_selected_and_repeated(history, variant, mode):
    stream = Stream(mode=mode, history=history, **variant)
    stream.cache.batch_select_indices(torch.tensor([2, 1]))
    stream.rows.select([2, 1])
    assert stream.cache.batch_size == 2
    stream.feed()
    stream.cache.batch_repeat_interleave(3)
    stream.rows.select([0, 0, 0, 1, 1, 1])
    assert stream.cache.batch_size == 6
    stream.feed()
    stream.cache.reset_rows(torch.tensor([False, True, False, False, True, False]))
    stream.rows.reset([1, 4])
    stream.feed()


@pytest.mark.parametrize("removed", [0, 1, 4, 7, 8])
def test_crop_takes_tokens_back_exactly(removed, mode):
    """While nothing has left the memory; afterwards it is as if the tokens had never been fed."""
    stream = Stream(mode=mode, mem_len=20)
    stream.feed()
    ids = random_ids(3, 8, seed=7)
    with stream.mode():
        stream.model(ids, past_key_values=stream.cache)
    stream.cache.crop(-removed)
    stream.rows.feed(ids[:, : 8 - removed]) if removed < 8 else None
    assert stream.cache.get_seq_length() == 12 - removed
    stream.feed(3)
    stream.feed(mask=HOLES)


@pytest.mark.parametrize("same_length", [True, False])
def test_crop_takes_tokens_back_from_a_full_memory_while_the_past_is_recorded(same_length):
    """As assisted decoding does: round after round, in a memory far shorter than what was fed."""
    stream = Stream(mem_len=5, same_length=same_length, history=[None, None, None])
    stream.cache.activate_past_recording()
    for kept in [3, 0, 6, 1, 2, 6, 5, 0]:
        ids = random_ids(3, 6, seed=100 + kept)
        with torch.no_grad():
            stream.model(ids, past_key_values=stream.cache)
        stream.cache.crop(kept - 6)
        if kept:
            # Tokens checked together see each other's whole memory; the memory they leave is the same for both.
            stream.rows.feed(ids[:, :kept])
        assert stream.cache.row_lengths.tolist() == [5] * 3
    stream.feed(1)


def test_recording_does_not_grow_for_ever():
    stream = Stream(num_rows=1, mem_len=5, num_hidden_layers=1)
    stream.cache.activate_past_recording()
    with torch.no_grad():
        for step in range(300):
            stream.model(random_ids(1, 4, seed=step), past_key_values=stream.cache)
            stream.cache.crop(-(step % 3))
    assert stream.cache.layers[0].window.capacity <= 200


@pytest.mark.parametrize(
    ("history", "changes"),
    [
        ([None, None, None], {}),
        ([None, HOLES], {"mem_len": 20}),
        ([None], {"memory_init": "zeros"}),
        ([None], {"mem_len": 3}),
    ],
    ids=["evicted", "padded", "zeros", "short"],
)
def test_crop_refuses_what_it_cannot_do_exactly_and_changes_nothing(history, changes, mode):
    stream = Stream(mode=mode, history=history, **changes)
    before = stream.cache.get_seq_length()
    with pytest.raises(ValueError, match=r"crop\(-1\) is not possible.*mem_len=.*activate_past_recording"):
        stream.cache.crop(-1)
    assert stream.cache.get_seq_length() == before
    stream.cache.crop(0)
    stream.feed()


def test_crop_refuses_more_than_was_fed_and_positive_numbers(mode):
    stream = Stream(mode=mode, history=[None], mem_len=20)
    with pytest.raises(ValueError, match=r"crop\(-5\)"):
        stream.cache.crop(-5)
    with pytest.raises(ValueError, match=r"crop\(2\) must be 0 or negative"):
        stream.cache.crop(2)
    stream.feed()


@pytest.mark.parametrize("operation", ["reset_rows", "reorder", "load", "mode"])
def test_crop_after_other_operations_is_exact_or_refused(operation, mode):
    stream = Stream(mode=mode, history=[None], mem_len=30)
    ids = random_ids(3, 4, seed=50)
    with stream.mode():
        stream.model(ids, past_key_values=stream.cache)
    if operation == "reset_rows":
        stream.cache.reset_rows(torch.tensor([True, False, False]))
        with pytest.raises(ValueError, match=r"crop\(-2\)"):
            stream.cache.crop(-2)
        return
    if operation == "reorder":
        stream.cache.reorder_cache(torch.tensor([1, 0, 2]))
        stream.rows.select([1, 0, 2])
        ids = ids[[1, 0, 2]]
    elif operation == "load":
        other = stream.model.create_cache()
        other.load_state_dict(stream.cache.state_dict())
        stream.cache = other
    else:
        stream.mode = torch.no_grad
    try:
        stream.cache.crop(-2)
    except ValueError:
        stream.rows.feed(ids)
    else:
        stream.rows.feed(ids[:, :2])
    stream.feed()


def test_state_dict_round_trip_through_a_file_continues_bit_for_bit(history, variant, mode, tmp_path):
    stream = Stream(mode=mode, history=history, **variant)
    state = stream.cache.state_dict()
    assert all(isinstance(tensor, torch.Tensor) and tensor.is_contiguous() for tensor in state.values())
    save_file(state, tmp_path / "memory.safetensors")
    other = stream.model.create_cache()
    with stream.mode():
        stream.model(random_ids(2, 6), past_key_values=other)  # loading replaces what is there, the batch size too
        other.load_state_dict(load_file(tmp_path / "memory.safetensors"))
        assert other.row_lengths.tolist() == stream.cache.row_lengths.tolist()
        assert other.get_seq_length() == stream.cache.get_seq_length()
        assert other.holds_keys == stream.cache.holds_keys
        reset = torch.tensor([False, True, False])
        for mask in [None, HOLES, None]:
            ids = random_ids(3, 4, seed=90)
            expected = stream.model(ids, attention_mask=mask, past_key_values=stream.cache).logits
            assert torch.equal(stream.model(ids, attention_mask=mask, past_key_values=other).logits, expected)
            stream.cache.reset_rows(reset)
            other.reset_rows(reset)


def test_state_of_an_unused_cache_loads():
    model = small_model()
    cache = model.create_cache()
    model(random_ids(2, 3), past_key_values=cache)
    cache.load_state_dict(model.create_cache().state_dict())
    assert cache.batch_size == -1
    model(random_ids(4, 3), past_key_values=cache)


@pytest.mark.parametrize("num_attention_heads", [1, 2])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_state_dict_is_a_snapshot(num_rows, num_attention_heads, mode):
    stream = Stream(num_rows, mode=mode, history=[None, None], num_attention_heads=num_attention_heads, head_dim=4)
    state = stream.cache.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    loaded = stream.model.create_cache()
    loaded.load_state_dict(state)
    with stream.mode():
        for cache in (stream.cache, loaded):
            for step in range(60):
                stream.model(random_ids(num_rows, 1, seed=step), past_key_values=cache)
            cache.reset_rows(torch.ones(num_rows, dtype=torch.bool))
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name


def test_state_of_a_longer_memory_is_cut(mode):
    long = Stream(mode=mode, history=[None, None, None], mem_len=12)
    short = Stream(mode=mode, mem_len=5)
    short.cache.load_state_dict(long.cache.state_dict())
    assert short.cache.memory_length == 5
    short.rows.memories = [[layer[-5:] for layer in memory] for memory in long.rows.memories]
    short.feed()


@pytest.mark.parametrize("broken", ["empty", "layers", "missing"])
def test_state_that_does_not_fit_is_refused(broken, mode):
    stream = Stream(mode=mode, history=[None])
    state = stream.cache.state_dict()
    if broken == "empty":
        state = {}
    elif broken == "layers":
        state = Stream(mode=mode, history=[None], num_hidden_layers=3).cache.state_dict()
    else:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("layers.1.")}
    with pytest.raises(ValueError, match="memory"):
        stream.model.create_cache().load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"num_hidden_layers=2.*num_hidden_layers=3.*create_cache"),
        ({"num_attention_heads": 4, "head_dim": 4}, r"num_attention_heads=2.*num_attention_heads=4"),
        ({"head_dim": 6}, r"head_dim=4.*head_dim=6"),
    ],
)
def test_keys_and_values_of_another_model_are_refused(changes, message):
    stream = Stream(history=[None])
    with pytest.raises(ValueError, match=message), torch.no_grad():
        small_model(**changes)(random_ids(3, 4), past_key_values=stream.cache)
    stream.feed()


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"hidden_size": 12, "head_dim": 4}])
def test_hidden_states_of_another_model_are_refused(changes):
    stream = Stream(mode="hidden_states", history=[None])
    with pytest.raises(ValueError, match="past_key_values is the memory of a model with"):
        small_model(**changes)(random_ids(3, 4), past_key_values=stream.cache)
    stream.feed()


@pytest.mark.parametrize("num_rows", [1, 2, 6])
def test_memory_of_another_batch_is_refused(num_rows, mode):
    stream = Stream(mode=mode, history=[None])
    with pytest.raises(ValueError, match=rf"memory of 3 rows.*{num_rows}.*batch_select_indices"), stream.mode():
        stream.model(random_ids(num_rows, 4), past_key_values=stream.cache)
    stream.feed()


def test_copy_goes_its_own_way(history, mode):
    stream = Stream(mode=mode, history=history)
    other = Stream(mode=mode)
    other.cache, other.rows = copy.deepcopy(stream.cache), copy.deepcopy(stream.rows)
    stream.cache.reset_rows(torch.tensor([True, True, True]))
    stream.rows.reset([0, 1, 2])
    for _ in range(3):
        stream.feed()
        other.feed()


def test_two_caches_of_one_model_do_not_mix(mode):
    first, second = Stream(mode=mode), Stream(mode=mode)
    second.model = first.model
    for _ in range(3):
        first.feed()
        second.num_segments += 10
        second.feed(5)


def test_offload_and_prefetch_keep_the_memory(mode):
    stream = Stream(mode=mode, history=[None, HOLES], memory_init="zeros")
    for layer in range(2):
        stream.cache.offload(layer)
        stream.cache.prefetch(layer) if stream.cache.offloading else stream.cache.layers[layer].prefetch()
    stream.feed()
    assert stream.cache.to("cpu") is stream.cache
    stream.feed()


def test_moving_a_memory_moves_all_of_it(mode):
    """To the meta device here, which every machine has; nothing may stay behind."""
    stream = Stream(mode=mode, history=[None, HOLES], memory_init="zeros")
    stream.cache.to("meta")
    state = stream.cache.state_dict()
    del state["seq_length"]
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    tables = [layer.position_key for layer in stream.cache.layers if layer.position_key is not None]
    assert all(table.device.type == "meta" for table in tables)
    assert bool(tables) == (mode == "keys_and_values")


def test_offloading_cache_decodes_the_same():
    """On a machine without accelerator there is nothing to offload from, and the option is harmless."""
    model = small_model()
    cache = TransformerXLCache(model.config, offloading=True)
    rows = NaiveRows(model, 2)
    with torch.no_grad():
        for step in range(3):
            ids = random_ids(2, 3, seed=step)
            assert_rows_equal(model(ids, past_key_values=cache), rows.feed(ids))


def test_cache_reads_the_config_when_it_is_made():
    config = small_config(mem_len=4)
    cache = TransformerXLCache(config)
    config.mem_len = 7
    assert cache.mem_len == 4
    assert TransformerXLCache(config).mem_len == 7
