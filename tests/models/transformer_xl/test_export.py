"""Exported graphs, of torch and of ONNX: any batch and any length, with pads, and no memory."""

import pytest
import torch
from models.transformer_xl.small_models import EXACT, SINGLE, VARIANTS, random_ids, small_model
from torch.export import Dim

from hf_efficient import (
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLForTokenClassification,
)

SIZES = [(2, 6), (3, 4), (1, 17), (2, 1)]
EXPORTED = [
    "plain",
    "pre_norm",
    "shared_biases",
    "clamped",
    "same_length",
    "zeros",
    "adaptive_shrinking",
    "everything",
]


def inputs_of(num_rows, length):
    """Ids and a mask with a pad in front of the first row, where there is room."""
    mask = torch.ones(num_rows, length, dtype=torch.int64)
    mask[0, : length // 4] = 0
    return {"input_ids": random_ids(num_rows, length, seed=length), "attention_mask": mask}


DYNAMIC = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in ("input_ids", "attention_mask")}


def logits(model, **inputs):
    """Without gradients, as a graph is exported."""
    with torch.no_grad():
        return model(**inputs).logits


def exported(model):
    """Made from one batch, for all."""
    with torch.no_grad():
        return torch.export.export(model, (), inputs_of(2, 8), dynamic_shapes=DYNAMIC, strict=False).module()


@pytest.mark.parametrize("variant", EXPORTED)
def test_exported_graph_serves_every_batch_and_length(variant):
    model = small_model(**VARIANTS[variant])
    program = exported(model)
    for size in SIZES:
        inputs = inputs_of(*size)
        torch.testing.assert_close(logits(program, **inputs), logits(model, **inputs), **EXACT)


@pytest.mark.parametrize("cls", [TransformerXLForSequenceClassification, TransformerXLForTokenClassification])
def test_exported_classifiers(cls):
    model = small_model(cls, num_labels=3)
    program = exported(model)
    for size in SIZES:
        inputs = inputs_of(*size)
        torch.testing.assert_close(logits(program, **inputs), logits(model, **inputs), **EXACT)


def test_a_memory_cannot_be_exported():
    """Unless it was asked for, it is left out."""
    model = small_model()
    assert model(**inputs_of(2, 8)).past_key_values is not None
    for given in ({"use_cache": True}, {"past_key_values": model.create_cache()}):
        wrapped = WithArguments(model, given)
        with pytest.raises(ValueError, match="cannot carry the memory.*use_cache"):
            torch.export.export(wrapped, (), inputs_of(2, 8), strict=False)


class WithArguments(torch.nn.Module):
    """A model that is always called with some more arguments."""

    def __init__(self, model, given):
        super().__init__()
        self.model, self.given = model, given

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask, **self.given).logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("variant", ["plain", "clamped", "zeros", "adaptive_shrinking"])
def test_onnx_graph_serves_every_batch_and_length(variant, tmp_path):
    """As many rows as heads (2) are exported, which ONNX's optimiser may take for each other."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = small_model(TransformerXLForCausalLM, torch.float32, **VARIANTS[variant])
    program = torch.onnx.export(model, (), kwargs=inputs_of(2, 8), dynamic_shapes=DYNAMIC, dynamo=True, verbose=False)
    program.save(str(tmp_path / "model.onnx"))
    graph = ReferenceEvaluator(onnx.load(str(tmp_path / "model.onnx")))
    for size in SIZES[:3]:
        inputs = inputs_of(*size)
        (given, *_) = graph.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        is_token = inputs["attention_mask"].bool()
        torch.testing.assert_close(torch.from_numpy(given)[is_token], logits(model, **inputs)[is_token], **SINGLE)
