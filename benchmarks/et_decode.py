"""Evolved Transformer translating: with a cache against without, and against transformers' Marian of the same size."""

from dataclasses import replace
from typing import Any

from harness import CheckFailed, Row, Settings, Side, Worker, compare, significant

SIDES = "et_decoding"
VOCAB_SIZE = 8192
# Width and heads of the two sizes that the paper compares most.
WIDTHS = {"tiny": (128, 4), "base": (512, 8)}
# Blocks of ours for layers of a Transformer, which the paper takes for equal.
NUM_LAYERS = 6

# Case: size, peer, and the work.
CASES: dict[str, tuple[str, str, dict[str, int]]] = {
    "64 tokens, no cache": ("base", "no cache", {"length": 64}),
    "256 tokens, no cache": ("base", "no cache", {"length": 256}),
    "tiny, 64 tokens": ("tiny", "Marian", {"length": 64}),
    "base, 64 tokens": ("base", "Marian", {"length": 64}),
    "base, 256 tokens": ("base", "Marian", {"length": 256}),
    "base, 64 tokens, 4 beams": ("base", "Marian", {"length": 64, "num_beams": 4}),
    "base, 64 tokens, 16 rows": ("base", "Marian", {"length": 64, "num_rows": 16}),
}
TARGETS: dict[str, dict[str, float]] = {}
# float32 with sums in another order.
LOGIT_TOLERANCE = 2e-4
CHECKED_LENGTH = 32
# The paper's pairs of models, which it calls the same size, lie up to 6 % apart.
MOST_PARAMETERS_APART = 0.08


def evolved(size: str) -> dict[str, Any]:
    """Ours: tensor2tensor's `evolved_transformer_tiny` and `_base`."""
    width, heads = WIDTHS[size]
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_encoder_layers": 3,
        "num_decoder_layers": 4,
    }


def marian(size: str) -> dict[str, Any]:
    """A Transformer of the same width, with six layers on either side."""
    width, heads = WIDTHS[size]
    sides = {"layers": NUM_LAYERS, "attention_heads": heads, "ffn_dim": 4 * width}
    return {
        "vocab_size": VOCAB_SIZE,
        "d_model": width,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
        "scale_embedding": True,
        "activation_function": "relu",
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }


def sides(case: str) -> tuple[Side, Side]:
    """Ours and the peer."""
    size, peer, work = CASES[case]
    ours = Side(SIDES, "Evolved", {"model": evolved(size), **work})
    if peer == "no cache":
        return ours, replace(ours, options=ours.options | {"use_cache": False})
    return ours, Side(SIDES, "Marian", {"model": marian(size), **work})


def measure(case: str, settings: Settings) -> Row:
    """Seconds per token of one case."""
    size, peer, work = CASES[case]
    ours, theirs = sides(case)
    label = "ours, all tokens again for each" if peer == "no cache" else f"Marian, {NUM_LAYERS} + {NUM_LAYERS} layers"
    return compare(
        name=f"et_decode/{case}",
        ours=ours,
        peer=theirs,
        settings=settings,
        config={
            "peer": label,
            "unit": "token of every row",
            "dtype": "float32",
            "source_length": 32,
            **work,
            **evolved(size),
        },
        check=lambda: check(ours, theirs, settings),
    )


def check(ours: Side, peer: Side, settings: Settings) -> dict[str, Any]:
    """Each side's decoding gives the logits of a pass over the whole translation, and both have the same size.

    Raises:
        CheckFailed: logits differ by more than `LOGIT_TOLERANCE`, or numbers of parameters by more than
            `MOST_PARAMETERS_APART`.
    """
    counts, differences = [], []
    for side in (ours, peer):
        short = replace(side, options=side.options | {"length": CHECKED_LENGTH})
        with Worker(short, settings.threads) as worker:
            counts.append(worker.call("count_parameters"))
            differences.append(worker.call("logit_difference"))
    if not max(differences) <= LOGIT_TOLERANCE:
        raise CheckFailed(
            f"Logits of decoding and of one pass differ by {differences[0]:.1e} (ours) and "
            f"{differences[1]:.1e} (peer)."
        )
    if abs(counts[0] / counts[1] - 1) > MOST_PARAMETERS_APART:
        raise CheckFailed(f"The models have {counts[0]} and {counts[1]} parameters: not the same size.")
    return {
        "tokens compared": CHECKED_LENGTH,
        "largest logit difference of decoding and one pass, ours and peer": [
            significant(value, 2) for value in differences
        ],
        "parameters, ours and peer": counts,
    }
