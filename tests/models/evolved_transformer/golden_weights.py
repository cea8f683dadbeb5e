"""tensor2tensor's arrays under the names that `naive_evolved_transformer.py` looks up. Not our converter."""

import re
from types import SimpleNamespace

import numpy as np
import torch
from models.universal_transformer.golden_weights import load_case
from torch import Tensor

# What is inside a block, the longer names first, and after that the last part of a name.
INSIDE = (
    (r"^layer(\d+)\.", r"layers.\1."),
    (r"\.wide_self_attn\.ln\.", ".wide_attention_norm."),
    (r"\.self_attn\.ln\.", ".self_attention_norm."),
    (r"\.cross_attn_2\.ln\.", ".cross_attention_norm."),
    (r"\.glu\.ln\.", ".glu_norm."),
    (r"\.branch\.ln\.", ".branch_norm."),
    (r"\.ffn\.ln\.", ".feed_forward_norm."),
    (r"\.wide_self_attn\.", ".wide_self_attention."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.cross_attn_1\.", ".wide_cross_attention."),
    (r"\.cross_attn_2\.", ".cross_attention."),
    (r"\.(branch|ffn)\.ln_1\.", r".\1.norm."),
    (r"\.branch\.conv3\.", ".branch.convolution."),
    (r"\.branch\.sep9\.", ".branch.separable."),
    (r"\.branch\.sep11\.", ".branch.separable_11."),
    (r"\.branch\.sep7a\.", ".branch.separable_7."),
    (r"\.branch\.sep7b\.", ".branch.separable_out."),
    (r"\.branch\.", ".branches."),
    (r"\.glu\.(value|gate)\.", r".glu.\1_proj."),
    (r"\.([qkvo])\.w$", r".\1_proj.weight"),
    (r"\.ffn\.w1$", ".feed_forward.up_proj.weight"),
    (r"\.ffn\.b1$", ".feed_forward.up_proj.bias"),
    (r"\.ffn\.w2$", ".feed_forward.down_proj.weight"),
    (r"\.ffn\.b2$", ".feed_forward.down_proj.bias"),
    (r"\.ffn\.", ".feed_forward."),
    (r"final_ln\.", "final_norm."),
    (r"\.dw$", ".depthwise.weight"),
    (r"\.pw$", ".pointwise.weight"),
    (r"(\.separable(_\w+)?)\.b$", r"\1.pointwise.bias"),
    (r"\.(w|g)$", ".weight"),
    (r"\.b$", ".bias"),
)


def renamed(name: str) -> str:
    """The state dict's name of an array of one stack."""
    for pattern, replacement in INSIDE:
        name = re.sub(pattern, replacement, name)
    return name


def reshaped(name: str, array: Tensor) -> Tensor:
    """The array as the state dict has it: [out, in] instead of [in, out], taps last."""
    if name.endswith("depthwise.weight"):  # [k, C, 1]
        return array[:, :, 0].T[:, None]
    if name.endswith("pointwise.weight"):  # [1, in, out]
        return array[0].T
    return array.permute(*reversed(range(array.ndim)))


def stack_weights(arrays: dict[str, np.ndarray], scope: str, prefix: str = "w") -> dict[str, Tensor]:
    """Weights, or with `prefix="grad/w"` gradients, of the stack `scope` in float64."""
    start = f"{prefix}/{scope}/"
    weights = {}
    for key, array in arrays.items():
        if key.startswith(start):
            name = renamed(key.removeprefix(start))
            weights[name] = reshaped(name, torch.from_numpy(array).double()).contiguous()
    return weights


def settings_of(case: dict) -> SimpleNamespace:
    """A case's `cfg` in the package's words."""
    return SimpleNamespace(
        hidden_size=case["hidden"],
        num_attention_heads=case["heads"],
        num_wide_attention_heads=case.get("wide_heads"),
        num_encoder_layers=case["layers"],
        num_decoder_layers=case["layers"],
        layer_norm_eps=case["ln_eps"],
    )


__all__ = ["load_case", "settings_of", "stack_weights"]
