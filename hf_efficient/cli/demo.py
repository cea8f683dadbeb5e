"""`hf-efficient demo`: the whole path on real text, in a few minutes, on a CPU, without a download."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..hub import write_model_card
from ..plots import plot_memory
from .arguments import Command, CommandParser, Invocation
from .errors import CommandError
from .models import load_model, memory_settings
from .recipes import recipe_to_flags
from .report import write_report
from .scoring import score_lanes
from .train import COMMAND as TRAIN
from .train import train

# Sized for a minute or two on two cores. The segments are short beside the memory, so that what the memory is worth
# shows: without it, the first tokens of every segment have nothing before them.
RECIPE: dict[str, Any] = {
    "text": ["python-docs"],
    "tokenizer": "bpe",
    "tokenizer_vocab_size": 2048,
    "model": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "pre_norm": True,
        "mem_len": 64,
    },
    "segment_length": 16,
    "per_device_train_batch_size": 32,
    "max_steps": 1200,
    "learning_rate": 4e-3,
    "warmup_steps": 60,
    "max_grad_norm": 1.0,
    "logging_steps": 20,
    "save_strategy": "no",
}
MEMORY_LENGTHS = (0, 4, 8, 16, 32, 64, 128)
PROMPT = "If a class defines"

# All that a demo leaves behind. A folder that holds nothing else is an earlier demo's and may be replaced.
FILES = {
    *("report.json", "recipe.yaml", "run_settings.json", "README.md", "loss.png", "memory.png"),
    *("config.json", "generation_config.json", "model.safetensors", "training_args.bin"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@dataclass
class DemoOptions:
    """Flags of `hf-efficient demo`."""

    output: str = field(default="runs/demo", metadata={"help": "Folder for the model, its figures and pictures"})
    steps: int = field(default=RECIPE["max_steps"], metadata={"help": "Updates; fewer are faster and worse"})
    seed: int = field(default=42, metadata={"help": "The same seed on the same machine gives the same result"})

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CommandError(f"--steps {self.steps} must be at least 1.")


def run(invocation: Invocation) -> None:
    """Train, measure with and without memory, and let a new process load the model and write."""
    (options,) = invocation.options
    folder = Path(options.output)
    clear_earlier_demo(folder)
    print("Training a small Transformer-XL on the Python language reference, which comes with Python.")
    flags = recipe_to_flags(RECIPE | {"output_dir": str(folder), "max_steps": options.steps, "seed": options.seed})
    training = replace(CommandParser(TRAIN).read(flags), command_line=invocation.command_line)
    report = train(training)

    print("Reading held-out text with memories of different lengths.")
    report |= measure_memory(folder, training)
    print("A new process loads the saved model and writes:\n")
    report["sample"] = write_sample(folder, options.seed)
    print(report["sample"] + "\n")

    write_report(folder, report)
    plot_memory(report["memory_curve"], folder / "memory.png", RECIPE["model"]["mem_len"])
    write_model_card(folder, license="apache-2.0")
    print(summary(report, folder))


def clear_earlier_demo(folder: Path) -> None:
    """Make room for the demo. Raises CommandError, having removed nothing, if the folder holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--output '{folder}' is a file; give the path of a folder.")
    present = list(folder.iterdir()) if folder.is_dir() else []
    strangers = sorted(path.name for path in present if path.name not in FILES)
    if strangers or (present and not (folder / "run_settings.json").is_file()):
        held = strangers[0] if strangers else present[0].name
        raise CommandError(f"--output '{folder}' holds '{held}', which is not from a demo; choose another folder.")
    for path in present:
        path.unlink()


def measure_memory(folder: Path, training: Invocation) -> dict[str, Any]:
    """Bits per byte of the saved model on the validation text, for several memory lengths and the same segments."""
    options, args = training.options
    model, tokenizer = load_model(str(folder), args.device.type)
    documents = options.read("validation")
    lanes = options.cut(documents, tokenizer, args.eval_batch_size, options.segment_length)
    curve = []
    for mem_len in MEMORY_LENGTHS:
        with memory_settings(model.config, mem_len=mem_len):
            score = score_lanes(model, lanes, carry_memory=mem_len > 0, progress=f"memory {mem_len}")
        curve.append({"mem_len": mem_len, "bits_per_byte": score.bits_per_byte})
    by_length = {point["mem_len"]: point["bits_per_byte"] for point in curve}
    return {
        "bits_per_byte_with_memory": by_length[RECIPE["model"]["mem_len"]],
        "bits_per_byte_without_memory": by_length[0],
        "memory_curve": curve,
    }


def write_sample(folder: Path, seed: int) -> str:
    """What `hf-efficient generate`, in a process of its own, makes of the prompt."""
    command = [sys.executable, "-m", "hf_efficient.cli", "generate", str(folder), PROMPT, f"--seed={seed}"]
    finished = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if finished.returncode != 0:
        raise CommandError(f"the saved model does not load in a new process: {finished.stderr.strip()}")
    return finished.stdout.strip()


def summary(report: dict[str, Any], folder: Path) -> str:
    """What the demo prints at its end."""
    with_memory, without = report["bits_per_byte_with_memory"], report["bits_per_byte_without_memory"]
    return "\n".join(
        [
            f"Bits per byte of held-out text: {with_memory:.3f} with memory, {without:.3f} without.",
            f"{report['train_tokens']:,} tokens in {report['train_seconds']:.0f} s "
            f"({report['tokens_per_second']:,.0f} tokens/s, {report['peak_memory_mb']:,.0f} MB).",
            f"{folder} holds the model, its card (README.md), report.json, loss.png and memory.png. Try it:",
            f'  hf-efficient generate {folder} "A class definition"',
        ]
    )


COMMAND = Command(
    name="demo",
    description=(
        "Train a small Transformer-XL on the Python language reference, measure it with and without memory, save it, "
        "load it in a new process and let it write. Two CPU cores need less than three minutes; nothing is downloaded."
    ),
    usage="hf-efficient demo [--output FOLDER] [--flag value ...]",
    examples="""\
  hf-efficient demo
  hf-efficient demo --output runs/quick --steps 50""",
    options=(DemoOptions,),
    run=run,
)
