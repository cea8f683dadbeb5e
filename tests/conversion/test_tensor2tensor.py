"""Settings and weights of tensor2tensor: what is known becomes what means the same, all else is refused."""

import pytest
import torch

from hf_efficient.conversion.tensor2tensor import convert_tensor2tensor, read_settings, rename_weights

CFG = {
    "kind": "ut_encoder",
    "hidden": 4,
    "heads": 2,
    "filter": 6,
    "ln_eps": 1e-6,
    "pre": "n",
    "post": "da",
    "recurrence": "basic",
    "rec_steps": 3,
    "blocks_per_step": 1,
    "position_signal": True,
    "position_start": 0,
    "step_signal": True,
    "step_signal_type": "learned",
    "signal_combine": "add",
    "ffn": "fc",
}
HALTING = {"recurrence": "act", "act_type": "basic", "act_max_steps": 5, "act_eps": 0.02, "act_loss_weight": 0.003}
WHOLE = {"kind": "ut_full", "vocab": 11, "label_smoothing": 0.1}


def weights(num_blocks: int = 1) -> dict[str, torch.Tensor]:
    """Those of a model of `CFG`, all different."""
    block = {f"self_attn.{name}.w": (4, 4) for name in "qkvo"} | {"self_attn.ln.g": (4,), "self_attn.ln.b": (4,)}
    block |= {"ffn.ln.g": (4,), "ffn.ln.b": (4,), "ffn.w1": (4, 6), "ffn.b1": (6,), "ffn.w2": (6, 4), "ffn.b2": (4,)}
    shapes = {f"block{number}.{name}": shape for number in range(num_blocks) for name, shape in block.items()}
    shapes |= {"step_embed": (3, 1, 1, 4), "final_ln.g": (4,), "final_ln.b": (4,)}
    return {f"encoder/{name}": torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"max_steps": 3, "halting": "none", "position_signal": "sinusoid", "step_signal": "learned"}),
        ({"pre": "none", "post": "dan"}, {"norm_position": "post"}),
        ({"blocks_per_step": 2}, {"num_layers_in_group": 2}),
        ({"position_signal": False}, {"position_signal": "none"}),
        ({"step_signal_type": "sinusoid"}, {"step_signal": "sinusoid"}),
        ({"step_signal": False}, {"step_signal": "none"}),
        ({"position_start": "step"}, {"step_position_offset": True}),
        ({"signal_combine": "concat"}, {"coordinate_combination": "concat"}),
        ({"ffn": "sepconv"}, {"transition": "separable_convolution"}),
        ({"mix": "before+after 1 layer each"}, {"num_prelude_layers": 1, "num_coda_layers": 1}),
        ({"mix": "before 2 layers"}, {"num_prelude_layers": 2, "num_coda_layers": 0}),
        ({"mix": "after 2 layers"}, {"num_prelude_layers": 0, "num_coda_layers": 2}),
        (HALTING, {"max_steps": 5, "act_output": "interpolation", "halting_threshold": 0.98, "ponder_cost": 0.003}),
        (HALTING | {"act_type": "accumulated"}, {"act_output": "weighted_sum", "halted_states": "evolving"}),
        (HALTING | {"act_type": "global"}, {"act_output": "interpolation", "halting_scope": "sequence"}),
        (WHOLE, {"vocab_size": 11, "encoder_input_bias": True, "is_encoder_decoder": True}),
        (
            WHOLE | {"kind": "ut_full_lm"},
            {"is_decoder": True, "zero_pad_embedding": True, "encoder_input_bias": False},
        ),
        (WHOLE | {"kind": "ut_full_lm", "cross": False}, {"is_decoder": True, "is_encoder_decoder": False}),
        ({"kind": "ut_decoder", "cross": True}, {"is_decoder": False, "is_encoder_decoder": True}),
        ({"kind": "ut_decoder", "cross": False}, {"is_decoder": True, "is_encoder_decoder": False}),
    ],
)
def test_settings(changes, expected):
    model_class, config = read_settings(CFG | changes)
    assert {name: getattr(config, name) for name in expected} == pytest.approx(expected)
    assert model_class(config).config.max_steps == config.max_steps


