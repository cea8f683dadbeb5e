"""The cache as a container: slots, growing, taking back, rows moved about, what is refused."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_efficient.models.evolved_transformer.cache_evolved_transformer import (
    RECORDED_TOKENS,
    EvolvedTransformerCache,
    EvolvedTransformerCacheLayer,
    check_cache,
    new_cache,
)
from hf_efficient.models.evolved_transformer.configuration_evolved_transformer import EvolvedTransformerConfig

BLOCKS, HIDDEN, WIDE_HEADS, HEADS = 3, 8, 4, 2


def config(**changes):
    settings = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_wide_attention_heads": WIDE_HEADS,
        "num_decoder_layers": BLOCKS,
        "is_decoder": True,
    }
    return EvolvedTransformerConfig(**(settings | changes))


class Ledger:
    """What a cache should hold, kept the plain way: everything ever fed, joined."""

    def __init__(self, cache, batch_size=2):
        self.cache, self.batch_size = cache, batch_size
        self.keys = []
        for heads in [WIDE_HEADS, HEADS] * BLOCKS:
            self.keys.append(torch.zeros(batch_size, heads, 0, HIDDEN // heads))
        # The convolutions' rows, behind those of zeros that stand before every text.
        self.inputs = [torch.zeros(batch_size, 10, HIDDEN) for _ in range(BLOCKS)]
        self.between = [torch.zeros(batch_size, 6, 2 * HIDDEN) for _ in range(BLOCKS)]

    def feed(self, length):
        """One call: new tokens at every slot; values are minus the keys. Checks what each slot returns."""
        for block in range(BLOCKS):
            self._feed_slot(2 * block, length)
            self._feed_convolutions(block, length)
            self._feed_slot(2 * block + 1, length)

    def _feed_slot(self, slot, length):
        held = self.keys[slot]
        new = torch.randn(self.batch_size, held.shape[1], length, held.shape[3])
        self.keys[slot] = torch.cat([held, new], dim=2)
        keys, values = self.cache.update(new, -new, slot)
        assert torch.equal(keys, self.keys[slot])
        assert torch.equal(values, -keys)

    def _feed_convolutions(self, block, length):
        self.check_state(block)
        for states, width in ((self.inputs, HIDDEN), (self.between, 2 * HIDDEN)):
            states[block] = torch.cat([states[block], torch.randn(self.batch_size, length, width)], dim=1)
        ran_over = (self.inputs[block][:, -10 - length :], self.between[block][:, -6 - length :])
        self.cache.update_convolution_state(block, ran_over)

    def map(self, function):
        """Do to the ledger's rows what was done to the cache's."""
        for states in (self.keys, self.inputs, self.between):
            states[:] = [function(part) for part in states]
        self.batch_size = self.keys[0].shape[0]

    def crop(self, count):
        self.cache.crop(-count)
        self.keys = [keys[:, :, : keys.shape[2] - count] for keys in self.keys]
        for states in (self.inputs, self.between):
            states[:] = [part[:, : part.shape[1] - count] for part in states]

    def check(self):
        """The cache's own attributes, for those who read them without a call."""
        assert self.cache.get_seq_length() == self.keys[0].shape[2]
        assert self.cache.batch_size == self.batch_size
        for layer, keys in zip(self.cache.layers, self.keys, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, -keys)
        for block in range(BLOCKS):
            self.check_state(block)

    def check_state(self, block):
        state = self.cache.convolution_state(block)
        if state is not None:
            assert torch.equal(state[0], self.inputs[block][:, -10:])
            assert torch.equal(state[1], self.between[block][:, -6:])


