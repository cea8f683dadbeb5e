"""The branches against their definition, position by position and tap by tap: results and gradients."""

import pytest
import torch
from models.evolved_transformer.gradient_tools import assert_all_close
from models.evolved_transformer.small_models import EXACT
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficient.models.evolved_transformer import conv_branches
from hf_efficient.models.evolved_transformer.conv_branches import (
    FEW_PRODUCTS,
    decoder_branches,
    depthwise_convolution,
    encoder_branches,
    full_convolution,
    separable_convolution,
)
from hf_efficient.models.evolved_transformer.conv_branches_reference import (
    convolution_reference,
    decoder_branches_reference,
    encoder_branches_reference,
    separable_convolution_reference,
)

WIDTH, EPSILON = 6, 1e-2
# Pads before, behind, on both sides, in the middle, nowhere, everywhere.
MASKS = [
    [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
    [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1] * 13,
    [0] * 13,
]
# Shorter than the kernels, as long, longer.
LENGTHS = [1, 2, 4, 5, 9, 11, 13]


@pytest.fixture(params=[False, True], ids=["convolved", "summed"])
def form(request, monkeypatch):
    """Either of the two ways to compute a depthwise convolution, whatever its size."""
    monkeypatch.setattr(conv_branches, "FEW_PRODUCTS", 2**40 if request.param else 0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def separable_weights(in_channels: int, out_channels: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(in_channels, 1, width), draw(out_channels, in_channels), draw(out_channels)


def encoder_weights() -> dict[str, tuple]:
    return {
        "dense": (draw(4 * WIDTH, WIDTH), draw(4 * WIDTH)),
        "convolution": (draw(WIDTH // 2, WIDTH, 3), draw(WIDTH // 2)),
        "norm": (draw(4 * WIDTH), draw(4 * WIDTH)),
        "separable": separable_weights(4 * WIDTH, WIDTH // 2, 9),
    }


def decoder_weights() -> dict[str, tuple]:
    return {
        "separable_11": separable_weights(WIDTH, 2 * WIDTH, 11),
        "separable_7": separable_weights(WIDTH, WIDTH // 2, 7),
        "norm": (draw(2 * WIDTH), draw(2 * WIDTH)),
        "separable_out": separable_weights(2 * WIDTH, WIDTH, 7),
    }


def norm_map(weights: tuple[Tensor, Tensor]):
    return lambda rows: F.layer_norm(rows, weights[0].shape, *weights, EPSILON)


def run_encoder(rows: Tensor, weights: dict[str, tuple], row_mask: Tensor | None) -> Tensor:
    return encoder_branches(
        rows,
        dense=lambda rows: F.linear(rows, *weights["dense"]),
        convolution=lambda rows: full_convolution(rows, *weights["convolution"], padding=1),
        norm=norm_map(weights["norm"]),
        separable=lambda rows: separable_convolution(rows, *weights["separable"]),
        row_mask=row_mask,
    )


def run_decoder(rows: Tensor, weights: dict[str, tuple], row_mask: Tensor | None, state=None):
    def without_padding(depthwise: Tensor, pointwise: Tensor, bias: Tensor):
        return lambda rows: F.linear(depthwise_convolution(rows, depthwise), pointwise, bias)

    maps = {name: without_padding(*parts) for name, parts in weights.items() if name != "norm"}
    return decoder_branches(rows, norm=norm_map(weights["norm"]), state=state, row_mask=row_mask, **maps)


def with_epsilon(weights: dict[str, tuple]) -> dict[str, tuple]:
    return weights | {"norm": (*weights["norm"], EPSILON)}


def gradients(output: Tensor, rows: Tensor, weights: dict[str, tuple]) -> dict[str, Tensor]:
    named = {"rows": rows} | {f"{name}.{i}": part for name, parts in weights.items() for i, part in enumerate(parts)}
    cotangent = torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape)
    return dict(zip(named, torch.autograd.grad((output * cotangent).sum(), list(named.values())), strict=True))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [1, 3, 7, 9, 11])
@pytest.mark.parametrize("is_causal", [False, True])
def test_separable_convolution_is_the_sum_over_its_taps(is_causal, width, length, form):
    rows, weights = draw(2, length, 4), separable_weights(4, 3, width)
    output = separable_convolution(rows, *weights, is_causal=is_causal)
    expected = separable_convolution_reference(rows, *weights, is_causal=is_causal)
    torch.testing.assert_close(output, expected, **EXACT)
    parts = {"w": weights}
    assert_all_close(gradients(output, rows, parts), gradients(expected, rows, parts), **EXACT)


@pytest.mark.parametrize("length", LENGTHS)
def test_convolution_is_the_sum_over_its_taps(length):
    rows, weights = draw(2, length, 4), (draw(3, 4, 3), draw(3))
    output, expected = full_convolution(rows, *weights, padding=1), convolution_reference(rows, *weights, num_before=1)
    torch.testing.assert_close(output, expected, **EXACT)
    parts = {"w": weights}
    assert_all_close(gradients(output, rows, parts), gradients(expected, rows, parts), **EXACT)


@pytest.mark.parametrize("cut", [1, 4, 10, 12])
def test_separable_convolution_goes_on_from_a_state(cut, form):
    rows, weights = draw(2, 13, 4), separable_weights(4, 3, 7)
    expected = separable_convolution(rows, *weights, is_causal=True)[:, cut:]
    state = F.pad(rows, (0, 0, 6, 0))[:, cut : cut + 6]
    output = separable_convolution(rows[:, cut:], *weights, state=state, is_causal=True)
    torch.testing.assert_close(output, expected, **EXACT)


def test_what_makes_no_sense_is_refused():
    rows, weights = draw(2, 5, 4), separable_weights(4, 3, 4)
    with pytest.raises(ValueError, match="depthwise is 4 wide.*odd width, or is_causal=True"):
        separable_convolution(rows, *weights)
    with pytest.raises(ValueError, match="state holds earlier rows, but is_causal=False"):
        separable_convolution(rows, *weights, state=rows[:, :3])


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_branches_are_what_is_defined(kind, form):
    row_mask = torch.tensor(MASKS)
    rows = draw(len(MASKS), 13, WIDTH)
    if kind == "encoder":
        weights = encoder_weights()
        output = F.pad(run_encoder(rows, weights, row_mask.bool()), (0, WIDTH // 2))
        expected = encoder_branches_reference(rows, **with_epsilon(weights), row_mask=row_mask)
    else:
        weights = decoder_weights()
        output, _ = run_decoder(rows, weights, row_mask.bool())
        expected = decoder_branches_reference(rows, **with_epsilon(weights), row_mask=row_mask)
    torch.testing.assert_close(output, expected, **EXACT)
    assert_all_close(gradients(output, rows, weights), gradients(expected, rows, weights), **EXACT)


@pytest.mark.parametrize("length", LENGTHS)
def test_branches_of_rows_of_any_length(length):
    rows, everything = draw(2, length, WIDTH), torch.ones(2, length)
    weights = encoder_weights()
    expected = encoder_branches_reference(rows, **with_epsilon(weights), row_mask=everything)
    torch.testing.assert_close(run_encoder(rows, weights, None), expected[..., : WIDTH // 2], **EXACT)
    weights = decoder_weights()
    expected = decoder_branches_reference(rows, **with_epsilon(weights), row_mask=everything)
    torch.testing.assert_close(run_decoder(rows, weights, None)[0], expected, **EXACT)


@pytest.mark.parametrize("sizes", [[1] * 13, [3, 1, 9], [12, 1], [2, 11]], ids=["tokens", "chunks", "last", "first"])
def test_decoder_branches_go_on_from_their_state(sizes, form):
    rows, weights, row_mask = draw(len(MASKS), 13, WIDTH), decoder_weights(), torch.tensor(MASKS).bool()
    expected, _ = run_decoder(rows, weights, row_mask)
    state, outputs = None, []
    for part, part_mask in zip(rows.split(sizes, dim=1), row_mask.split(sizes, dim=1), strict=True):
        output, seen = run_decoder(part, weights, part_mask, state)
        outputs.append(output)
        state = (seen[0][:, -10:], seen[1][:, -6:])
        assert [tuple(one.shape[1:]) for one in state] == [(10, WIDTH), (6, 2 * WIDTH)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **EXACT)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_what_stands_at_pads_does_not_matter(kind, value):
    rows, row_mask = torch.randn(len(MASKS), 13, WIDTH, dtype=torch.float64), torch.tensor(MASKS).bool()
    spoilt = rows.masked_fill(~row_mask[..., None], value)
    weights = encoder_weights() if kind == "encoder" else decoder_weights()
    outputs = []
    for given in (rows, spoilt):
        output = (
            run_encoder(given, weights, row_mask) if kind == "encoder" else run_decoder(given, weights, row_mask)[0]
        )
        outputs.append(output[row_mask])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_dropout_is_of_both_branches(kind):
    """With what leaves the branches dropped, and only that, the inner rows are what LayerNorm makes of zeros."""
    seen = []

    class Probe(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            seen.append(rows)
            return rows

    wide, narrow = nn.Linear(4, 16), nn.Linear(4, 2)
    rows = torch.randn(3, 500, 4)
    if kind == "encoder":
        encoder_branches(rows, wide, narrow, Probe(), nn.Identity(), dropout=0.25)
        kept = [F.relu(wide(rows)), F.relu(narrow(rows))]
    else:

        def cut(module):
            return lambda rows: module(rows[:, -500:])

        decoder_branches(rows, cut(wide), cut(narrow), Probe(), nn.Identity(), dropout=0.25)
        kept = [F.relu(wide(rows)), narrow(rows)]
    (inner,) = seen
    possible = [torch.stack([torch.zeros_like(value), value / 0.75]) for value in kept]
    alone = inner[..., 2:]
    assert ((possible[0][..., 2:] - alone).abs().min(dim=0).values < 1e-5).all()
    both = (possible[0][:, None, ..., :2] + possible[1][None]).flatten(0, 1)
    assert ((both - inner[..., :2]).abs().min(dim=0).values < 1e-5).all()
    positive = kept[0][..., 2:] > 0
    assert (alone[positive] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_few_rows_and_many_give_the_same():
    """The two forms meet at a number of products."""
    weight = draw(64, 1, 11)
    many = FEW_PRODUCTS // weight.numel() + 3
    rows = torch.randn(1, many + 10, 64, dtype=torch.float64)
    expected = depthwise_convolution(rows, weight)
    parts = [depthwise_convolution(rows[:, start : start + 11], weight) for start in range(many)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_are_kept(dtype, form):
    rows = torch.randn(2, 13, 4, dtype=dtype)
    weights = [part.detach().to(dtype) for part in separable_weights(4, 3, 7)]
    output = separable_convolution(rows, *weights, is_causal=True)
    assert output.dtype == dtype
    exact = separable_convolution_reference(rows.double(), *(part.double() for part in weights), is_causal=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)
