"""The token-by-token restatement agrees with tensor2tensor, so that it can be the truth for everything else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_utils import golden_family
from models.evolved_transformer.golden_weights import load_case, settings_of, stack_weights
from models.evolved_transformer.naive_evolved_transformer import NaiveDecoder, NaiveEncoder, Row, sinusoid
from torch import Tensor

FILES = [path for path in sorted(golden_family("ut_et").glob("*.npz")) if "cfg" in np.load(path)]
CASES = [path for path in FILES if load_case(path)[0]["kind"].startswith("et_")]
# Blocks that normalise after the sum are refused; see tests/conversion/test_golden_et.py.
CASES = [path for path in CASES if load_case(path)[0]["pre"] == "n"]
STACKS = [path for path in CASES if load_case(path)[0]["kind"] in ("et_encoder", "et_decoder")]
WHOLE = [path for path in CASES if path not in STACKS]


def name_of(path: Path) -> str:
    return path.stem


def tensor(array: np.ndarray, trained: bool = False) -> Tensor:
    values = torch.from_numpy(array).double()
    return values.requires_grad_() if trained else values


def run_rows(stack, embeds, mask, memory=None, memory_mask=None) -> Tensor:
    """States of all rows (B, L, D)."""
    results = []
    for b in range(len(embeds)):
        seen = None if memory is None else [v for v, m in zip(memory[b], memory_mask[b], strict=True) if m]
        row = Row(list(embeds[b]), [bool(m) for m in mask[b]], seen)
        results.append(torch.stack(stack.run(row)[-1]))
    return torch.stack(results)


def assert_close(actual: Tensor, expected: np.ndarray, relative: float, what: str) -> None:
    expected = torch.from_numpy(np.asarray(expected)).double()
    error = (actual - expected).abs().max()
    assert error <= relative * max(1.0, expected.abs().max()), f"{what}: {error}"


def test_cases_are_found():
    assert CASES


@pytest.mark.parametrize("path", STACKS, ids=name_of)
def test_stack_golden(path):
    """States, the reference's own token-by-token ones too, and all gradients."""
    case, arrays = load_case(path)
    is_causal = case["kind"] == "et_decoder"
    scope, cls = ("decoder", NaiveDecoder) if is_causal else ("encoder", NaiveEncoder)
    weights = {name: w.requires_grad_() for name, w in stack_weights(arrays, scope).items()}
    embeds = tensor(arrays["in/x"], trained=True)
    mask = arrays.get("in/mask", np.ones(embeds.shape[:2]))
    memory = tensor(arrays["in/enc"], trained=True) if "in/enc" in arrays else None

    outputs = run_rows(cls(settings_of(case), weights), embeds, mask, memory, arrays.get("in/enc_mask"))

    real = mask != 0
    for name in ("out/y", "out/y_cached"):
        if name in arrays:
            assert_close(outputs.detach()[real], arrays[name][real], 5e-6, name)
    (tensor(arrays["cotangent/y"]) * outputs).sum().backward()
    assert_close(embeds.grad, arrays["grad/in/x"], 2e-5, "gradient of x")
    if memory is not None:
        assert_close(memory.grad, arrays["grad/in/enc"], 2e-5, "gradient of the encoder's output")
    gradients = stack_weights(arrays, scope, "grad/w")
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        assert_close(weights[name].grad, gradient.numpy(), 2e-5, f"gradient of {name}")


@pytest.mark.parametrize("path", WHOLE, ids=name_of)
def test_whole_model_golden(path):
    case, arrays = load_case(path)
    settings = settings_of(case)
    table = tensor(arrays["w/embed"])
    scaled = table * case["hidden"] ** 0.5
    scaled[0] = 0
    targets = arrays["in/targets"]
    encoded, source = None, None
    if "in/inputs" in arrays:
        inputs = arrays["in/inputs"]
        source = inputs != 0
        embeds = scaled[inputs] + tensor(arrays["w/target_space_embed"])[1] + positions(inputs.shape[1], case)
        encoded = run_rows(NaiveEncoder(settings, stack_weights(arrays, "encoder")), embeds, source)
    shifted = torch.cat([torch.zeros(len(targets), 1, case["hidden"]).double(), scaled[targets][:, :-1]], dim=1)
    decoder = NaiveDecoder(settings, stack_weights(arrays, "decoder"))
    every = np.ones_like(targets)
    decoded = run_rows(decoder, shifted + positions(targets.shape[1], case), every, encoded, source)

    logits = decoded @ table.T
    assert_close(logits, arrays["out/logits"], 5e-6, "logits")
    real = torch.from_numpy(targets != 0)
    labels = torch.from_numpy(targets)
    loss = torch.nn.functional.cross_entropy(logits[real], labels[real])
    assert_close(loss, arrays["out/loss_training"], 5e-6, "loss")


def positions(length: int, case: dict) -> Tensor:
    return torch.stack([sinusoid(position, case["hidden"]) for position in range(length)])
