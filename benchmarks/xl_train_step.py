"""Transformer-XL training step with segment 128 and memory 1,600, ours against legacy TransfoXL."""

from dataclasses import replace

from harness import Row, Settings, compare
from xl_legacy_check import check_training, sides

TARGETS = {"ratio": 3.0, "memory_ratio": 0.5}

SEGMENT_LEN, MEM_LEN = 128, 1600
COMMON = {
    "vocab_size": 5000,
    "cutoffs": [],
    "div_val": 1,
    "n_layer": 4,
    "mem_len": MEM_LEN,
    "clamp_len": -1,
    "same_length": False,
    "untie_r": True,
    "dropout": 0.1,
    "dropatt": 0.0,
}


def shape(width: int, num_heads: int, head_dim: int, inner: int) -> dict[str, int]:
    """Sizes of a layer."""
    return {"d_model": width, "d_embed": width, "n_head": num_heads, "d_head": head_dim, "d_inner": inner}


# Layer sizes of published models, four layers of each.
WT103_BASE, ENWIK8_BASE = shape(410, 10, 41, 2100), shape(512, 8, 64, 2048)
WT103_LARGE = shape(1024, 16, 64, 4096)
# Case: model, batch size, and whether our side runs in bfloat16 autocast. The legacy model cannot (its softmax puts
# bfloat16 into a float32 tensor and raises), so that one case compares what each can do, not like with like.
CASES = {
    "wt103-base, batch 4": (COMMON | WT103_BASE, 4, False),
    "wt103-base, batch 16": (COMMON | WT103_BASE, 16, False),
    "enwik8-base, batch 4": (COMMON | ENWIK8_BASE, 4, False),
    "wt103-large, batch 1": (COMMON | WT103_LARGE, 1, False),
    "wt103-large, batch 4": (COMMON | WT103_LARGE, 4, False),
    "wt103-large, batch 4, dropatt 0.2": (COMMON | WT103_LARGE | {"dropout": 0.2, "dropatt": 0.2}, 4, False),
    "wt103-large, batch 4, ours in bfloat16": (COMMON | WT103_LARGE, 4, True),
}


def measure(case: str, settings: Settings) -> Row:
    """Seconds per step of one case."""
    model, batch_size, autocast = CASES[case]
    options = {"model": model, "batch_size": batch_size, "segment_len": SEGMENT_LEN}
    ours, legacy = sides("TrainStep", options, settings)
    dtype = "float32"
    if autocast:
        ours = replace(ours, options=options | {"autocast": True})
        dtype = "ours bfloat16 autocast, peer float32"
    config = {"peer": "legacy TransfoXLLMHeadModel", "unit": "step", "optimizer": "Adam (fused)", "dtype": dtype}
    return compare(
        name=f"xl_train_step/{case}",
        ours=ours,
        peer=legacy,
        settings=settings,
        config={**config, "batch_size": batch_size, "segment_len": SEGMENT_LEN, **model},
        check=lambda: check_training(model, batch_size, SEGMENT_LEN, settings),
    )
