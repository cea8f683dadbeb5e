"""Evolved Transformer training step on pairs of sentences, against transformers' Marian of the same size."""

from typing import Any

from et_decode import MOST_PARAMETERS_APART, NUM_LAYERS, evolved, marian
from harness import CheckFailed, Row, Settings, Side, Worker, compare, significant

SIDES = "et_training"
# The same for both, which Marian's configuration leaves at 0 in part.
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}

# Case: size, pairs in a batch, tokens of each source and target.
CASES: dict[str, tuple[str, int, int]] = {
    "tiny, 64 pairs of 24 tokens": ("tiny", 64, 24),
    "tiny, 8 pairs of 128 tokens": ("tiny", 8, 128),
    "base, 64 pairs of 24 tokens": ("base", 64, 24),
    "base, 8 pairs of 128 tokens": ("base", 8, 128),
}
# The blocks have 6 % more weights than the layers they replace, and convolutions.
TARGETS = {"ratio": dict.fromkeys(CASES, 0.85)}
CHECKED_STEPS = 3


def sides(case: str) -> tuple[Side, Side]:
    """Ours and the peer."""
    size, batch_size, length = CASES[case]
    batch = {"batch_size": batch_size, "length": length}
    ours = Side(SIDES, "Evolved", {"model": evolved(size) | DROPOUT, **batch})
    return ours, Side(SIDES, "Marian", {"model": marian(size) | DROPOUT, **batch})


def measure(case: str, settings: Settings) -> Row:
    """Seconds per step of one case."""
    size, batch_size, length = CASES[case]
    ours, peer = sides(case)
    return compare(
        name=f"et_train/{case}",
        ours=ours,
        peer=peer,
        settings=settings,
        config={
            "peer": f"Marian, {NUM_LAYERS} + {NUM_LAYERS} layers",
            "unit": "step",
            "optimizer": "Adam (fused)",
            "dtype": "float32",
            "batch_size": batch_size,
            "source_length": length,
            "target_length": length,
            **evolved(size),
            **DROPOUT,
        },
        check=lambda: check(ours, peer, settings),
    )


def check(ours: Side, peer: Side, settings: Settings) -> dict[str, Any]:
    """Both learn, neither looks at pads, and they have the same size.

    Raises:
        CheckFailed: one of these is not so.
    """
    losses, parameters = {}, {}
    for name, side in {"ours": ours, "peer": peer}.items():
        with Worker(side, settings.threads) as worker:
            parameters[name] = worker.call("count_parameters")
            if not worker.call("is_padding_ignored"):
                raise CheckFailed(f"The loss of {name} depends on what stands at pads.")
            losses[name] = worker.call("losses", steps=CHECKED_STEPS)
    for name, values in losses.items():
        if values[-1] >= values[0]:
            raise CheckFailed(f"The loss of {name} does not fall: {values}.")
    if abs(parameters["ours"] / parameters["peer"] - 1) > MOST_PARAMETERS_APART:
        raise CheckFailed(f"The models have {parameters} parameters: not the same size.")
    return {
        "parameters, ours and peer": list(parameters.values()),
        "losses of the first steps, ours and peer": [
            [significant(value) for value in values] for values in losses.values()
        ],
    }
