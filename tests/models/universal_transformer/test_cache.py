"""The cache as a container: slots, growing, taking back, rows moved about, what is refused."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_efficient.models.universal_transformer.cache_universal_transformer import (
    RECORDED_TOKENS,
    UniversalTransformerCache,
    UniversalTransformerCacheLayer,
    begin_call,
    new_cache,
)
from hf_efficient.models.universal_transformer.configuration_universal_transformer import UniversalTransformerConfig

HEADS, HEAD_SIZE, STEPS, SLOTS, WIDTH, HIDDEN = 2, 3, 3, 5, 6, 8


def config(**changes):
    settings = {"max_steps": STEPS, "num_prelude_layers": 1, "num_coda_layers": 1, "is_decoder": True}
    return UniversalTransformerConfig(**(settings | changes))


class Ledger:
    """What a cache should hold, kept the plain way: everything ever fed, joined."""

    def __init__(self, cache, batch_size=2, num_slots=SLOTS, convolutions=False, num_steps=STEPS):
        self.cache, self.batch_size, self.num_steps = cache, batch_size, num_steps
        self.convolutions = convolutions
        self.keys = [torch.zeros(batch_size, HEADS, 0, HEAD_SIZE) for _ in range(num_slots)]
        self.inputs = [torch.zeros(batch_size, 2, WIDTH) for _ in range(num_slots)]
        self.hidden = [torch.zeros(batch_size, 4, HIDDEN) for _ in range(num_slots)]
        self.ponder_times = torch.zeros(batch_size, 0)

    def feed(self, length):
        """One call: new tokens at every slot; values are minus the keys. Checks what each slot returns."""
        self.cache.begin(self.num_steps)
        for slot in range(len(self.keys)):
            new = torch.randn(self.batch_size, HEADS, length, HEAD_SIZE)
            self.keys[slot] = torch.cat([self.keys[slot], new], dim=2)
            keys, values = self.cache.update(new, -new, slot)
            assert torch.equal(keys, self.keys[slot])
            assert torch.equal(values, -keys)
            if self.convolutions:
                self._feed_convolutions(slot, length)
        ponder_times = torch.randint(1, 9, (self.batch_size, length)).float()
        self.cache.record_ponder_times(ponder_times)
        self.ponder_times = torch.cat([self.ponder_times, ponder_times], dim=1)

    def _feed_convolutions(self, slot, length):
        state = self.cache.convolution_state(slot)
        if state is not None:
            assert torch.equal(state[0], self.inputs[slot][:, -2:])
            assert torch.equal(state[1], self.hidden[slot][:, -4:])
        new_inputs, new_hidden = (torch.randn(self.batch_size, length, width) for width in (WIDTH, HIDDEN))
        self.inputs[slot] = torch.cat([self.inputs[slot], new_inputs], dim=1)
        self.hidden[slot] = torch.cat([self.hidden[slot], new_hidden], dim=1)
        ran_over = (self.inputs[slot][:, -2 - length :], self.hidden[slot][:, -4 - length :])
        self.cache.update_convolution_state(slot, ran_over)

    def map(self, function):
        """Do to the ledger's rows what was done to the cache's."""
        for states in (self.keys, self.inputs, self.hidden):
            states[:] = [function(part) for part in states]
        self.ponder_times = function(self.ponder_times)
        self.batch_size = self.ponder_times.shape[0]

    def crop(self, count):
        self.cache.crop(-count)
        self.keys = [keys[:, :, : keys.shape[2] - count] for keys in self.keys]
        for states in (self.inputs, self.hidden):
            states[:] = [part[:, : part.shape[1] - count] for part in states]
        self.ponder_times = self.ponder_times[:, : self.ponder_times.shape[1] - count]

    def check(self):
        """The cache's own attributes, for those who read them without a call."""
        assert self.cache.get_seq_length() == self.keys[0].shape[2]
        assert torch.equal(self.cache.ponder_times, self.ponder_times)
        for layer, keys in zip(self.cache.layers, self.keys, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, -keys)


