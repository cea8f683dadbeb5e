"""Run a script of `examples/` and keep what came out, for its card.

python model_cards/record_script.py reformer_duplication examples/reformer_duplication.py --max_steps 500

The first word names the card, the rest is the script's command line. What the script prints, its trainer's log, the
number of parameters, seconds, machine and versions go to `model_cards/records/NAME.json`.
"""

import ast
import contextlib
import io
import json
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "benchmarks"))

from harness import describe_machine, today  # noqa: E402 (needs the folder just added)
from worker import installed_versions  # noqa: E402


class Recorder(TrainerCallback):
    """Keeps the log of the training that ended last."""

    figures: dict[str, Any] = {}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Called by the trainer."""
        Recorder.figures = {
            "parameters": model.num_parameters(),
            "steps": state.global_step,
            "history": [entry for entry in state.log_history if "loss" in entry],
        }


class Tee(io.StringIO):
    """Shows what is written to it, and keeps it."""

    def write(self, text: str) -> int:
        """Write to both."""
        sys.__stdout__.write(text)
        return super().write(text)


def first_line(script: Path) -> str:
    """The first line of the script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text("utf-8"))) or "").partition("\n")[0]


def main(name: str, script: str, *options: str) -> int:
    """Run the script in this process, its model in a folder that is thrown away."""
    original = Trainer.__init__

    def with_recorder(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        trainer.add_callback(Recorder)

    Trainer.__init__ = with_recorder
    output, start = Tee(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output):
        sys.argv = [script, *options, "--output_dir", folder]
        runpy.run_path(script, run_name="__main__")
    record = {
        "command": " ".join(["python", script, *options]),
        "description": first_line(Path(script)),
        "output": without_log(output.getvalue()),
        "seconds": round(time.perf_counter() - start, 1),
        **Recorder.figures,
        "hardware": f"{describe_machine()['cpu']}, {torch.get_num_threads()} threads",
        "versions": installed_versions(),
        "date": today(),
    }
    (HERE / "records" / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


def without_log(output: str) -> str:
    """What a script printed, but for the lines in which the trainer logs."""
    return "\n".join(line for line in output.splitlines() if not line.strip().startswith("{'"))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
