"""Exported programs, which cannot pack rows, take rows with pads."""

import pytest
import torch
from models.act_rnn.small_models import ACT, CELLS, small_model
from models.model_tools import EXACT, random_ids

from hf_efficient import ActRnnForCausalLM


def exported(model, **inputs):
    return torch.export.export(model, (), inputs, strict=False).module()


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # torch's recurrent modules keep lists of their weights
@pytest.mark.parametrize("cell", CELLS)
def test_pads_of_another_batch_than_the_exported_one(cell):
    model = small_model(ActRnnForCausalLM, cell=cell)
    ids, mask = random_ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    program = exported(model, input_ids=ids, attention_mask=mask)
    mask[0, :3] = mask[1, 5:] = mask[1, 2] = 0
    given = {"input_ids": ids.flip(1), "attention_mask": mask}
    torch.testing.assert_close(program(**given).logits, model(**given).logits, **EXACT)


def test_what_cannot_be_exported_says_so():
    ids = random_ids(2, 5)
    with pytest.raises(ValueError, match='only models with halting="none" can be exported'):
        exported(small_model(ActRnnForCausalLM, **ACT), input_ids=ids)
    with pytest.raises(ValueError, match="export it with use_cache=False"):
        exported(small_model(ActRnnForCausalLM), input_ids=ids, use_cache=True)
