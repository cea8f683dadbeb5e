"""Pictures of runs: curves of loss and BLEU, attention, what memory is worth, where a model ponders.

Needs matplotlib: extra `plots`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("hf_efficient.plots needs matplotlib: pip install 'hf_efficient[plots]'") from error

BLUE, ORANGE, GREY = "#2563a8", "#d95f02", "#6b7280"
SHADES = LinearSegmentedColormap.from_list("shades", ["white", BLUE])


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


def plot_translation(history: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the course of a training in translation: loss on the left, BLEU of the validation set on the right.

    history: a trainer's log: mappings with "step" and "loss", "eval_loss" or "eval_bleu".

    Raises ValueError if there is no loss of training, or no BLEU, in it.
    """
    history = list(history)
    curves = {
        name: [(entry["step"], entry[name]) for entry in history if name in entry]
        for name in ("loss", "eval_loss", "eval_bleu")
    }
    for name, mend in (("loss", "a smaller logging_steps"), ("eval_bleu", "predict_with_generate=True")):
        if not curves[name]:
            raise ValueError(f"history holds no entry with {name!r}: it needs {mend}.")
    figure = Figure(figsize=(9, 3.8), dpi=144, layout="constrained")
    left, right = figure.subplots(1, 2)
    _dress(left, "Loss while training", "updates", "nats per token")
    _dress(right, "BLEU of the validation set", "updates", "BLEU, greedy")
    left.plot(*zip(*curves["loss"], strict=True), color=BLUE, linewidth=1.6, label="training")
    if curves["eval_loss"]:
        left.plot(*zip(*curves["eval_loss"], strict=True), color=ORANGE, marker="o", markersize=5, label="validation")
        left.legend(frameon=False)
    right.plot(*zip(*curves["eval_bleu"], strict=True), color=ORANGE, marker="o", markersize=5)
    right.set_ylim(bottom=0)
    figure.savefig(path)


def plot_attention(
    maps: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[str], Sequence[str]]], path: str | Path
) -> None:
    """Draw attention weights, one map beside the other: a row for each token that looks, the darker the more it sees.

    maps: title to weights (rows, columns) from 0 to 1, the tokens that look (rows), and those looked at (columns).

    Raises ValueError if there is no map, or one has not as many rows and columns as tokens.
    """
    if not maps:
        raise ValueError("maps is empty: give at least one title with its weights and tokens.")
    figure = Figure(figsize=(4.6 * len(maps), 4.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (title, (weights, rows, columns)) in zip(panels, maps.items(), strict=True):
        if len(weights) != len(rows) or any(len(row) != len(columns) for row in weights):
            shape = (len(weights), *{len(row) for row in weights})
            raise ValueError(f"maps[{title!r}] has weights {shape} for {len(rows)} by {len(columns)} tokens.")
        axes.pcolormesh([[float(weight) for weight in row] for row in weights], cmap=SHADES, vmin=0.0, vmax=1.0)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        places = [place + 0.5 for place in range(max(len(rows), len(columns)))]
        axes.set_xticks(places[: len(columns)], columns, rotation=90, fontsize=8)
        axes.set_yticks(places[: len(rows)], rows, fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(length=0)
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
    label: dict[str, Any] = {
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


def plot_halting_map(
    tokens: Sequence[str], ponder_times: Iterable[float], path: str | Path, max_steps: int | None = None
) -> None:
    """Draw how many steps each token of a text took: a column per token, as high as its ponder time.

    tokens: the text's tokens, from left to right. ponder_times: steps of each, a row of a model's `ponder_times`;
    a 0 is a pad, and is left out with its token. max_steps: the model's limit, drawn as the top of the map.

    Raises ValueError if there is not one number per token, or no token but pads.
    """
    times = [float(time) for time in ponder_times]
    if len(times) != len(tokens):
        raise ValueError(f"ponder_times has {len(times)} numbers for {len(tokens)} tokens: give one for each.")
    columns = [(token, time) for token, time in zip(tokens, times, strict=True) if time > 0]
    if not columns:
        raise ValueError("ponder_times holds no token that took a step: give the row of a text, not of pads alone.")
    names, times = map(list, zip(*columns, strict=True))
    num_steps = max(math.ceil(max(times)), max_steps or 0)
    figure, axes = _canvas("Where the model ponders", "", "steps", width=max(3.5, 1.6 + 0.34 * len(names)))
    cells = [[1.0 if step < time else 0.0 for time in times] for step in range(num_steps)]
    # Deeper steps are darker, so that the eye finds the tokens that took them.
    shades = [[cell * (0.35 + 0.65 * (step + 1) / num_steps) for cell in row] for step, row in enumerate(cells)]
    axes.pcolormesh(shades, cmap=SHADES, vmin=0.0, vmax=1.0, edgecolors="white", linewidth=1.5)
    axes.set_xticks(
        [place + 0.5 for place in range(len(names))], names, rotation=60, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks([step + 0.5 for step in range(num_steps)], [str(step + 1) for step in range(num_steps)])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    figure.savefig(path)


def plot_ponder_histogram(ponder_times: Iterable[float], path: str | Path, max_steps: int | None = None) -> None:
    """Draw how many tokens took how many steps, and their mean.

    ponder_times: steps of all tokens, a model's `ponder_times` flattened; 0 is a pad and is left out. max_steps: the
    model's limit, the last place of the axis.

    Raises ValueError if there is no token but pads.
    """
    times = [float(time) for time in ponder_times if time > 0]
    if not times:
        raise ValueError("ponder_times holds no token that took a step: give those of texts, not of pads alone.")
    last = max(math.ceil(max(times)), max_steps or 0)
    mean = sum(times) / len(times)
    figure, axes = _canvas("How long tokens are pondered", "steps", "share of the tokens")
    edges = [step + 0.5 for step in range(last + 1)]
    share = [1 / len(times)] * len(times)
    axes.hist(times, bins=edges, weights=share, color=BLUE, rwidth=0.82)
    axes.axvline(mean, color=ORANGE, linewidth=1.8, label=f"mean {mean:.2f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.4, last + 0.6)
    axes.legend(frameon=False)
    figure.savefig(path)


def _canvas(title: str, x_label: str, y_label: str, width: float = 7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.2), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, title, x_label, y_label)
    return figure, axes


def _dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels and lines as in all pictures."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
