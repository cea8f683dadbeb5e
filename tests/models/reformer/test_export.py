"""Exported programs: rotations are constants, and what stands in for operations that ONNX lacks is the same."""

import pytest
import torch
from models.model_tools import EXACT, random_ids
from models.reformer.small_models import small_model
from torch.export import Dim

from hf_efficient import ReformerForCausalLM
from hf_efficient.models.reformer import sorted_attention, windowed_lsh_attention
from hf_efficient.models.reformer.hashing import draw_rotations

HASHED = {"attn_layers": ["windowed_lsh"], "num_buckets": 4}


def exported(model, ids, **inputs):
    return torch.export.export(model, (ids,), inputs, strict=False).module()


@pytest.mark.parametrize("seed", [None, 3])
def test_every_call_hashes_alike(seed):
    model = small_model(ReformerForCausalLM, hash_seed=seed, **HASHED)
    ids = random_ids(2, 9)
    program = exported(model, ids)
    for given in (ids, ids.flip(1), ids):
        torch.testing.assert_close(program(given).logits, model(given).logits, **EXACT)


def test_rotations_drawn_in_each_call_are_refused():
    model = small_model(ReformerForCausalLM, **HASHED).train()
    with pytest.raises(ValueError, match="call model.eval"):
        exported(model, random_ids(2, 9))


def test_training_mode_is_exported_with_a_seed_or_rotations():
    ids = random_ids(2, 9)
    model = small_model(ReformerForCausalLM, hash_seed=3, **HASHED).train()
    torch.testing.assert_close(exported(model, ids)(ids).logits, model(ids).logits, **EXACT)
    model.config.hash_seed = None
    config = model.config
    sizes = config.num_attention_heads, config.attention_head_size, config.num_hashes, (4,)
    rotations = [draw_rotations(5, *sizes)]
    program = exported(model, ids, rotations=rotations)
    expected = model(ids, rotations=rotations).logits
    torch.testing.assert_close(program(ids, rotations=rotations).logits, expected, **EXACT)


def test_buckets_chosen_by_an_open_length_are_refused():
    model = small_model(ReformerForCausalLM, attn_layers=["lsh"], num_buckets=None)
    with pytest.raises(ValueError, match=r"set config\.num_buckets"):
        torch.export.export(model, (random_ids(2, 9),), dynamic_shapes=({1: Dim.DYNAMIC},), strict=False)


def test_what_onnx_lacks_is_replaced_by_the_same(monkeypatch):
    buckets = torch.randint(6, (2, 3, 2, 40), generator=torch.Generator().manual_seed(1))

    def found():
        order, slots = sorted_attention.sort_by_bucket(buckets, 5)
        return order, slots, *windowed_lsh_attention._bucket_ends(buckets.gather(-1, order), 5)

    expected = found()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for name, ours, theirs in zip(("order", "slots", "first", "last"), found(), expected, strict=True):
        assert torch.equal(ours, theirs), name