@pytest.mark.parametrize("grad", [False, True])
def test_every_slot_holds_every_token(grad):
    cache = UniversalTransformerCache(config())
    ledger = Ledger(cache, convolutions=True)
    assert (len(cache), cache.get_seq_length(), cache.batch_size, cache.ponder_times) == (0, 0, -1, None)
    with torch.set_grad_enabled(grad):
        for length in (7, 1, 1, 3, 60, 1):
            ledger.feed(length)
    ledger.check()
    assert (len(cache), cache.get_seq_length(), cache.batch_size) == (SLOTS, 73, 2)
    assert cache.get_mask_sizes(4, 0) == (77, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable


@torch.no_grad()
def test_growing_one_by_one_seldom_moves_tokens():
    layer = UniversalTransformerCacheLayer()
    tokens = torch.randn(1, 1, 1000, 2)
    buffers = set()
    for position in range(1000):
        layer.update(*[tokens[:, :, position : position + 1]] * 2)
        buffers.add(layer.window.buffers[0].data_ptr())
    assert torch.equal(layer.keys, tokens)
    assert len(buffers) <= 8
    assert layer.window.capacity <= 2 * 1000


def test_gradients_reach_the_new_tokens_only():
    layer = UniversalTransformerCacheLayer()
    first, second = (torch.randn(2, HEADS, 3, HEAD_SIZE, requires_grad=True) for _ in range(2))
    keys, values = layer.update(first, first)
    (keys.sum() + values.sum()).backward()
    assert (first.grad == 2).all()
    first.grad = None
    keys, values = layer.update(second, second)
    (keys.sum() + values.sum()).backward()
    assert (second.grad == 2).all()
    assert first.grad is None


def test_what_was_made_in_inference_mode_can_be_continued_outside():
    cache = UniversalTransformerCache(config())
    ledger = Ledger(cache, convolutions=True)
    with torch.inference_mode():
        ledger.feed(5)
    with torch.no_grad():
        ledger.feed(2)
        ledger.feed(1)
    ledger.check()


@pytest.mark.parametrize("indices", [[1, 0, 2], [2, 2, 0, 1], [1], [True, False, True]])
@torch.no_grad()
def test_rows_are_chosen_in_every_slot(indices):
    cache = UniversalTransformerCache(config())
    ledger = Ledger(cache, batch_size=3, convolutions=True)
    ledger.feed(6)
    indices = torch.tensor(indices)
    cache.batch_select_indices(indices)
    ledger.map(lambda states: states[indices])
    ledger.check()
    ledger.feed(1)
    ledger.check()


@torch.no_grad()
def test_beams_are_reordered_and_rows_repeated_in_every_slot():
    cache = UniversalTransformerCache(config())
    ledger = Ledger(cache, convolutions=True)
    ledger.feed(6)
    cache.batch_repeat_interleave(2)
    ledger.map(lambda states: states.repeat_interleave(2, dim=0))
    ledger.feed(1)
    beams = torch.tensor([1, 1, 3, 2])
    cache.reorder_cache(beams)
    ledger.map(lambda states: states[beams])
    ledger.check()
    ledger.feed(2)
    ledger.check()


@torch.no_grad()
def test_crop_takes_back_in_every_slot():
    cache = UniversalTransformerCache(config())
    ledger = Ledger(cache)
    for fed, taken in ((6, 2), (3, 3), (1, 0), (4, 9)):
        ledger.feed(fed)
        ledger.crop(taken)
        if ledger.keys[0].shape[2]:
            ledger.check()
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_convolutions_are_taken_back_when_recorded():
    cache = UniversalTransformerCache(config())
    cache.activate_past_recording()
    ledger = Ledger(cache, convolutions=True)
    # A first call longer than the recording, rounds of several calls, and back into an earlier call's tokens.
    for fed, taken in ((RECORDED_TOKENS + 20, 3), (1, 0), (2, 0), (5, 6), (1, 30), (3, 1)):
        ledger.feed(fed)
        assert cache.is_croppable
        ledger.crop(taken)
        ledger.check()
    ledger.feed(1)
    for _ in range(RECORDED_TOKENS):
        ledger.feed(1)
    # A recording does not grow with the text.
    held = [rows.shape[1] for rows in cache.layers[0].convolution_rows]
    assert held == [2 + RECORDED_TOKENS, 4 + RECORDED_TOKENS]
    ledger.crop(RECORDED_TOKENS)
    ledger.feed(4)
    ledger.check()


@torch.no_grad()
def test_convolutions_cannot_be_taken_back_without_a_recording():
    cache = UniversalTransformerCache(config())
    ledger = Ledger(cache, convolutions=True)
    ledger.feed(9)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match=r"crop\(-1\) is not possible.*activate_past_recording"):
        cache.crop(-1)
    ledger.check()
    # What is kept of a long prompt is what is needed, not a view of all of it.
    for rows in cache.layers[0].convolution_rows:
        assert rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()


