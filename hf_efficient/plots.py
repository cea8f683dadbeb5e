"""Pictures of runs: the loss curve, and what memory is worth. Needs matplotlib: the extra `plots`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("hf_efficient.plots needs matplotlib: pip install 'hf_efficient[plots]'") from error

BLUE, ORANGE, GREY = "#2563a8", "#d95f02", "#6b7280"


def plot_loss(history: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the loss of training, and of validation where it was measured, against updates.

    history: a trainer's log: mappings with "step" and "loss" or "eval_loss", in nats per token.

    Raises ValueError if there is no loss in it.
    """
    history = list(history)
    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if not training:
        raise ValueError("history holds no entry with 'loss': log at least once, by a smaller logging_steps.")
    figure, axes = _canvas("Loss while training", "updates", "loss (nats per token)")
    axes.plot(*zip(*training, strict=True), color=BLUE, linewidth=1.6, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color=ORANGE, marker="o", markersize=5, label="validation")
        axes.legend(frameon=False)
    figure.savefig(path)


def plot_memory(curve: Iterable[Mapping[str, Any]], path: str | Path, trained_mem_len: int) -> None:
    """Draw what a longer memory is worth: bits per byte of one model on one text, against the memory it read with.

    curve: mappings with "mem_len" (0: none) and "bits_per_byte". trained_mem_len: the memory length of training.

    Raises ValueError if there are fewer than two points.
    """
    points = sorted((entry["mem_len"], entry["bits_per_byte"]) for entry in curve)
    if len(points) < 2:
        raise ValueError(f"curve has {len(points)} point(s): measure at two memory lengths or more.")
    lengths, bits = zip(*points, strict=True)
    figure, axes = _canvas("What memory is worth", "memory while reading (tokens)", "bits per byte, held-out text")
    # Lengths grow by doubling; 0 has its place at the left.
    places = range(len(points))
    axes.plot(places, bits, color=BLUE, marker="o", markersize=6, linewidth=1.8)
    axes.set_xticks(places, ["none" if length == 0 else str(length) for length in lengths])
    axes.margins(x=0.1, y=0.18)
    label = {
        "textcoords": "offset points",
        "color": GREY,
        "size": 9,
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
    }
    for place, value in zip(places, bits, strict=True):
        axes.annotate(f"{value:.3f}", (place, value), (9, 9), **label)
    if trained_mem_len in lengths:
        place = lengths.index(trained_mem_len)
        axes.plot(place, bits[place], "o", color=ORANGE, markersize=9, label="memory in training", zorder=3)
        axes.legend(frameon=False)
    figure.savefig(path)


def _canvas(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
