"""Penn Treebank, words: the same small Transformer-XL trained with carried memory (ours) and without (peer)."""

import os
import tempfile
from typing import Any

from harness import CheckFailed, Row, Settings, Side, Worker, make_row, report_progress

TARGETS = {"perplexity": "lower with memory"}

SEGMENT_LEN, MEM_LEN, LANES, STEPS = 16, 64, 64, 400
MODEL = {
    "hidden_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 800,
    "pre_norm": True,
    "dropout": 0.1,
}
TRAINING = {
    "max_steps": STEPS,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "max_grad_norm": 0.25,
    "logging_steps": 50,
}
CASES = {"seed 0": 0, "seed 1": 1}


def measure(case: str, settings: Settings) -> Row:
    """Train twice, test each with and without memory.

    Raises:
        ValueError: no `data` folder in the settings.
        CheckFailed: the two runs do not start from the same weights and texts.
    """
    if settings.data is None:
        raise ValueError(
            "ptb_memory needs the folder with ptb.train.txt and ptb.test.txt (or .gz): give --data FOLDER."
        )
    options = {
        "data": os.path.abspath(settings.data),
        "model": MODEL,
        "training": TRAINING | {"seed": CASES[case]},
        "segment_len": SEGMENT_LEN,
        "lanes": LANES,
    }
    runs = {}
    for side, mem_len in (("ours", MEM_LEN), ("peer", 0)):
        report_progress(f"ptb_memory/{case}: training with mem_len={mem_len}, {STEPS} steps")
        with tempfile.TemporaryDirectory() as folder:
            run_options = options | {"mem_len": mem_len, "folder": folder}
            runs[side] = train_and_test(Side("ptb_sides", "TrainOnPtb", run_options), settings)
    if runs["ours"]["start"] != runs["peer"]["start"]:
        raise CheckFailed(f"The runs differ before the first step: {runs['ours']['start']}, {runs['peer']['start']}.")
    perplexity = {
        "trained with memory": runs["ours"]["perplexity"],
        "trained without memory": runs["peer"]["perplexity"],
    }
    return make_row(
        f"ptb_memory/{case}",
        {side: [run["train"]["seconds_per_step"]] for side, run in runs.items()},
        {side: run["memory"] for side, run in runs.items()},
        {
            "peer": "ours with mem_len=0, all else equal",
            "unit": "training step",
            "threads": settings.threads,
            **MODEL,
            **TRAINING,
            "seed": CASES[case],
            "segment_len": SEGMENT_LEN,
            "mem_len": MEM_LEN,
            "batch_size": LANES,
        },
        {side: run["versions"] for side, run in runs.items()},
        {
            "test_perplexity": perplexity,
            "mean_training_loss": {side: round(run["train"]["loss"], 4) for side, run in runs.items()},
            "check": {"same start": runs["ours"]["start"]},
        },
    )


def train_and_test(side: Side, settings: Settings) -> dict[str, Any]:
    """One training in a process of its own."""
    with Worker(side, settings.threads, is_talkative=True) as worker:
        start = worker.call("describe")
        trained = worker.call("train")
        memory = worker.memory()
        perplexity = {
            name: round(worker.call("test_perplexity", mem_len=mem_len), 2)
            for name, mem_len in (("with memory", MEM_LEN), ("without memory", 0))
        }
        versions = worker.versions()
    memory["mb"] = memory["process_mb"] - memory["library_mb"]
    return {"start": start, "train": trained, "memory": memory, "perplexity": perplexity, "versions": versions}