@torch.no_grad()
def test_crop_refuses_what_is_not_there():
    cache = UniversalTransformerCache(config())
    cache.crop(0)
    Ledger(cache).feed(3)
    with pytest.raises(ValueError, match=r"crop\(2\) must be 0 or negative"):
        cache.crop(2)
    with pytest.raises(ValueError, match=r"crop\(-4\) of a cache that holds 3 tokens"):
        cache.crop(-4)


@torch.no_grad()
def test_another_number_of_steps_is_refused_unless_the_cache_is_empty():
    cache = UniversalTransformerCache(config())
    Ledger(cache).feed(3)
    for num_steps in (STEPS - 1, STEPS + 1):
        with pytest.raises(ValueError, match=f"num_steps={num_steps} cannot continue .* num_steps={STEPS}"):
            cache.begin(num_steps)
    cache.crop(-3)
    ledger = Ledger(cache, num_slots=SLOTS - 1, num_steps=STEPS - 1)
    ledger.feed(2)
    ledger.check()
    cache.reset()
    assert (len(cache), cache.num_steps, cache.ponder_times) == (0, None, None)
    ledger = Ledger(cache, batch_size=4, num_slots=SLOTS + 7, num_steps=STEPS + 7)
    ledger.feed(2)
    ledger.check()


@pytest.mark.parametrize("batch_size", [1, 3, 6])
@torch.no_grad()
def test_other_rows_are_refused(batch_size):
    """One row as well, which would fit any number of them by broadcasting."""
    cache = UniversalTransformerCache(config())
    Ledger(cache, batch_size=2).feed(3)
    with pytest.raises(ValueError, match=r"holds 2 rows of 2 heads of size 3.*batch_repeat_interleave"):
        Ledger(cache, batch_size=batch_size).feed(1)


@pytest.mark.parametrize("grad", [False, True])
def test_shared_slot_keeps_what_the_last_step_wrote(grad):
    cache = UniversalTransformerCache(config(share_cache="last_step"))
    past = torch.zeros(2, HEADS, 0, HEAD_SIZE)
    inputs, hidden = torch.zeros(2, 2, WIDTH), torch.zeros(2, 4, HIDDEN)
    with torch.set_grad_enabled(grad):
        for length in (4, 1, 2):
            cache.begin(STEPS)
            for _ in range(STEPS):
                state = cache.convolution_state(0)
                assert state is None or torch.equal(state[0], inputs[:, -2:])
                assert state is None or torch.equal(state[1], hidden[:, -4:])
                new = torch.randn(2, HEADS, length, HEAD_SIZE)
                keys, values = cache.update(new, -new, 0)
                assert torch.equal(keys, torch.cat([past, new], dim=2))
                assert torch.equal(values, -keys)
                new_rows = (torch.randn(2, length, WIDTH), torch.randn(2, length, HIDDEN))
                ran_over = tuple(
                    torch.cat([rows[:, -width:], added], dim=1)
                    for rows, added, width in zip((inputs, hidden), new_rows, (2, 4), strict=True)
                )
                cache.update_convolution_state(0, ran_over)
            past = torch.cat([past, new], dim=2)
            inputs, hidden = (torch.cat(pair, dim=1) for pair in zip((inputs, hidden), new_rows, strict=True))
    assert torch.equal(cache.layers[0].keys, past)


