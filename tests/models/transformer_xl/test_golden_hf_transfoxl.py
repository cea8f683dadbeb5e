"""Checkpoints and outputs of transformers 4's TransfoXL: every case found under the golden folder must agree.

Tolerances: 2e-5 absolute on float32 activations of O(1) to O(10) and 1e-4 relative on gradients, some tens of float32
roundings each; integers exactly.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_utils import golden_cases
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion

import hf_efficient  # noqa: F401  (registers the model)

ATOL = 2e-5
GRADIENT_RTOL = 1e-4


def load_outputs(case: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(case / "io.npz").items()}


def has_segments(case: Path) -> bool:
    return "segment_lengths" in np.load(case / "io.npz").files


CASES = golden_cases("hf_transfoxl")
LANGUAGE_MODELS = [case for case in CASES if has_segments(case)]
CLASSIFIERS = [case for case in CASES if not has_segments(case)]
WEIGHT_FILES = [
    (case, name)
    for case in LANGUAGE_MODELS
    for name in ("model.safetensors", "pytorch_model.bin")
    if (case / name).exists()
]


def identify(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


def load_model(case: Path, weights: str | None = None, **kwargs: object) -> torch.nn.Module:
    """Through the Auto class, refusing any weight that the file lacks or that finds no place."""
    if weights is not None:
        kwargs["use_safetensors"] = weights.endswith(".safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(case, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def segments(outputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return outputs["input_ids"].split(outputs["segment_lengths"].tolist(), dim=1)


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)


@pytest.mark.parametrize("keeps_keys", [False, True], ids=["hidden_states", "keys_values"])
@pytest.mark.parametrize(("case", "weights"), WEIGHT_FILES, ids=identify)
def test_segments(case: Path, weights: str, keeps_keys: bool):
    """Hidden states, log-probabilities, losses and memories of three segments, in either form of the memory."""
    expected, model = load_outputs(case), load_model(case, weights)
    cache = model.create_cache()
    with torch.set_grad_enabled(not keeps_keys):
        for k, ids in enumerate(segments(expected)):
            output = model(ids, past_key_values=cache, output_hidden_states=True)
            torch.testing.assert_close(log_probs(output.logits), expected[f"seg{k}_log_probs"], atol=ATOL, rtol=0)
            for i, states in enumerate(output.hidden_states):
                torch.testing.assert_close(states, expected[f"seg{k}_hidden_{i}"], atol=ATOL, rtol=0)
            if f"seg{k}_mems" in expected and not keeps_keys:
                memories = torch.stack([layer.hidden_states.transpose(0, 1) for layer in cache.layers])
                torch.testing.assert_close(memories, expected[f"seg{k}_mems"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", LANGUAGE_MODELS, ids=identify)
def test_losses(case: Path):
    """Mean loss with the reference's labels, and per-token losses in token order."""
    expected, model = load_outputs(case), load_model(case)
    memory, memory_all = model.create_cache(), model.create_cache()
    for k, ids in enumerate(segments(expected)):
        labels = expected.get(f"seg{k}_labels", ids)
        output = model(ids, labels=labels, past_key_values=memory)
        torch.testing.assert_close(output.loss, expected[f"seg{k}_loss"], atol=ATOL, rtol=0)
        losses = model(ids, labels=ids, past_key_values=memory_all).losses
        torch.testing.assert_close(losses, expected[f"seg{k}_nll_in_order"], atol=ATOL, rtol=0)
        assert torch.equal(output.losses, torch.where(labels[:, 1:] == -100, 0.0, losses))


@pytest.mark.parametrize("case", LANGUAGE_MODELS, ids=identify)
def test_attention_probabilities(case: Path):
    expected, model = load_outputs(case), load_model(case, attn_implementation="eager")
    first, second = segments(expected)[:2]
    cache = model(first).past_key_values
    weights = model(second, past_key_values=cache, output_attentions=True).attentions
    for i, probabilities in enumerate(weights):
        torch.testing.assert_close(probabilities, expected[f"seg1_attn_{i}"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", LANGUAGE_MODELS, ids=identify)
def test_gradients(case: Path):
    """Every parameter's gradient of the second segment's loss, the first segment's memory given."""
    expected, model = load_outputs(case), load_model(case)
    first, second = segments(expected)[:2]
    cache = model(first).past_key_values
    model(second, labels=expected.get("seg1_labels", second), past_key_values=cache).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    on_disk = revert_weight_conversion(model, gradients)
    names = json.loads((case / "grad_norm_names.json").read_text())
    assert len(names) == len(expected["seg1_grad_norms"])
    for name, norm in zip(names, expected["seg1_grad_norms"], strict=True):
        torch.testing.assert_close(on_disk[name].double().norm(), norm, rtol=GRADIENT_RTOL, atol=1e-9, msg=name)
    for name, module in (("qkv", "qkv_net"), ("r_net", "r_net")):
        gradient = on_disk[f"transformer.layers.0.dec_attn.{module}.weight"]
        reference = expected[f"seg1_grad_{name}_layer0"]
        assert (gradient - reference).norm() <= GRADIENT_RTOL * reference.norm()


@pytest.mark.parametrize("case", LANGUAGE_MODELS, ids=identify)
@pytest.mark.parametrize("num_beams", [1, 2], ids=["greedy", "beam2"])
def test_generation(case: Path, num_beams: int):
    expected, model = load_outputs(case), load_model(case)
    reference = expected["generate_greedy" if num_beams == 1 else "generate_beam2"]
    model.generation_config.eos_token_id = None
    tokens = model.generate(
        expected["generate_prompt"],
        attention_mask=torch.ones_like(expected["generate_prompt"]),
        max_length=reference.shape[1],
        num_beams=num_beams,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(tokens, reference)


@pytest.mark.parametrize("case", CLASSIFIERS, ids=identify)
def test_sequence_classification(case: Path):
    expected = load_outputs(case)
    model, info = AutoModelForSequenceClassification.from_pretrained(case, output_loading_info=True)
    assert not any(info.values()), info
    output = model.eval()(expected["input_ids"], labels=expected["labels"])
    torch.testing.assert_close(output.logits, expected["logits"], atol=ATOL, rtol=0)
    torch.testing.assert_close(output.loss, expected["loss"], atol=ATOL, rtol=0)


def test_cases_are_found():
    """An empty golden folder would make every test above pass."""
    assert CASES
