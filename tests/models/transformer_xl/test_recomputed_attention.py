"""Relative attention that keeps no scores: tiles, dropped weights and memory kept for the backward pass."""

import pytest
import torch

from hf_efficient.models.transformer_xl import recomputed_attention
from hf_efficient.models.transformer_xl.recomputed_attention import recomputed_relative_attention
from hf_efficient.models.transformer_xl.relative_attention import memory_attention_mask, relative_attention

BATCH, HEADS, HEAD_DIM = 2, 4, 3
QUERY_LEN, KEY_LEN = 7, 12
SCALING = HEAD_DIM**-0.5


def draw(num_rows: int = KEY_LEN + 1) -> list[torch.Tensor]:
    """Both queries, key, value and position table in float64, so that only the method can differ."""
    shapes = [(BATCH, HEADS, QUERY_LEN, HEAD_DIM)] * 2 + [(BATCH, HEADS, KEY_LEN, HEAD_DIM)] * 2
    shapes.append((HEADS, num_rows, HEAD_DIM))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def mask() -> torch.Tensor:
    row_lengths = torch.tensor([KEY_LEN - QUERY_LEN, 2])
    return memory_attention_mask(QUERY_LEN, KEY_LEN - QUERY_LEN, row_lengths, None, torch.device("cpu"))


def shrink_tiles(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(recomputed_attention, "CPU_TILE_SCORES", scores)
    monkeypatch.setattr(recomputed_attention, "MIN_TILE_QUERIES", 2)


@pytest.mark.parametrize("num_rows", [KEY_LEN + 1, 5], ids=["all_distances", "clamped"])
@pytest.mark.parametrize("scores", [1, 100, 400, 10**6], ids=["query_blocks", "blocks", "heads", "one_tile"])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, scores: int, num_rows: int):
    """Every way to cut heads and queries gives what the form with all scores gives, gradients too."""
    tensors = draw(num_rows)
    content, position, key, value, table = tensors
    no_bias = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
    expected, _ = relative_attention(content, key, value, table, no_bias, no_bias, mask=mask(), implementation="eager")
    grad_output = torch.randn_like(expected)
    # In the eager form both queries are one.
    expected_grads = torch.autograd.grad((expected * grad_output).sum(), [content, key, value, table])

    shrink_tiles(monkeypatch, scores)
    output = recomputed_relative_attention(content, content * SCALING, key, value, table, mask(), SCALING)
    grads = torch.autograd.grad((output * grad_output).sum(), [content, key, value, table])
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("scores", [100, 10**6], ids=["tiles", "one_tile"])
def test_gradients_are_those_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch, scores: int, dropout: float):
    """Finite differences, with the same weights dropped each time."""
    shrink_tiles(monkeypatch, scores)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return recomputed_relative_attention(*tensors, mask(), SCALING, dropout=dropout)

    assert torch.autograd.gradcheck(attend, draw(), fast_mode=True)


def test_dropout_drops_weights_and_keeps_their_mean():
    """With values of one, an output is the sum of the kept weights over the kept share: 1 on average."""
    tensors = draw()
    tensors[3] = torch.ones_like(tensors[3])
    outputs = torch.stack(
        [recomputed_relative_attention(*tensors, mask(), SCALING, dropout=0.3).detach() for _ in range(2000)]
    )
    assert outputs[0].ne(outputs[1]).any()
    # 4 standard errors of a mean over 2000 draws of sums whose deviation is below 0.7.
    torch.testing.assert_close(outputs.mean(0), torch.ones_like(outputs[0]), atol=4 * 0.7 / 2000**0.5, rtol=0)


def test_dropout_takes_one_number_of_the_ordinary_generator():
    """The same seed drops the same weights, and what is drawn afterwards does not depend on the lengths."""
    tensors = draw()

    def attend(keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        cut = [*tensors[:2], tensors[2][:, :, -keys:], tensors[3][:, :, -keys:], tensors[4]]
        output = recomputed_relative_attention(*cut, mask()[..., -keys:], SCALING, dropout=0.5)
        return output, torch.rand(3)

    first, after_first = attend(KEY_LEN)
    again, _ = attend(KEY_LEN)
    _, after_shorter = attend(QUERY_LEN + 2)
    assert torch.equal(first, again)
    assert torch.equal(after_first, after_shorter)


def test_nothing_of_the_scores_size_is_kept():
    """What autograd saves grows with T + S, not with T * S."""
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    query_len, key_len = 64, 256
    shapes = [(1, 2, query_len, 4)] * 2 + [(1, 2, key_len, 4)] * 2 + [(2, key_len + 1, 4)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    full = memory_attention_mask(query_len, key_len - query_len, None, None, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        recomputed_relative_attention(*tensors, full, SCALING)
    # The mask is one per segment, shared by all layers, heads and rows.
    assert max(saved) == full.numel()
    assert sorted(saved)[-2] <= 2 * (key_len + 1) * 4
