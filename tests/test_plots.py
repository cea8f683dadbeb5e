"""Pictures: drawn from logs, refused without data, and asked for by name where matplotlib is missing."""

import sys
from importlib import import_module

import pytest
from matplotlib.image import imread

from hf_efficient.plots import (
    plot_attention,
    plot_halting_map,
    plot_loss,
    plot_memory,
    plot_ponder_histogram,
    plot_translation,
)

HISTORY = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.5}, {"step": 20, "eval_loss": 2.6}]
CURVE = [{"mem_len": 64, "bits_per_byte": 1.9}, {"mem_len": 0, "bits_per_byte": 2.3}]


def is_picture(path):
    pixels = imread(path)
    return pixels.ndim == 3 and min(pixels.shape[:2]) > 400 and pixels.std() > 0.01


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1]])
def test_loss_curve(tmp_path, history):
    plot_loss(history, tmp_path / "loss.png")
    assert is_picture(tmp_path / "loss.png")


@pytest.mark.parametrize("scores", [HISTORY, HISTORY[:1]])
def test_course_of_a_translation(tmp_path, scores):
    plot_translation([*scores, {"step": 20, "eval_bleu": 7.5}], tmp_path / "course.png")
    assert is_picture(tmp_path / "course.png")


def test_attention_has_a_map_beside_the_other(tmp_path):
    weights = [[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]]
    panel = (weights, ["ein", "Hut"], ["a", "red", "hat"])
    plot_attention({"one": panel}, tmp_path / "1.png")
    plot_attention({"one": panel, "two": panel}, tmp_path / "2.png")
    assert is_picture(tmp_path / "1.png")
    assert imread(tmp_path / "2.png").shape[1] == 2 * imread(tmp_path / "1.png").shape[1]


@pytest.mark.parametrize("trained", [64, 48])
def test_memory_curve(tmp_path, trained):
    plot_memory(CURVE, tmp_path / "memory.png", trained)
    assert is_picture(tmp_path / "memory.png")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="logging_steps"):
        plot_loss(HISTORY[2:], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="'loss': it needs a smaller logging_steps"):
        plot_translation(HISTORY[2:], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="'eval_bleu': it needs predict_with_generate=True"):
        plot_translation(HISTORY, tmp_path / "loss.png")
    with pytest.raises(ValueError, match="maps is empty"):
        plot_attention({}, tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"maps\['one'\] has weights \(1, 2\) for 1 by 3 tokens"):
        plot_attention({"one": ([[0.5, 0.5]], ["a"], ["b", "c", "d"])}, tmp_path / "map.png")
    with pytest.raises(ValueError, match="two memory lengths"):
        plot_memory(CURVE[:1], tmp_path / "memory.png", 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_steps", [None, 6])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_halting_map(tmp_path, length, max_steps):
    tokens = [f"word{place}" for place in range(length)] + ["<pad>"]
    plot_halting_map(tokens, [*(place % 4 + 1 for place in range(length)), 0], tmp_path / "map.png", max_steps)
    assert is_picture(tmp_path / "map.png")


def test_halting_map_grows_with_the_text(tmp_path):
    for length in (5, 40):
        plot_halting_map(["word"] * length, [2.0] * length, tmp_path / f"{length}.png")
    assert imread(tmp_path / "40.png").shape[1] > 2 * imread(tmp_path / "5.png").shape[1]


@pytest.mark.parametrize("times", [[1.0], [1, 2, 2, 3, 0, 0], [3.5, 2.25]])
def test_ponder_histogram(tmp_path, times):
    plot_ponder_histogram(times, tmp_path / "histogram.png", max_steps=8)
    assert is_picture(tmp_path / "histogram.png")


def test_no_ponder_times_to_draw(tmp_path):
    with pytest.raises(ValueError, match="2 numbers for 3 tokens"):
        plot_halting_map(["a", "b", "c"], [1, 2], tmp_path / "map.png")
    for times in ([], [0.0, 0.0]):
        with pytest.raises(ValueError, match="no token that took a step"):
            plot_halting_map(["a"] * len(times), times, tmp_path / "map.png")
        with pytest.raises(ValueError, match="no token that took a step"):
            plot_ponder_histogram(times, tmp_path / "histogram.png")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "hf_efficient.plots")
    with pytest.raises(ImportError, match=r"pip install 'hf_efficient\[plots\]'"):
        import_module("hf_efficient.plots")