@pytest.mark.parametrize("grad", [False, True])
def test_every_slot_holds_every_token(grad):
    cache = EvolvedTransformerCache(config())
    ledger = Ledger(cache)
    assert (len(cache), cache.get_seq_length(), cache.batch_size) == (2 * BLOCKS, 0, -1)
    assert all(cache.convolution_state(block) is None for block in range(BLOCKS))
    with torch.set_grad_enabled(grad):
        for length in (7, 1, 1, 3, 60, 1):
            ledger.feed(length)
    ledger.check()
    assert (cache.get_seq_length(), cache.batch_size) == (73, 2)
    assert cache.get_mask_sizes(4, 0) == (77, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable


@torch.no_grad()
def test_growing_one_by_one_seldom_moves_tokens():
    layer = EvolvedTransformerCacheLayer()
    tokens = torch.randn(1, 1, 1000, 2)
    buffers = set()
    for position in range(1000):
        layer.update(*[tokens[:, :, position : position + 1]] * 2)
        buffers.add(layer.window.buffers[0].data_ptr())
    assert torch.equal(layer.keys, tokens)
    assert len(buffers) <= 8
    assert layer.window.capacity <= 2 * 1000


def state_floats(cache):
    """Numbers whose memory the convolutions' rows keep, block by block."""
    sizes = []
    for layer in cache.layers:
        if layer.convolution_rows is not None:
            sizes.append(
                sum(rows.untyped_storage().nbytes() // rows.element_size() for rows in layer.convolution_rows)
            )
    return sizes


@torch.no_grad()
def test_convolution_state_takes_22_d_floats_a_block_however_long_the_text():
    cache = EvolvedTransformerCache(config())
    ledger = Ledger(cache, batch_size=3)
    for length in (500, 1, 2, 30, 1):
        ledger.feed(length)
        assert state_floats(cache) == [3 * 22 * HIDDEN] * BLOCKS


def test_gradients_reach_the_new_tokens_only():
    cache = EvolvedTransformerCache(config())
    first, second = (torch.randn(2, HEADS, 3, 4, requires_grad=True) for _ in range(2))
    keys, values = cache.update(first, first, 1)
    (keys.sum() + values.sum()).backward()
    assert (first.grad == 2).all()
    first.grad = None
    keys, values = cache.update(second, second, 1)
    (keys.sum() + values.sum()).backward()
    assert (second.grad == 2).all()
    assert first.grad is None
    cache.update_convolution_state(0, (torch.ones(2, 13, HIDDEN, requires_grad=True), torch.ones(2, 9, 2 * HIDDEN)))
    assert not cache.convolution_state(0)[0].requires_grad


def test_what_was_made_in_inference_mode_can_be_continued_outside():
    ledger = Ledger(EvolvedTransformerCache(config()))
    with torch.inference_mode():
        ledger.feed(5)
    with torch.no_grad():
        ledger.feed(2)
    ledger.feed(1)
    ledger.check()


@pytest.mark.parametrize("indices", [[1, 0, 2], [2, 2, 0, 1], [1], [True, False, True]])
@torch.no_grad()
def test_rows_are_chosen_in_every_slot(indices):
    cache = EvolvedTransformerCache(config())
    ledger = Ledger(cache, batch_size=3)
    ledger.feed(6)
    indices = torch.tensor(indices)
    cache.batch_select_indices(indices)
    ledger.map(lambda states: states[indices])
    ledger.check()
    ledger.feed(1)
    ledger.check()


@torch.no_grad()
def test_beams_are_reordered_and_rows_repeated_in_every_slot():
    cache = EvolvedTransformerCache(config())
    ledger = Ledger(cache)
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
def test_tokens_are_taken_back_when_recorded():
    cache = EvolvedTransformerCache(config())
    cache.activate_past_recording()
    ledger = Ledger(cache)
    # A first call longer than the recording, rounds of several calls, and back into an earlier call's tokens.
    for fed, taken in ((RECORDED_TOKENS + 20, 3), (1, 0), (2, 0), (5, 6), (1, 30), (3, 1)):
        ledger.feed(fed)
        assert cache.is_croppable
        ledger.crop(taken)
        ledger.check()
    for _ in range(RECORDED_TOKENS):
        ledger.feed(1)
    ledger.crop(RECORDED_TOKENS)
    ledger.check()


@torch.no_grad()
def test_a_recording_does_not_grow():
    """A text of a thousand tokens, of which each call may be taken back."""
    cache = EvolvedTransformerCache(config())
    cache.activate_past_recording()
    ledger = Ledger(cache, batch_size=1)
    for length in (100, *[3] * 60):
        ledger.feed(length)
        ledger.crop(1)
    floats = (10 + RECORDED_TOKENS) * HIDDEN + (6 + RECORDED_TOKENS) * 2 * HIDDEN
    assert state_floats(cache) == [floats] * BLOCKS
    with pytest.raises(ValueError, match=f"kept for the last {RECORDED_TOKENS - 1} tokens"):
        cache.crop(-RECORDED_TOKENS)
    ledger.crop(RECORDED_TOKENS - 1)
    ledger.check()


@torch.no_grad()
def test_a_text_can_be_taken_back_to_its_beginning():
    cache = EvolvedTransformerCache(config())
    cache.activate_past_recording()
    ledger = Ledger(cache)
    ledger.feed(4)
    ledger.crop(4)
    ledger.check()
    ledger.feed(2)
    ledger.check()


@torch.no_grad()
def test_tokens_cannot_be_taken_back_without_a_recording():
    cache = EvolvedTransformerCache(config())
    ledger = Ledger(cache)
    assert cache.is_croppable
    ledger.feed(9)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match=r"crop\(-1\) is not possible.*activate_past_recording"):
        cache.crop(-1)
    ledger.check()


@torch.no_grad()
def test_crop_refuses_what_is_not_there():
    cache = EvolvedTransformerCache(config())
    cache.crop(0)
    ledger = Ledger(cache)
    ledger.feed(3)
    with pytest.raises(ValueError, match=r"crop\(2\) must be 0 or negative"):
        cache.crop(2)
    with pytest.raises(ValueError, match=r"crop\(-4\) of a cache that holds 3 tokens"):
        cache.crop(-4)
    ledger.check()


@torch.no_grad()
def test_reset_forgets_everything():
    cache = EvolvedTransformerCache(config())
    Ledger(cache).feed(3)
    cache.reset()
    assert (len(cache), cache.get_seq_length(), cache.batch_size) == (2 * BLOCKS, 0, -1)
    ledger = Ledger(cache, batch_size=4)
    assert cache.convolution_state(1) is None
    ledger.feed(2)
    ledger.check()


@torch.no_grad()
def test_a_copy_goes_its_own_way():
    """One prompt's cache continued twice."""
    cache = EvolvedTransformerCache(config())
    ledger = Ledger(cache)
    ledger.feed(3)
    other = copy.deepcopy(ledger)
    other.feed(2)
    ledger.feed(1)
    ledger.check()
    other.check()


@pytest.mark.parametrize("batch_size", [1, 3, 6])
@torch.no_grad()
def test_other_rows_are_refused(batch_size):
    """One row as well, which would fit any number of them by broadcasting."""
    cache = EvolvedTransformerCache(config())
    Ledger(cache, batch_size=2).feed(3)
    with pytest.raises(ValueError, match=r"holds 2 rows of 4 heads of size 2.*batch_repeat_interleave"):
        Ledger(cache, batch_size=batch_size).feed(1)


@torch.no_grad()
def test_cache_moves_between_devices():
    cache = EvolvedTransformerCache(config())
    ledger = Ledger(cache)
    ledger.feed(3)
    assert cache.to("cpu") is cache
    ledger.check()
    cache.to("meta")
    assert all(layer.keys.device.type == "meta" for layer in cache.layers)
    assert all(rows.device.type == "meta" for rows in cache.convolution_state(BLOCKS - 1))


def test_new_cache_fits_the_model():
    assert type(new_cache(config())) is EvolvedTransformerCache
    cache = new_cache(config(is_decoder=False))
    assert type(cache) is EncoderDecoderCache
    cache.activate_past_recording()
    ledger = Ledger(cache.self_attention_cache)
    ledger.feed(4)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 3
    assert cache.self_attention_cache.batch_size == 4


def test_own_caches_are_accepted():
    for settings in (config(), config(is_decoder=False)):
        cache = new_cache(settings)
        assert check_cache(cache, settings) is cache
    bare = EvolvedTransformerCache(config())
    cache = check_cache(bare, config(is_decoder=False))
    assert type(cache) is EncoderDecoderCache
    assert cache.self_attention_cache is bare


@pytest.mark.parametrize("is_decoder", [True, False])
def test_other_caches_are_refused(is_decoder):
    settings = config(is_decoder=is_decoder)
    plain = (DynamicCache(), DynamicCache(config=settings), StaticCache(settings, max_cache_len=8))
    for cache in (*plain, EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(ValueError, match=r"no place for what the convolutions.*EvolvedTransformerCache\(config\)"):
            check_cache(cache, settings)
    with pytest.raises(TypeError, match=r"is a tuple, but must be an EvolvedTransformerCache\(config\)"):
        check_cache(((torch.zeros(1), torch.zeros(1)),), settings)


def test_the_cache_of_a_deeper_model_is_refused():
    with pytest.raises(ValueError, match="made for 4 decoder blocks.*num_decoder_layers=3"):
        check_cache(EvolvedTransformerCache(config(num_decoder_layers=4)), config())
