"""What the command line says when the user can mend the matter: one sentence, no traceback."""

from collections.abc import Iterable
from difflib import SequenceMatcher

from huggingface_hub.errors import StrictDataclassError

# What people type first, and what transformers calls it.
SHORT_NAMES = {
    "lr": "learning_rate",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "output": "output_dir",
    "data": "text",
    "model": "pretrained",
    "model_name_or_path": "pretrained",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "num_hidden_layers": "attn_layers",
}


class CommandError(Exception):
    """A mistake in what the user asked for. The message names the argument, its value and the mend."""


# What the package and transformers raise for bad input: their messages are shown, not their tracebacks.
USER_ERRORS = (CommandError, ValueError, OSError, ImportError, StrictDataclassError)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The candidate most like `name`: a known short form first, then by similarity of spelling.

    Example:

        >>> nearest("hiden_size", ["hidden_size", "head_dim"])
        'hidden_size'
    """
    candidates = list(candidates)
    if SHORT_NAMES.get(name) in candidates:
        return SHORT_NAMES[name]

    def likeness(candidate: str) -> float:
        return SequenceMatcher(None, name, candidate).ratio() + 0.5 * (name in candidate)

    return max(candidates, key=likeness)


def unknown_name(kind: str, name: str, candidates: Iterable[str], see: str) -> CommandError:
    """The error for a name that does not exist.

    kind: what the name should have been ("flag", "recipe key", ...); see: the command that lists them all.
    """
    prefix = "--" if name.startswith("--") else ""
    best = nearest(name.lstrip("-").replace("-", "_"), candidates)
    return CommandError(f"unknown {kind} '{name}'; the nearest real one is '{prefix}{best}' (`{see}` lists them).")


def one_sentence(error: BaseException) -> str:
    """The message of `error` on one line, without the wrapping that strict configurations put around it."""
    cause = error.__cause__
    if isinstance(error, StrictDataclassError) and cause is not None:
        error = cause
    return " ".join(str(error).split()) or type(error).__name__