@torch.no_grad()
def test_shared_slot_can_be_taken_back():
    cache = UniversalTransformerCache(config(share_cache="last_step"))
    first, second, third = (torch.randn(1, HEADS, 3, HEAD_SIZE) for _ in range(3))
    for new in (first, second, third):
        cache.begin(2)
        cache.update(torch.randn_like(new), torch.randn_like(new), 0)
        cache.update(new, new, 0)
        if new is second:
            cache.crop(-2)
    assert torch.equal(cache.layers[0].keys, torch.cat([first, second[:, :, :1], third], dim=2))


@torch.no_grad()
def test_cache_moves_between_devices():
    cache = UniversalTransformerCache(config())
    ledger = Ledger(cache, convolutions=True)
    ledger.feed(3)
    assert cache.to("cpu") is cache
    ledger.check()
    cache.to("meta")
    assert cache.layers[0].keys.device.type == cache.ponder_times.device.type == "meta"
    assert cache.layers[SLOTS - 1].convolution_rows[1].device.type == "meta"


def test_new_cache_fits_the_model():
    assert type(new_cache(config())) is UniversalTransformerCache
    cache = new_cache(config(is_decoder=False, is_encoder_decoder=True))
    assert type(cache) is EncoderDecoderCache
    ledger = Ledger(cache.self_attention_cache)
    ledger.feed(4)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 3
    assert cache.self_attention_cache.batch_size == 4


def feed_plain(cache, num_slots, length=2):
    for slot in range(num_slots):
        cache.update(*torch.randn(2, 1, HEADS, length, HEAD_SIZE).unbind(), slot)


def test_plain_caches_are_accepted_where_they_can_hold_everything():
    begin_call(DynamicCache(), config(), 40)
    dynamic, static = DynamicCache(config=config()), StaticCache(config(), max_cache_len=8)
    for cache in (dynamic, static):
        for _ in range(2):
            begin_call(cache, config(), STEPS)
            feed_plain(cache, SLOTS)
    fewer = StaticCache(config(), max_cache_len=8)
    for _ in range(2):
        begin_call(fewer, config(), STEPS - 1)
        feed_plain(fewer, SLOTS - 1)
    own = UniversalTransformerCache(config())
    begin_call(own, config(), 7)
    assert own.num_steps == 7


@pytest.mark.parametrize("num_steps", [STEPS - 1, STEPS + 1])
def test_plain_cache_begun_with_other_steps_is_refused(num_steps):
    cache = DynamicCache()
    feed_plain(cache, SLOTS)
    with pytest.raises(ValueError, match=f"begun with another num_steps: {SLOTS} .* needs {num_steps + 2}"):
        begin_call(cache, config(), num_steps)


def test_plain_cache_with_too_few_slots_is_refused():
    for cache in (DynamicCache(config=config()), StaticCache(config(), max_cache_len=8)):
        with pytest.raises(ValueError, match=rf"num_steps=4 needs a cache of 6 slots.*{type(cache).__name__} has 5"):
            begin_call(cache, config(), 4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"transition": "separable_convolution"}, "transition='separable_convolution'"),
        ({"share_cache": "last_step"}, "share_cache='last_step'"),
    ],
)
def test_plain_cache_is_refused_for_what_it_cannot_hold(changes, match):
    for cache in (DynamicCache(), StaticCache(config(), max_cache_len=8)):
        with pytest.raises(ValueError, match=f"{type(cache).__name__} cannot be used with {match}"):
            begin_call(cache, config(**changes), STEPS)
