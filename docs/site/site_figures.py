"""Figures of the pages on performance and on choosing, drawn from benchmarks/results while the site is built."""

import io

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from site_blocks import rows_of

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d95f02", "#2e8b57", "#6b7280"
LIGHT_ORANGE = "#f0a868"


def figures() -> dict[str, bytes]:
    """All figures as SVG, by their places on the site."""
    drawn = {
        "reformer_vs_sdpa": reformer_against_length(),
        "reformer_depth_memory": reformer_against_depth(),
        "translation": translators_against_time(),
        "ut_act_speed": time_against_ponder_time(),
    }
    return {f"figures/{name}.svg": svg(figure) for name, figure in drawn.items()}


def svg(figure: Figure) -> bytes:
    """The figure as a file that is the same on every build."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "hf_efficient"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def canvas(num_panels: int) -> tuple[Figure, list]:
    """An empty figure of `num_panels` axes side by side."""
    figure = Figure(figsize=(4.6 * num_panels, 3.6), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, panels


def reformer_against_length() -> Figure:
    """Time and memory of a training step with hashed attention, and of a Llama's with exact attention, by length."""
    rows = rows_of("reformer_vs_sdpa")
    lengths = [row["config"]["length"] for row in rows]
    figure, panels = canvas(2)
    for axes, field, label in zip(panels, ("s", "mb"), ("seconds per training step", "peak memory, MB"), strict=True):
        axes.loglog(lengths, [row[f"ours_{field}"] for row in rows], "o-", color=BLUE, label="Reformer, hashed")
        axes.loglog(lengths, [row[f"peer_{field}"] for row in rows], "s-", color=ORANGE, label="Llama, exact")
        axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths], minor=False)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
    panels[0].legend(frameon=False)
    return figure


def reformer_against_depth() -> Figure:
    """Peak memory of a training pass with few layers and with many."""
    rows = rows_of("reformer_depth_memory")
    figure, (axes,) = canvas(1)
    names = [row["name"].split("/", 1)[1] for row in rows]
    config = rows[0]["config"]
    few, many = config["peer"].removeprefix("the same model with "), f"{len(config['attn_layers'])} layers"
    places = range(len(rows))
    axes.barh([p - 0.2 for p in places], [row["peer_mb"] for row in rows], 0.38, color=GREY, label=few)
    axes.barh([p + 0.2 for p in places], [row["ours_mb"] for row in rows], 0.38, color=BLUE, label=many)
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("peak memory, MB")
    axes.legend(frameon=False)
    return figure


def time_against_ponder_time() -> Figure:
    """Time of a pass with halting, as a share of the time without, by the share of the steps that were taken."""
    rows = [row for row in rows_of("ut_act_speed") if row["config"]["halted_keys"] == "refresh"]
    figure, (axes,) = canvas(1)
    kinds = {"forward": ("o", BLUE), "forward and backward": ("s", ORANGE)}
    for kind, (marker, color) in kinds.items():
        of_kind = [row for row in rows if row["name"].endswith(f", {kind}")]
        steps = [row["config"]["mean_ponder_time"] / row["config"]["max_steps"] for row in of_kind]
        axes.plot(steps, [row["ours_s"] / row["peer_s"] for row in of_kind], marker, color=color, label=kind)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="proportional")
    axes.set_xlabel("mean ponder time / steps allowed")
    axes.set_ylabel("time / time without halting")
    axes.legend(frameon=False)
    return figure


def translators_against_time() -> Figure:
    """Loss in training by CPU seconds, and BLEU at the end; one seed of each model."""
    colors = {
        "Transformer, 2 + 2 layers": ORANGE,
        "Transformer with LayerNorm in front, 2 + 2 layers": LIGHT_ORANGE,
        "Evolved Transformer, 1 + 1 blocks": BLUE,
        "Universal Transformer, 3 steps": GREEN,
        "Reformer, 2 + 2 layers": GREY,
    }
    rows = {row["row"]: row for row in rows_of("reproductions/translation") if row["seed"] == 0}
    figure, (losses, scores) = canvas(2)
    for name, color in colors.items():
        training, bleu = rows[name]["training"], rows[name]["results"]["bleu"]["4"]
        seconds = [point["step"] * training["seconds"] / training["steps"] for point in training["curve"]]
        losses.plot(seconds, [point["loss"] for point in training["curve"]], color=color, label=name.partition(",")[0])
        scores.plot(training["seconds"], bleu, "o", color=color)
    losses.set_ylim(2.6, 5)
    losses.set_xlabel("CPU seconds of training")
    losses.set_ylabel("loss in training, nats per token")
    losses.legend(frameon=False, fontsize="small")
    scores.set_ylim(bottom=0)
    scores.set_xlabel("CPU seconds of training")
    scores.set_ylabel("BLEU, 4 beams")
    return figure
