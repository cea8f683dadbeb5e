"""Pictures: drawn from logs, refused without data, and asked for by name where matplotlib is missing."""

import sys
from importlib import import_module

import pytest
from matplotlib.image import imread

from hf_efficient.plots import plot_loss, plot_memory

HISTORY = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.5}, {"step": 20, "eval_loss": 2.6}]
CURVE = [{"mem_len": 64, "bits_per_byte": 1.9}, {"mem_len": 0, "bits_per_byte": 2.3}]


def is_picture(path):
    pixels = imread(path)
    return pixels.ndim == 3 and min(pixels.shape[:2]) > 400 and pixels.std() > 0.01


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1]])
def test_loss_curve(tmp_path, history):
    plot_loss(history, tmp_path / "loss.png")
    assert is_picture(tmp_path / "loss.png")


@pytest.mark.parametrize("trained", [64, 48])
def test_memory_curve(tmp_path, trained):
    plot_memory(CURVE, tmp_path / "memory.png", trained)
    assert is_picture(tmp_path / "memory.png")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="logging_steps"):
        plot_loss(HISTORY[2:], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="two memory lengths"):
        plot_memory(CURVE[:1], tmp_path / "memory.png", 64)
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "hf_efficient.plots")
    with pytest.raises(ImportError, match=r"pip install 'hf_efficient\[plots\]'"):
        import_module("hf_efficient.plots")
