"""Evolved Transformers of tensor2tensor: what is known becomes what means the same, all else is refused."""

import pytest
import torch
from torch import Tensor

from hf_efficient import EvolvedTransformerForCausalLM, EvolvedTransformerForConditionalGeneration
from hf_efficient.conversion.tensor2tensor import convert_tensor2tensor, read_settings, rename_weights

CFG = {"kind": "et_encoder", "hidden": 4, "heads": 1, "layers": 2, "ln_eps": 1e-6, "pre": "n", "post": "da"}
DECODER = {"kind": "et_decoder", "cross": False, "wide_heads": 2}
WHOLE = {"kind": "et_full", "wide_heads": 4, "vocab": 11, "label_smoothing": 0.1}
LANGUAGE_MODEL = WHOLE | {"kind": "et_full_lm"}

# Shapes in a block of width 4 in tensor2tensor.
NORMS = {f"{name}.{key}": (4,) for name in ("branch.ln", "self_attn.ln", "ffn.ln") for key in "gb"}
FEED_FORWARD = {"ffn.w1": (4, 16), "ffn.b1": (16,), "ffn.w2": (16, 4), "ffn.b2": (4,)}
ENCODER_SHAPES = {
    **NORMS,
    **FEED_FORWARD,
    **{f"self_attn.{key}.w": (4, 4) for key in "qkvo"},
    **{f"glu.{name}.w": (4, 4) for name in ("value", "gate")},
    **{f"glu.{name}": (4,) for name in ("ln.g", "ln.b", "value.b", "gate.b")},
    "branch.dense.w": (4, 16),
    "branch.dense.b": (16,),
    "branch.conv3.w": (3, 4, 2),
    "branch.conv3.b": (2,),
    "branch.ln_1.g": (16,),
    "branch.ln_1.b": (16,),
    "branch.sep9.dw": (9, 16, 1),
    "branch.sep9.pw": (1, 16, 2),
    "branch.sep9.b": (2,),
}
DECODER_SHAPES = {
    **NORMS,
    **FEED_FORWARD,
    **{f"{name}.{key}.w": (4, 4) for name in ("wide_self_attn", "self_attn") for key in "qkvo"},
    "wide_self_attn.ln.g": (4,),
    "wide_self_attn.ln.b": (4,),
    "branch.sep11.dw": (11, 4, 1),
    "branch.sep11.pw": (1, 4, 8),
    "branch.sep11.b": (8,),
    "branch.sep7a.dw": (7, 4, 1),
    "branch.sep7a.pw": (1, 4, 2),
    "branch.sep7a.b": (2,),
    "branch.ln_1.g": (8,),
    "branch.ln_1.b": (8,),
    "branch.sep7b.dw": (7, 8, 1),
    "branch.sep7b.pw": (1, 8, 4),
    "branch.sep7b.b": (4,),
    "ffn.ln_1.g": (16,),
    "ffn.ln_1.b": (16,),
}
CROSS_SHAPES = {
    **{f"{name}.{key}.w": (4, 4) for name in ("cross_attn_1", "cross_attn_2") for key in "qkvo"},
    "cross_attn_2.ln.g": (4,),
    "cross_attn_2.ln.b": (4,),
}


def stack(scope: str, shapes: dict, num_blocks: int = 2) -> dict[str, Tensor]:
    """Weights of a stack, all different."""
    names = {f"layer{number}.{name}": shape for number in range(num_blocks) for name, shape in shapes.items()}
    names |= {"final_ln.g": (4,), "final_ln.b": (4,)}
    return {f"{scope}/{name}": torch.randn(shape) for name, shape in names.items()}


def whole() -> dict[str, Tensor]:
    """A translation's."""
    tables = {"embed": torch.randn(11, 4), "target_space_embed": torch.randn(32, 4)}
    return tables | stack("encoder", ENCODER_SHAPES) | stack("decoder", DECODER_SHAPES | CROSS_SHAPES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"num_encoder_layers": 2, "position_signal": "none", "is_encoder_decoder": False, "is_decoder": False}),
        ({"filter": 7}, {"intermediate_size": 16}),
        ({"ln_eps": 1e-5}, {"layer_norm_eps": 1e-5}),
        (DECODER, {"num_decoder_layers": 2, "wide_heads": 2, "is_decoder": True, "position_signal": "none"}),
        (DECODER | {"cross": True}, {"is_encoder_decoder": True, "is_decoder": False}),
        (WHOLE, {"vocab_size": 11, "encoder_input_bias": True, "zero_pad_embedding": True, "wide_heads": 4}),
        (WHOLE, {"is_encoder_decoder": True, "position_signal": "sinusoid", "num_decoder_layers": 2}),
        (WHOLE | {"cross": True, "position_signal": False}, {"position_signal": "none"}),
        (LANGUAGE_MODEL, {"is_decoder": True, "encoder_input_bias": False, "zero_pad_embedding": True}),
        (LANGUAGE_MODEL | {"cross": False, "position_signal": True}, {"position_signal": "sinusoid"}),
    ],
)
def test_settings(changes, expected):
    model_class, config = read_settings(CFG | changes)
    assert {name: getattr(config, name) for name in expected} == pytest.approx(expected)
    assert model_class(config).config.hidden_size == 4