def test_label_smoothing_spreads_over_the_other_ids():
    """tensor2tensor gives 0.1 to the 10 wrong ids of 11; our share is spread over all 11, the right one too."""
    _, config = read_settings(CFG | WHOLE)
    assert config.label_smoothing / 11 == pytest.approx(0.1 / 10)
    assert 1 - config.label_smoothing * 10 / 11 == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "xt_encoder"}, "kind='xt_encoder' has no counterpart"),
        ({"kind": None}, "kind=None"),
        ({"recurrence": "sru"}, "recurrence='sru'"),
        ({"recurrence": "gru"}, "recurrence='gru' is not supported: no table of the paper uses it"),
        ({"pre": "n", "post": "dan"}, "pre and post = .*have no counterpart"),
        ({"ffn": "moe"}, "ffn='moe'"),
        ({"position_start": "random"}, "position_start='random'"),
        ({"position_start": 3}, "position_start=3"),
        ({"position_signal": 1}, "position_signal=1"),
        ({"step_signal_type": "rotary"}, "step_signal_type='rotary'"),
        ({"signal_combine": "multiply"}, "signal_combine='multiply'"),
        ({"mix": "1 layer around"}, "mix='1 layer around'"),
        ({"dropout": 0.1}, r"missing=\[\], unknown=\['dropout'\]"),
        ({"act_eps": 0.01}, r"unknown=\['act_eps'\]"),
        ({"vocab": 11}, r"unknown=\['vocab'\]"),
        ({"kind": "ut_decoder"}, r"missing=\['cross'\]"),
        (WHOLE | {"kind": "ut_full_lm", "cross": True}, "cross=True"),
        (HALTING | {"act_type": "random"}, "act_type='random'"),
        ({"hidden": 5}, "hidden_size=5"),
    ],
)
def test_what_has_no_counterpart_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings(CFG | changes)


def test_a_setting_that_is_missing_is_refused():
    with pytest.raises(ValueError, match=r"missing=\['ln_eps'\]"):
        read_settings({name: value for name, value in CFG.items() if name != "ln_eps"})


def test_weights_come_where_they_belong():
    given = weights(num_blocks=2)
    model = convert_tensor2tensor(CFG | {"blocks_per_step": 2}, given)
    assert not model.training
    state_dict = model.state_dict()
    for ours, theirs in {
        "encoder.group.1.self_attention.k_proj.weight": given["encoder/block1.self_attn.k.w"].T,
        "encoder.group.0.transition_norm.bias": given["encoder/block0.ffn.ln.b"],
        "encoder.group.1.transition.down_proj.weight": given["encoder/block1.ffn.w2"].T,
        "encoder.coordinates.step_embedding.weight": given["encoder/step_embed"][:, 0, 0],
        "encoder.final_norm.weight": given["encoder/final_ln.g"],
    }.items():
        assert torch.equal(state_dict[ours], theirs), ours
    assert len(rename_weights(CFG, given)) == len(given)


def test_dtype():
    assert {value.dtype for value in convert_tensor2tensor(CFG, weights(), torch.float64).parameters()} == {
        torch.float64
    }


@pytest.mark.parametrize("name", ["encoder/block0.self_attn.z.w", "encoder/sru.w", "middle/final_ln.g", "lm_head"])
def test_unknown_weights_are_refused(name):
    with pytest.raises(ValueError, match="has no counterpart"):
        convert_tensor2tensor(CFG, weights() | {name: torch.zeros(4)})


def test_weights_that_contradict_the_settings_are_refused():
    given = weights()
    with pytest.raises(ValueError, match="contradict the settings.*encoder.final_norm.bias.* are missing"):
        convert_tensor2tensor(CFG, {name: value for name, value in given.items() if name != "encoder/final_ln.b"})
    with pytest.raises(ValueError, match="contradict the settings.*group.1.* are too many"):
        convert_tensor2tensor(CFG, weights(num_blocks=2))
    with pytest.raises(ValueError, match="(?s)contradict the settings.*size mismatch"):
        convert_tensor2tensor(CFG | {"filter": 8}, given)
