"""The cases under the golden folder `ut_et`: how they are read, converted and compared.

Tolerances: the reference computed in float32, and agrees with a float64 restatement to 2.3e-6 in outputs and 3e-6
relative in gradients. In float64 that leaves 5e-6 for outputs; in float32 our own roundings come on top, 2e-5.
Gradients are compared relative to the largest entry of their tensor, 1e-4.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from golden_utils import golden_family
from torch import Tensor

from hf_efficient.conversion.tensor2tensor import convert_tensor2tensor, rename_weights

OUTPUT_ATOL = {torch.float32: 2e-5, torch.float64: 5e-6}
GRADIENT_RTOL = 1e-4


def files() -> list[Path]:
    """All files, whatever is in them."""
    return sorted(golden_family("ut_et").glob("*.npz"))


@cache
def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The settings, None in a file of traces, and the arrays."""
    with np.load(path) as arrays:
        settings = json.loads(str(arrays["cfg"])) if "cfg" in arrays else None
        return settings, {name: torch.from_numpy(arrays[name]) for name in arrays if name != "cfg"}


def under(arrays: dict[str, Tensor], prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The arrays whose names begin with the prefix, without it; with a dtype, copies in it if they are no integers."""
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    if dtype is None:
        return found
    return {name: array.clone().to(dtype) if array.is_floating_point() else array for name, array in found.items()}


def load(path: Path, dtype: torch.dtype, attn_implementation: str = "sdpa"):
    """The case's model."""
    settings, arrays = read(path)
    model = convert_tensor2tensor(settings, under(arrays, "w/", dtype), dtype)
    model.set_attn_implementation(attn_implementation)
    return model


def run_embedded(model, inputs: dict[str, Tensor], **kwargs):
    """A bare encoder or decoder on embedded inputs."""
    if "enc" in inputs:
        return model(
            encoder_outputs=(inputs["enc"],),
            attention_mask=inputs.get("enc_mask"),
            decoder_inputs_embeds=inputs["x"],
            decoder_attention_mask=inputs.get("mask"),
            **kwargs,
        )
    return model(inputs_embeds=inputs["x"], attention_mask=inputs.get("mask"), **kwargs)


def real(array: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The entries of the tokens, without those of pads."""
    return array[inputs["mask"] == 1] if "mask" in inputs else array


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Outputs."""
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=OUTPUT_ATOL[found.dtype])


def assert_all_gradients(path: Path, model, sources: dict[str, Tensor]) -> None:
    """Those of every weight and of the sources, which the backward pass has left there."""
    settings, arrays = read(path)
    weights = dict(model.named_parameters())
    wanted = rename_weights(settings, under(arrays, "grad/w/"))
    assert wanted.keys() == rename_weights(settings, under(arrays, "w/")).keys()
    found = {name: weights[name].grad for name in wanted} | {name: source.grad for name, source in sources.items()}
    expected = wanted | {name: arrays[f"grad/in/{name}"] for name in sources}
    for name, gradient in expected.items():
        atol = GRADIENT_RTOL * gradient.abs().max().item()
        torch.testing.assert_close(found[name].float(), gradient, rtol=0, atol=atol, msg=lambda text, n=name: n + text)


__all__ = [
    "OUTPUT_ATOL",
    "assert_all_gradients",
    "assert_close",
    "files",
    "load",
    "read",
    "real",
    "run_embedded",
    "under",
]
