"""What other tools make of the models: adapters, quantised weights, graphs."""

import warnings
from pathlib import Path

import torch
from contract.inputs import inputs_of, loss_of, result
from contract.rows import Row
from models.model_tools import EXACT
from peft import LoraConfig, PeftModel, get_peft_model


def check_lora(row: Row, folder: Path) -> None:
    """Adapters of every linear layer: they alone learn; merged or loaded again, the model computes the same."""
    model, inputs = row.build(), inputs_of(row)
    model.save_pretrained(folder / "model")
    settings = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = get_peft_model(model, settings).double()
    loss_of(row, adapted).backward()
    learning = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert learning
    assert all("lora_" in name for name in learning)
    torch.optim.SGD(adapted.parameters(), lr=0.01).step()
    adapted.eval().save_pretrained(folder / "adapters")
    expected = result(adapted, **inputs)
    loaded = PeftModel.from_pretrained(row.model_class.from_pretrained(folder / "model"), folder / "adapters").double()
    torch.testing.assert_close(result(loaded.eval(), **inputs), expected, rtol=1e-5, atol=1e-5)
    merged = adapted.merge_and_unload()
    assert type(merged) is row.model_class
    torch.testing.assert_close(result(merged, **inputs), expected, **EXACT)


def check_int8(row: Row, folder: Path) -> None:
    """int8 weights (optimum-quanto) in every linear layer: results close to those of the full weights."""
    # quanto imports an operator that torch names otherwise now.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from optimum.quanto import QModuleMixin, freeze, qint8, quantize

    model, inputs = row.build(torch.float32), inputs_of(row)
    expected = result(model, **inputs)
    quantize(model, weights=qint8)
    freeze(model)
    assert any(isinstance(module, QModuleMixin) for module in model.modules())
    error = (result(model, **inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.2


# --- graphs -----------------------------------------------------------------------------------------------


def check_compile(row: Row, folder: Path) -> None:
    """`torch.compile`: the same result; in one graph, unless the model halts, hashes or is recurrent."""
    torch.compiler.reset()
    model, inputs = row.build(), inputs_of(row)
    expected = result(model, **inputs)
    settings = row.settings
    # Halting depends on the data, directions for hashing are drawn in the call, and torch packs rows of a recurrent
    # network outside of the graph.
    in_pieces = "halting" in settings or "hash_seed" in settings or row.variant.architecture == "act_rnn"
    compiled = torch.compile(model, backend="eager", fullgraph=not in_pieces)
    torch.testing.assert_close(result(compiled, **inputs), expected, **EXACT)


def exported_inputs(row: Row) -> dict:
    """Tensors and flags; a graph holds no cache."""
    return inputs_of(row) | ({"use_cache": False} if row.kind not in WITHOUT_CACHE else {})


# Heads whose `forward` has no `use_cache`.
WITHOUT_CACHE = (
    "EncoderModel",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def check_export(row: Row, folder: Path) -> None:
    """`torch.export`: the exported program gives the same result, for other ids too."""
    model, inputs = row.build(), exported_inputs(row)
    program = torch.export.export(model, (), inputs, strict=False).module()
    others = inputs | {"input_ids": inputs["input_ids"].flip(1)}
    for given in (inputs, others):
        torch.testing.assert_close(result(program, **given), result(model, **given), **EXACT)


def check_onnx(row: Row, folder: Path) -> None:
    """ONNX through torch's exporter, computed by ONNX's own reference: the same result."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, inputs = row.build(torch.float32), exported_inputs(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)
    path = folder / "model.onnx"
    program.save(str(path))
    onnx.checker.check_model(str(path))
    tensors = {name: value.numpy() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    graph = onnx.load(str(path))
    needed = {given.name for given in graph.graph.input}
    outputs = ReferenceEvaluator(graph).run(None, {name: value for name, value in tensors.items() if name in needed})
    torch.testing.assert_close(torch.from_numpy(outputs[0]), result(model, **inputs), rtol=1e-3, atol=1e-3)
