"""Configuration of recurrent networks with Adaptive Computation Time (Graves 2016, arXiv 1603.08983)."""

import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CHOICES = {"cell": ("rnn", "lstm", "gru"), "halting": ("none", "act"), "pooling": ("last", "mean")}


@strict
class ActRnnConfig(PreTrainedConfig):
    r"""Configuration of a recurrent network that may ponder: repeat its step on an input until it decides to go on.

    Architecture: Graves 2016, arXiv 1603.08983.

    Args:
        vocab_size: Number of token ids; None for a network that reads vectors only (`inputs_embeds`).
        input_size: Width of the embeddings, or of the vectors; None means `hidden_size`.
        hidden_size: Width of a layer's state.
        num_hidden_layers: Number of layers (also `num_layers`). With ACT they ponder together: one inner step runs
            all of them, and the halting unit reads the topmost.
        cell: `"rnn"` (tanh), `"lstm"` or `"gru"`.
        halting: `"act"`, or `"none"`: one inner step for every input, computed by torch's fused layers.
        max_steps: Most inner steps for one input (M of the paper).
        halting_threshold: An input is done when its halting probabilities sum to this (1 - epsilon of the paper).
        halting_bias_init: Initial bias of the halting unit; the larger, the fewer inner steps at the beginning.
        ponder_cost: What the loss adds per unit of ponder time (tau of the paper), averaged over the tokens.
        dropout: Dropout of inputs, between layers and of the last layer's output; never inside the recurrence.
        tie_word_embeddings: The language model's output matrix is the embedding; needs `input_size == hidden_size`.
        pooling: What the sequence classifier reads: the output at the `"last"` token, or the `"mean"` over tokens.
        num_label_groups: Labels that the token classifier gives each token, of `num_labels` classes each.
        use_cache: Whether a call without `past_key_values` returns the recurrent state.
        bos_token_id: Id that begins a text; None for none.
        eos_token_id: Id, or ids, that end a text; None for none.
        pad_token_id: Id of pads; None for none.

    Raises:
        ValueError: a value is illegal, two values contradict each other, or a keyword is a misspelt field.
    """

    model_type = "act_rnn"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "ponder_times",
        "remainders",
        "halting_probabilities",
        "task_loss",
        "losses",
        "ponder_loss",
    ]
    attribute_map = {"num_layers": "num_hidden_layers"}
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    vocab_size: int | None = 32000
    input_size: int | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 1
    cell: str = "lstm"
    halting: str = "none"
    max_steps: int = 20
    halting_threshold: float = 0.99
    halting_bias_init: float | int = 1.0
    ponder_cost: float | int = 0.01
    dropout: float | int = 0.0
    tie_word_embeddings: bool = False
    pooling: str = "last"
    num_label_groups: int = 1
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misspelt(kwargs, [*self.__dataclass_fields__, *self.attribute_map])
        default = next(item.default for item in fields(self) if item.name == "num_hidden_layers")
        alias = kwargs.get("num_layers", self.num_hidden_layers)
        if self.num_hidden_layers not in (default, alias):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} and num_layers={alias} disagree; give one of them."
            )
        super().__post_init__(**kwargs)
        if self.input_size is None:
            self.input_size = self.hidden_size
        # Also run by transformers afterwards, but wrapped into an error class that is no ValueError.
        self.validate_architecture()

    @property
    def state_size(self) -> int:
        """Width of a layer's whole state: what it puts out, and an LSTM's memory cell beside it."""
        return self.hidden_size * (2 if self.cell == "lstm" else 1)

    def validate_architecture(self) -> None:
        """Refuse every combination that cannot be built; called by transformers after construction and on save."""
        self._validate_choices()
        self._validate_numbers()
        self._validate_vocabulary()

    def _validate_choices(self) -> None:
        for name, legal in CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(legal)}.")

    def _validate_numbers(self) -> None:
        for name in ("hidden_size", "input_size", "num_hidden_layers", "max_steps", "num_label_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; give a whole number from 1.")
        if not 0.0 < self.halting_threshold < 1.0:
            raise ValueError(
                f"halting_threshold={self.halting_threshold} is outside (0, 1); give a number a little below 1, "
                "or set max_steps=1 for one step per input."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is outside [0, 1); give a probability below 1.")
        if not 0.0 <= self.ponder_cost < float("inf"):
            raise ValueError(f"ponder_cost={self.ponder_cost} is no number from 0; give 0 to ponder for free.")

    def _validate_vocabulary(self) -> None:
        if self.tie_word_embeddings and (self.vocab_size is None or self.input_size != self.hidden_size):
            raise ValueError(
                f"tie_word_embeddings=True needs a vocabulary and input_size == hidden_size, but vocab_size="
                f"{self.vocab_size}, input_size={self.input_size}, hidden_size={self.hidden_size}; untie, or make "
                "them equal."
            )
        if self.vocab_size is None:
            return
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} is not positive; give None for vectors as input.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name}={token_id} is outside the vocabulary of {self.vocab_size} ids; correct it, or give "
                        "None when there is no such token."
                    )


def _refuse_misspelt(kwargs: dict[str, Any], names: list[str]) -> None:
    """transformers keeps unknown keywords as attributes; one that nearly is a field is surely a mistake."""
    for key in kwargs:
        if key in names or hasattr(PreTrainedConfig, key):
            continue
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        if nearest:
            raise ValueError(f"{key!r} is no setting of ActRnnConfig; did you mean {nearest[0]!r}?")


__all__ = ["ActRnnConfig"]