def test_label_smoothing_spreads_over_the_other_ids():
    """tensor2tensor gives 0.1 to the 10 wrong ids of 11; our share is spread over all 11, the right one too."""
    _, config = read_settings(CFG | WHOLE)
    assert config.label_smoothing / 11 == pytest.approx(0.1 / 10)
    assert 1 - config.label_smoothing * 10 / 11 == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "none", "post": "dan"}, "pre and post = .*have no counterpart"),
        ({"pre": "n", "post": "dan"}, "pre and post = .*have no counterpart"),
        ({"dropout": 0.1}, r"cfg is no et_encoder: missing=\[\], unknown=\['dropout'\]"),
        ({"recurrence": "basic"}, r"unknown=\['recurrence'\]"),
        ({"position_signal": True}, r"unknown=\['position_signal'\]"),
        ({"wide_heads": 2}, r"unknown=\['wide_heads'\]"),
        ({"kind": "et_decoder"}, r"missing=\['cross', 'wide_heads'\]"),
        (DECODER | {"cross": 1}, "cross=1 has no counterpart"),
        (DECODER | {"wide_heads": 3}, "num_wide_attention_heads=3"),
        (WHOLE | {"cross": False}, "cross=False"),
        (WHOLE | {"position_signal": "timing"}, "position_signal='timing'"),
        (LANGUAGE_MODEL | {"cross": True}, "cross=True"),
        ({"hidden": 5}, "hidden_size=5"),
        ({"layers": 0}, "num_encoder_layers=0"),
        ({"kind": "et_pyramid"}, "kind='et_pyramid' has no counterpart; known are 'ut_encoder'.*'et_full_lm'"),
    ],
)
def test_what_has_no_counterpart_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings(CFG | changes)


def test_a_setting_that_is_missing_is_refused():
    with pytest.raises(ValueError, match=r"missing=\['ln_eps'\]"):
        read_settings({name: value for name, value in CFG.items() if name != "ln_eps"})


def test_weights_of_a_translation_come_where_they_belong():
    given = whole()
    model = convert_tensor2tensor(CFG | WHOLE, given)
    assert type(model) is EvolvedTransformerForConditionalGeneration
    assert not model.training
    state_dict = model.state_dict()
    encoder, decoder = "model.encoder.layers.1", "model.decoder.layers.1"
    for ours, theirs in {
        "model.embed_tokens.weight": given["embed"],
        "lm_head.weight": given["embed"],
        "model.encoder.input_bias.bias": given["target_space_embed"][1],
        "model.encoder.final_norm.weight": given["encoder/final_ln.g"],
        f"{encoder}.glu.gate_proj.weight": given["encoder/layer1.glu.gate.w"].T,
        f"{encoder}.branches.norm.bias": given["encoder/layer1.branch.ln_1.b"],
        f"{encoder}.feed_forward.down_proj.weight": given["encoder/layer1.ffn.w2"].T,
        f"{decoder}.wide_self_attention.k_proj.weight": given["decoder/layer1.wide_self_attn.k.w"].T,
        f"{decoder}.wide_cross_attention.v_proj.weight": given["decoder/layer1.cross_attn_1.v.w"].T,
        f"{decoder}.cross_attention_norm.weight": given["decoder/layer1.cross_attn_2.ln.g"],
        f"{decoder}.feed_forward.norm.weight": given["decoder/layer1.ffn.ln_1.g"],
        f"{decoder}.branches.separable_11.pointwise.weight": given["decoder/layer1.branch.sep11.pw"][0].T,
    }.items():
        assert torch.equal(state_dict[ours], theirs), ours
    # One entry each of a kernel: tap 2 of input channel 3 to output channel 1, and tap 5 of channel 6.
    kernel = state_dict[f"{encoder}.branches.convolution.weight"]
    assert kernel[1, 3, 2] == given["encoder/layer1.branch.conv3.w"][2, 3, 1]
    depthwise = state_dict[f"{decoder}.branches.separable_out.depthwise.weight"]
    assert depthwise[6, 0, 5] == given["decoder/layer1.branch.sep7b.dw"][5, 6, 0]
    assert len(rename_weights(CFG | WHOLE, given)) == len(given)


def test_a_language_model_has_no_cross_attention():
    given = {"embed": torch.randn(11, 4)} | stack("decoder", DECODER_SHAPES)
    model = convert_tensor2tensor(CFG | LANGUAGE_MODEL, given)
    assert type(model) is EvolvedTransformerForCausalLM
    assert torch.equal(model.lm_head.weight, given["embed"])
    with pytest.raises(ValueError, match="cross_attention.*are too many"):
        convert_tensor2tensor(CFG | LANGUAGE_MODEL, given | stack("decoder", DECODER_SHAPES | CROSS_SHAPES))


def test_dtype():
    model = convert_tensor2tensor(CFG, stack("encoder", ENCODER_SHAPES), torch.float64)
    assert {value.dtype for value in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["encoder/layer0.glu.z.w", "encoder/block0.ffn.w1", "middle/final_ln.g", "lm_head"])
def test_unknown_weights_are_refused(name):
    with pytest.raises(ValueError, match=f"the weight '{name}' has no counterpart"):
        convert_tensor2tensor(CFG, stack("encoder", ENCODER_SHAPES) | {name: torch.zeros(4)})


def test_weights_that_contradict_the_settings_are_refused():
    given = stack("encoder", ENCODER_SHAPES)
    fewer = {name: value for name, value in given.items() if name != "encoder/final_ln.b"}
    with pytest.raises(ValueError, match="contradict the settings.*encoder.final_norm.bias.* are missing"):
        convert_tensor2tensor(CFG, fewer)
    with pytest.raises(ValueError, match="contradict the settings.*layers.2.* are too many"):
        convert_tensor2tensor(CFG, stack("encoder", ENCODER_SHAPES, num_blocks=3))
    with pytest.raises(ValueError, match="(?s)contradict the settings.*size mismatch"):
        convert_tensor2tensor(CFG | {"hidden": 8}, given)
