"""What other tools make of the models: adapters, quantised weights, graphs."""

import warnings
from pathlib import Path
from typing import Any

import torch
from contract.inputs import inputs_of, loss_of, result, token_ids
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
    """`torch.compile`: the same result; in one graph, unless the model halts or is recurrent."""
    torch.compiler.reset()
    model, inputs = row.build(), inputs_of(row)
    expected = result(model, **inputs)
    # Halting depends on the data, and torch packs rows of a recurrent network outside of the graph.
    in_pieces = "halting" in row.settings or row.variant.architecture == "act_rnn"
    compiled = torch.compile(model, backend="eager", fullgraph=not in_pieces)
    torch.testing.assert_close(result(compiled, **inputs), expected, **EXACT)


def exported(model: torch.nn.Module, inputs: dict, **settings: Any) -> torch.nn.Module:
    """The exported program as a module."""
    with warnings.catch_warnings():
        # torch's recurrent modules keep lists of their weights, which its export notices.
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        return torch.export.export(model, (), inputs, strict=False, **settings).module()


def check_export(row: Row, folder: Path) -> None:
    """`torch.export`: the exported program gives the same result, for other ids too."""
    model, inputs = row.build(), inputs_of(row)
    program = exported(model, inputs)
    for given in (inputs, inputs | {"input_ids": inputs["input_ids"].flip(1)}):
        torch.testing.assert_close(result(program, **given), result(model, **given), **EXACT)


def check_open_sizes(row: Row, folder: Path) -> None:
    """`torch.export` with open sizes: the same result for a batch and a length that it was not made with, and pads."""
    model, inputs = row.build(), inputs_of(row)
    shapes = dict.fromkeys(inputs, dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC))
    program = exported(model, inputs, dynamic_shapes=shapes)
    others = inputs_of(row, num_rows=3, length=19)
    others["attention_mask"][0, :4] = 0
    # What stands at pads means nothing.
    is_told = others["attention_mask"] == 1
    if row.kind == "ForConditionalGeneration":
        others["decoder_input_ids"] = token_ids(3, 10, seed=4)
        is_told = ...
    torch.testing.assert_close(result(program, **others)[is_told], result(model, **others)[is_told], **EXACT)


def check_onnx(row: Row, folder: Path) -> None:
    """ONNX through torch's exporter, computed by ONNX's own reference: the same result, for other ids too."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, inputs = row.build(torch.float32), inputs_of(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)
    path = folder / "model.onnx"
    program.save(str(path))
    onnx.checker.check_model(str(path))
    graph = onnx.load(str(path))
    needed = {given.name for given in graph.graph.input}
    for given in (inputs, inputs | {"input_ids": inputs["input_ids"].flip(1)}):
        tensors = {name: tensor.numpy() for name, tensor in given.items() if name in needed}
        outputs = ReferenceEvaluator(graph).run(None, tensors)
        torch.testing.assert_close(torch.from_numpy(outputs[0]), result(model, **given), rtol=1e-3, atol=1e-3)
