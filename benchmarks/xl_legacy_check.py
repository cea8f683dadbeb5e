"""Checks that our Transformer-XL and the legacy one compute the same thing from the same checkpoint."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from harness import CheckFailed, Settings, Side, Worker
from legacy import legacy_python

OURS, LEGACY = "transformer_xl_ours", "transformer_xl_legacy"
# float32 with sums in another order; measured differences are ten times smaller.
LOG_PROB_TOLERANCE = 2e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# A ReLU whose input is zero up to rounding may open on one side only; one of half a million moves its matrix's
# gradient by 2e-3. A gradient that is wrong is wrong by more than half.
OUTLIER_TOLERANCE = 1e-2


def check_decode(
    model: dict[str, Any], batch_size: int, prompt_len: int, steps: int, settings: Settings
) -> dict[str, Any]:
    """Compare the log-probabilities after the prompt and some single tokens; returns the largest difference.

    Raises:
        CheckFailed: it exceeds `LOG_PROB_TOLERANCE`.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(model, folder, settings)
        options = {"model": model, "batch_size": batch_size, "prompt_len": prompt_len, "checkpoint": checkpoint}
        log_probs = []
        for side in sides("Decode", options, settings):
            path = f"{folder}/{side.module}.safetensors"
            with Worker(side, settings.threads) as worker:
                worker.call("save_log_probs", path=path, steps=steps)
            log_probs.append(load_file(path)["log_probs"])
    difference = (log_probs[0] - log_probs[1]).abs().max().item()
    if not difference <= LOG_PROB_TOLERANCE:
        raise CheckFailed(
            f"Log-probabilities of ours and legacy differ by {difference:.1e} > {LOG_PROB_TOLERANCE:.0e}."
        )
    return {"largest log-probability difference": float(f"{difference:.1e}")}


def check_training(model: dict[str, Any], batch_size: int, segment_len: int, settings: Settings) -> dict[str, Any]:
    """Compare losses of two segments and all gradients of their sum, without dropout; returns the largest differences.

    Gradients are compared by the norm of the difference over the norm, parameter by parameter: half of them within
    `GRADIENT_TOLERANCE`, all of them within `OUTLIER_TOLERANCE`.

    Raises:
        CheckFailed: a loss or a gradient differs by more than its tolerance, or a legacy parameter has no counterpart.
    """
    from safetensors.torch import load_file

    model = model | {"dropout": 0.0, "dropatt": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(model, folder, settings)
        options = {"model": model, "batch_size": batch_size, "segment_len": segment_len, "checkpoint": checkpoint}
        losses, gradients = [], []
        for side in sides("TrainStep", options, settings):
            target = Path(folder) / side.module
            with Worker(side, settings.threads) as worker:
                losses.append(worker.call("save_gradients", folder=str(target), segments=2))
            gradients.append(load_file(target / "model.safetensors"))
    loss = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    missing = gradients[1].keys() - gradients[0].keys()
    if missing:
        raise CheckFailed(f"No gradient of ours has the legacy names {sorted(missing)}.")
    by_name = {
        name: ((gradients[0][name] - legacy).norm() / legacy.norm()).item() for name, legacy in gradients[1].items()
    }
    worst, median = max(by_name, key=by_name.get), statistics.median(by_name.values())
    if not (loss <= LOSS_TOLERANCE and median <= GRADIENT_TOLERANCE and by_name[worst] <= OUTLIER_TOLERANCE):
        raise CheckFailed(f"Losses differ by {loss:.1e} (relative), the gradient of {worst} by {by_name[worst]:.1e}.")
    return {
        "largest loss difference, relative": float(f"{loss:.1e}"),
        "largest gradient difference, relative": float(f"{by_name[worst]:.1e}"),
        "median gradient difference, relative": float(f"{median:.1e}"),
        "gradients compared": len(by_name),
    }


def save_checkpoint(model: dict[str, Any], folder: str, settings: Settings) -> str:
    """Make random weights and save them in the legacy format; returns their folder."""
    target = f"{folder}/checkpoint"
    with Worker(Side(LEGACY, "Checkpoint", {"model": model}, legacy_python(settings.legacy_python)), 1) as worker:
        worker.call("save", folder=target)
    return target


def sides(name: str, options: dict[str, Any], settings: Settings) -> tuple[Side, Side]:
    """Our side and the legacy one of that name, built with the same options."""
    return Side(OURS, name, options), Side(LEGACY, name, options, legacy_python(settings.legacy_python))
