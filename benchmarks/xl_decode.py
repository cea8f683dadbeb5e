"""Transformer-XL decoding: one token against a memory of 1,600, ours against legacy TransfoXL."""

from harness import Row, Settings, compare
from xl_legacy_check import check_decode, sides

TARGETS = {"ratio": 30.0}

MEM_LEN = 1600
# Layer sizes and memory of the published WikiText-103 large model (transfo-xl-wt103), per-layer u and v, evaluation
# settings. Depth and vocabulary differ by case; the whole model is `full`.
LARGE = {
    "d_model": 1024,
    "d_embed": 1024,
    "n_head": 16,
    "d_head": 64,
    "d_inner": 4096,
    "mem_len": MEM_LEN,
    "clamp_len": 1000,
    "same_length": True,
    "untie_r": True,
}
ADAPTIVE = {"vocab_size": 267735, "cutoffs": [20000, 40000, 200000], "div_val": 4}
PLAIN = {"vocab_size": 10000, "cutoffs": [], "div_val": 1}

# Case: model and batch size.
CASES = {
    "4 layers": (LARGE | PLAIN | {"n_layer": 4}, 1),
    "4 layers, batch 8": (LARGE | PLAIN | {"n_layer": 4}, 8),
    "full": (LARGE | ADAPTIVE | {"n_layer": 18}, 1),
}


def measure(case: str, settings: Settings) -> Row:
    """Seconds per step of one case."""
    model, batch_size = CASES[case]
    options = {"model": model, "batch_size": batch_size, "prompt_len": MEM_LEN}
    ours, legacy = sides("Decode", options, settings)
    config = {"peer": "legacy TransfoXLLMHeadModel", "unit": "one token of each row", "dtype": "float32"}
    return compare(
        name=f"xl_decode/{case}",
        ours=ours,
        peer=legacy,
        settings=settings,
        config={**config, "batch_size": batch_size, **model},
        check=lambda: check_decode(model, batch_size, MEM_LEN + 100, 4, settings),
    )
