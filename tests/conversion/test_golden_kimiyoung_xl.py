"""Checkpoints and outputs of the original PyTorch release: every case found under the golden folder must agree.

A case is converted, saved, loaded with the Auto class and run over the reference's segments; the memory starts empty.
An attention other than the paper's (attn_type 0) must be refused by name.

Extended context (ext_len > 0) is no property of a model but a way of feeding it: the last ext_len tokens of a segment
are fed again in front of the next, and meanwhile stay out of the memory. It is reproduced here by feeding each segment
twice: whole, on a copy of the memory, for the outputs; and only as far as the reference remembers it, for the memory.

Tolerances: 2e-5 absolute on float32 activations of O(1) to O(10) and 1e-4 relative on gradients, some tens of float32
roundings each.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_utils import golden_cases
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from hf_efficient.conversion import convert_checkpoint

ATOL = 2e-5
GRADIENT_RTOL = 1e-4

CASES = golden_cases("kimiyoung_xl")


def settings(case: Path) -> dict:
    """The arguments with which the reference made the model."""
    return json.loads((case / "case.json").read_text())["constructor"]


PAPER_ATTENTION = [case for case in CASES if settings(case)["attn_type"] == 0]
OTHER_ATTENTION = [case for case in CASES if settings(case)["attn_type"] != 0]


def checkpoints(cases: list[Path]) -> list:
    """Each whole module of each case, in whichever container; a bare state dict comes without hyper-parameters."""
    files = [path for case in cases for path in sorted(case.glob("*.pt")) if path.name != "state_dict.pt"]
    return [pytest.param(path, id=f"{path.parent.name}/{path.name}") for path in files]


def load_outputs(case: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(case / "io.npz").items()}


def load_converted(checkpoint: Path, output: Path) -> torch.nn.Module:
    convert_checkpoint(checkpoint, output)
    model, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def segments(expected: dict[str, torch.Tensor]):
    """Of each segment: number, ids and labels, batch first. Labels of tokens fed again are ignored."""
    numbers = sorted(int(name[3:-5]) for name in expected if name.endswith("_data"))
    for k in numbers:
        ids, targets = expected[f"seg{k}_data"].T, expected[f"seg{k}_target"].T
        labels = torch.full_like(ids, -100)
        labels[:, ids.shape[1] - targets.shape[1] :] = targets
        yield k, ids, labels


def remembered(num_fed: int, memory_length: int, ext_len: int) -> int:
    """How many of a segment's tokens the reference takes into the memory.

    It means to leave out the last ext_len, and has two arguments swapped, which shows when the memory is shorter than
    ext_len: in the first segment.
    """
    return num_fed + max(0, memory_length - ext_len) - memory_length


def feed(model, cache, ids, ext_len: int, **kwargs):
    """Outputs for a segment, which goes into the memory as far as the reference lets it."""
    num_remembered = remembered(ids.shape[1], cache.memory_length, ext_len)
    if num_remembered == ids.shape[1]:
        return model(ids, past_key_values=cache, **kwargs)
    output = model(ids, past_key_values=copy.deepcopy(cache), **kwargs)
    model(ids[:, :num_remembered], past_key_values=cache)
    return output


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_there_are_cases():
    """An empty golden folder would make every test below pass."""
    assert CASES


@pytest.mark.parametrize("keeps_keys", [False, True], ids=["hidden_states", "keys_values"])
@pytest.mark.parametrize("checkpoint", checkpoints(PAPER_ATTENTION))
def test_segments(checkpoint, keeps_keys, tmp_path):
    """Hidden states, losses in token order, log-probabilities and memory of all segments, in either form of memory."""
    expected = load_outputs(checkpoint.parent)
    ext_len = settings(checkpoint.parent)["ext_len"]
    model = load_converted(checkpoint, tmp_path / "converted")
    cache = model.create_cache()
    for k, ids, labels in segments(expected):
        num_new = expected[f"seg{k}_target"].shape[0]
        with torch.set_grad_enabled(not keeps_keys):
            if f"seg{k}_log_probs" in expected:
                logits = model(ids, past_key_values=copy.deepcopy(cache)).logits[:, -num_new:]
                assert_close(logits.log_softmax(-1), expected[f"seg{k}_log_probs"].transpose(0, 1))
            output = feed(model, cache, ids, ext_len, shift_labels=labels, output_hidden_states=True)
        assert_close(output.hidden_states[-1], expected[f"seg{k}_hidden"].transpose(0, 1))
        assert_close(output.losses[:, -num_new:], expected[f"seg{k}_nll_in_order"].T)
        assert_close(output.loss, expected[f"seg{k}_nll_in_order"].mean())
        # The reference's last memory, of the final states, is never read, and not kept here.
        for i, layer in enumerate(cache.layers):
            if f"seg{k}_mem_out_{i}" in expected and not keeps_keys:
                assert_close(layer.hidden_states, expected[f"seg{k}_mem_out_{i}"].transpose(0, 1))


@pytest.mark.parametrize("checkpoint", checkpoints(PAPER_ATTENTION))
def test_gradients(checkpoint, tmp_path):
    """Norm of every parameter's gradient of the second segment's mean loss, the first segment's memory given."""
    expected = load_outputs(checkpoint.parent)
    model = load_converted(checkpoint, tmp_path / "converted")
    cache = model.create_cache()
    (_, first, _), (_, second, labels), *_ = segments(expected)
    feed(model, cache, first, settings(checkpoint.parent)["ext_len"])
    model(second, past_key_values=cache, shift_labels=labels).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    on_disk = revert_weight_conversion(model, gradients)
    by_name = {name.removeprefix("transformer."): gradient for name, gradient in on_disk.items()}
    names = json.loads((checkpoint.parent / "grad_norm_names.json").read_text())
    for name, norm in zip(names, expected["seg1_grad_norms"], strict=True):
        torch.testing.assert_close(by_name[name].double().norm(), norm, rtol=GRADIENT_RTOL, atol=1e-9, msg=name)


@pytest.mark.parametrize("checkpoint", checkpoints(PAPER_ATTENTION))
def test_extended_context_is_reported(checkpoint, tmp_path):
    ext_len = settings(checkpoint.parent)["ext_len"]
    report = convert_checkpoint(checkpoint, tmp_path / "converted")
    assert (f"ext_len={ext_len}" in str(report)) == (ext_len > 0)


@pytest.mark.parametrize("checkpoint", checkpoints(OTHER_ATTENTION))
def test_other_attention_is_refused_by_name(checkpoint, tmp_path):
    attn_type = settings(checkpoint.parent)["attn_type"]
    name = {1: "Shaw", 2: "Vaswani", 3: "Al-Rfou"}[attn_type]
    with pytest.raises(ValueError, match=rf"attn_type={attn_type} \({name}.*only attn_type=0"):
        convert_checkpoint(checkpoint, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
