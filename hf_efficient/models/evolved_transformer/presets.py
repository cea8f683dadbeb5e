"""Published sizes of the Evolved Transformer.

`tiny`, `base`, `big` and `deep` are tensor2tensor's (So et al. 2019, arXiv 1901.11117). `meena` is the chatbot of
Adiwardana et al. 2020 (arXiv 2001.09977): one block that reads, thirteen that write. `conversational` has its shape at
a size that trains without an accelerator.
"""

import difflib
from typing import Any

MEENA = {
    "vocab_size": 8192,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 13,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "num_attention_heads": 4},
    "base": {"hidden_size": 512, "num_attention_heads": 8},
    "big": {"hidden_size": 1024, "num_attention_heads": 16, "dropout": 0.3},
    "deep": {
        "hidden_size": 640,
        "num_attention_heads": 16,
        "num_encoder_layers": 9,
        "num_decoder_layers": 10,
        "dropout": 0.3,
    },
    "conversational": MEENA | {"hidden_size": 128, "num_attention_heads": 4},
    "meena": MEENA,
}


def find_preset(name: str) -> dict[str, Any]:
    """The settings of a preset; a copy.

    Raises:
        ValueError: there is no such preset.
    """
    if name in PRESETS:
        return dict(PRESETS[name])
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise ValueError(f"There is no preset {name!r}; did you mean {nearest!r}? Known are {', '.join(PRESETS)}.")


__all__ = ["PRESETS", "find_preset"]
