"""Transformer-XL evaluation against a sliding window recomputed for every token (the paper's Table 9)."""

from typing import Any

from harness import CheckFailed, Row, Settings, Side, Worker, compare

# The paper's figures, from one GPU: "slower by" at each attention length.
PAPER_RATIOS = {"800": 363.0, "1800": 773.0, "2800": 1409.0, "3800": 1874.0}
TARGETS = {"ratio": PAPER_RATIOS}

SEGMENT_LEN = 128
# Layer sizes of the paper's enwik8 large model (24 layers, evaluated at attention length 3,800); fewer layers, which
# shortens both sides alike.
MODEL = {"vocab_size": 205, "width": 1024, "num_heads": 8, "inner": 3072, "num_layers": 4}
LENGTHS = (800, 1800, 2800, 3800)
CASES = {
    **{str(length): ("recompute", length) for length in LENGTHS},
    **{f"{length}, cached peer": ("cached", length) for length in LENGTHS},
}

# Segments in sequence and single tokens see the same keys, in float32 sums of another order.
LOSS_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-4
# Length of the window that is held against a full pass.
CHECKED_LEN = 200


def measure(case: str, settings: Settings) -> Row:
    """Seconds per token of one case."""
    kind, length = CASES[case]
    ours = Side("transformer_xl_ours", "EvaluateSegments", {"model": our_model(length), "segment_len": SEGMENT_LEN})
    options = MODEL | {"window": length}
    if kind == "recompute":
        peer, label = Side("transformer_windows", "RecomputeWindow", options), "GPT-2, window recomputed per token"
    else:
        peer = Side("transformer_windows", "CachedWindow", options | {"segment_len": SEGMENT_LEN})
        label = "Mistral, sliding window kept in a cache"
    config = {"peer": label, "unit": "token", "batch_size": 1, "dtype": "float32"}
    return compare(
        name=f"xl_eval_window/{case}",
        ours=ours,
        peer=peer,
        settings=settings,
        config={**config, "attention_length": length, "segment_len": SEGMENT_LEN, **MODEL},
        check=lambda: check(ours, peer, settings),
    )


def our_model(attention_length: int) -> dict[str, Any]:
    """Configuration of our side: every token attends to exactly `attention_length` keys in each layer."""
    return {
        "vocab_size": MODEL["vocab_size"],
        "hidden_size": MODEL["width"],
        "num_attention_heads": MODEL["num_heads"],
        "num_hidden_layers": MODEL["num_layers"],
        "intermediate_size": MODEL["inner"],
        "mem_len": attention_length,
        "same_length": True,
        "clamp_len": 1000,
    }


def check(ours: Side, peer: Side, settings: Settings) -> dict[str, Any]:
    """The sides are two architectures, so each is held against itself, and their sizes against each other.

    Ours: a segment against a full memory gives the losses of the same tokens fed one by one, so every token really has
    the attention length that is reported. The recomputed window: its last position is that of a full pass.

    Raises:
        CheckFailed
    """
    with Worker(ours, settings.threads) as worker:
        by_token = worker.call("compare_with_single_tokens", count=16)
        our_size = worker.call("count_parameters")
    with Worker(peer, settings.threads) as worker:
        peer_size = worker.call("count_parameters")
        last = worker.call("check", length=CHECKED_LEN) if peer.name == "RecomputeWindow" else 0.0
    if not by_token <= LOSS_TOLERANCE:
        raise CheckFailed(f"Losses of a segment and of its tokens one by one differ by {by_token:.1e}.")
    if not last <= LOGIT_TOLERANCE:
        raise CheckFailed(f"The last position's logits differ by {last:.1e} from those of a full pass.")
    if not 0.9 <= our_size / peer_size <= 1.15:
        raise CheckFailed(f"The layers have {our_size} and {peer_size} parameters: not the same size.")
    return {
        "segment against single tokens, largest loss difference": float(f"{by_token:.1e}"),
        "layer parameters, ours and peer": [our_size, peer_size],
    }
