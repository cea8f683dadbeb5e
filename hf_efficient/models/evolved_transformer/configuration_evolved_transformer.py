"""Configuration of the Evolved Transformer (So et al. 2019, arXiv 1901.11117)."""

import difflib
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .presets import find_preset

# What a field may be set to, for those that are a choice.
CHOICES = {
    "position_signal": ("sinusoid", "none"),
    "pooling": ("mean", "first", "last"),
}

# Most heads that the wide attention gets by the paper's rule, where the other has fewer.
MOST_WIDE_HEADS = 16

# Fields of transformers' interface that follow from others here, and what to set instead.
DERIVED = {
    "intermediate_size": "it is 4 * hidden_size; set hidden_size",
    "num_hidden_layers": "it counts attention layers; set num_encoder_layers and num_decoder_layers",
}

# What other architectures call a setting that is meant here by another name.
ELSEWHERE = {
    **dict.fromkeys(("d_model", "n_embd"), "hidden_size"),
    **dict.fromkeys(("n_head", "num_heads", "encoder_attention_heads"), "num_attention_heads"),
    **dict.fromkeys(("d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim"), "hidden_size, which all inner widths follow"),
    **dict.fromkeys(("n_layer", "num_layers"), "num_encoder_layers and num_decoder_layers"),
    "encoder_layers": "num_encoder_layers",
    "decoder_layers": "num_decoder_layers",
    **dict.fromkeys(("dropout_rate", "hidden_dropout_prob", "resid_pdrop"), "dropout"),
}


@strict
class EvolvedTransformerConfig(PreTrainedConfig):
    r"""Configuration of an Evolved Transformer (So et al. 2019, arXiv 1901.11117).

    The defaults are tensor2tensor's `evolved_transformer_base`.

    All inner widths follow from `hidden_size` D: D / 2, 2 D and 4 D. One block replaces two layers of a Transformer.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the states; even, and a multiple of both numbers of heads.
        num_attention_heads: Number of heads of all attentions but one.
        num_wide_attention_heads: Heads of a decoder block's first self-attention. None: twice the others', but not
            more than 16 unless these are more themselves.
        num_encoder_layers: Blocks of the encoder.
        num_decoder_layers: Blocks of the decoder.
        layer_norm_eps: Epsilon of LayerNorm.
        position_signal: What tells positions apart: `"sinusoid"` vectors added to the embeddings, or `"none"`.
        dropout: Dropout of embeddings, of every sub-layer's output, and inside the branches.
        attention_dropout: Dropout of attention probabilities.
        activation_dropout: Dropout inside the feed-forward part.
        label_smoothing: Probability spread over the whole vocabulary in training.
        scale_embeddings: Multiply embeddings by sqrt(`hidden_size`).
        zero_pad_embedding: The pad's embedding counts as zero (tensor2tensor).
        encoder_input_bias: One learned vector added to every embedding of the encoder (tensor2tensor's target space).
        tie_word_embeddings: The output layer is the embedding's table.
        pooling: What the sequence classifier reads: the `"mean"`, the `"first"` or the `"last"` token's state.
        classifier_dropout: Dropout of the classifier's head; None means `dropout`.
        is_encoder_decoder: Encoder and decoder; None means unless `is_decoder`.
        is_decoder: A causal stack alone. With both False, an encoder alone.
        pad_token_id: Id of pads; None for none.
        bos_token_id: Id that begins a text; None for none.
        eos_token_id: Id, or ids, that end a text; None for none.
        decoder_start_token_id: First token of a decoded sequence.
        use_cache: Whether decoders return a cache.

    Raises:
        ValueError: a value is illegal, two values contradict each other, or a keyword is a misspelt field.
    """

    model_type = "evolved_transformer"
    attribute_map = {"layer_norm_epsilon": "layer_norm_eps"}
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state", "losses"]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_attention_heads: int = 8
    num_wide_attention_heads: int | None = None
    num_encoder_layers: int = 3
    num_decoder_layers: int = 4
    layer_norm_eps: float | int = 1e-6
    position_signal: str = "sinusoid"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    label_smoothing: float | int = 0.0
    scale_embeddings: bool = True
    zero_pad_embedding: bool = False
    encoder_input_bias: bool = False
    tie_word_embeddings: bool = True
    pooling: str = "mean"
    classifier_dropout: float | int | None = None
    is_encoder_decoder: bool | None = None
    is_decoder: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0
    use_cache: bool = True

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "EvolvedTransformerConfig":
        """A published size by its name in `presets.py`, with changes.

        Raises:
            ValueError: no preset has this name.
        """
        return cls(**(find_preset(name) | overrides))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EvolvedTransformerConfig":
        """Build from a config.json's content and overrides, which are checked together."""
        settings = {*cls.__dataclass_fields__, *DERIVED}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in settings}
        return super().from_dict(config_dict | overrides, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        derived = {name: kwargs.pop(name) for name in DERIVED if name in kwargs}
        _refuse_misspelt(kwargs, [*self.__dataclass_fields__, *self.attribute_map])
        if self.is_encoder_decoder is None:
            self.is_encoder_decoder = not self.is_decoder
        super().__post_init__(**kwargs)
        for name, value in derived.items():
            if value not in (None, getattr(self, name)):
                raise ValueError(f"{name}={value}, but this number follows from others: {DERIVED[name]}.")
        # Also run by transformers afterwards, but wrapped into an error class that is no ValueError.
        self.validate_architecture()

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved; transformers leaves out False here, which is no default of ours."""
        return super().to_diff_dict() | {"is_encoder_decoder": self.is_encoder_decoder}

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """What FSDP2 gathers at once: a block."""
        names = {"encoder": not self.is_decoder, "decoder": self.has_decoder}
        return {f"{name}.layers.*": "free_full_weight" for name, is_there in names.items() if is_there}

    @property
    def has_decoder(self) -> bool:
        """Whether there is a causal stack."""
        return bool(self.is_decoder or self.is_encoder_decoder)

    @property
    def wide_heads(self) -> int:
        """Heads of a decoder block's first self-attention."""
        if self.num_wide_attention_heads is not None:
            return self.num_wide_attention_heads
        return max(min(2 * self.num_attention_heads, MOST_WIDE_HEADS), self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head of all attentions but the wide one."""
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Width inside the feed-forward part and inside an encoder block's branches."""
        return 4 * self.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers as caches count them: two self-attentions in each block of a decoder; without one, the blocks."""
        return 2 * self.num_decoder_layers if self.has_decoder else self.num_encoder_layers

    def validate_architecture(self) -> None:
        """Refuse every combination that cannot be built; called by transformers after construction and on save."""
        self._validate_choices()
        self._validate_numbers()
        self._validate_widths()
        self._validate_stacks()
        self._validate_embedding()
        self._validate_vocabulary()

    def _validate_choices(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name}={value!r} is unknown; did you mean {_nearest(value, choices)!r}? Known are "
                    f"{', '.join(map(repr, choices))}."
                )

    def _validate_numbers(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_wide_attention_heads")
        for name in (*sizes, "num_encoder_layers", "num_decoder_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not positive; give a whole number from 1.")
        dropouts = ("dropout", "attention_dropout", "activation_dropout", "classifier_dropout")
        for name in (*dropouts, "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} is outside [0, 1); give a probability below 1.")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} is no positive number; give one above 0.")

    def _validate_widths(self) -> None:
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} is odd, but branches are half as wide; make it even.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} cannot be shared out to num_attention_heads="
                f"{self.num_attention_heads} heads; make it a multiple."
            )
        if self.has_decoder and self.hidden_size % self.wide_heads:
            reason = " (None: by num_attention_heads)" if self.num_wide_attention_heads is None else ""
            raise ValueError(
                f"hidden_size={self.hidden_size} cannot be shared out to the {self.wide_heads} heads of "
                f"num_wide_attention_heads={self.num_wide_attention_heads}{reason}; set this to a divisor."
            )

    def _validate_stacks(self) -> None:
        if self.is_decoder and self.is_encoder_decoder:
            raise ValueError(
                "is_decoder=True is a causal stack alone, is_encoder_decoder=True has an encoder too; set one of them "
                "to False."
            )
        if self.encoder_input_bias and self.is_decoder:
            raise ValueError("encoder_input_bias=True, but is_decoder=True has no encoder; set it to False.")

    def _validate_embedding(self) -> None:
        if self.zero_pad_embedding and self.pad_token_id is None:
            raise ValueError("zero_pad_embedding=True, but pad_token_id=None; name the pad's id.")

    # Copied from hf_efficient/models/reformer/configuration_reformer.py::_validate_vocabulary
    def _validate_vocabulary(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name}={token_id} is outside the vocabulary of {self.vocab_size} ids; correct it, or give "
                        "None when there is no such token."
                    )


# Copied from hf_efficient/models/reformer/configuration_reformer.py::_nearest
def _nearest(word: str, known: Any) -> str:
    """The known word most like `word`, whatever is written in capitals."""
    return difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.0)[0]


def _refuse_misspelt(kwargs: dict[str, Any], names: list[str]) -> None:
    """transformers keeps unknown keywords as attributes; one that nearly is a field is surely a mistake."""
    for key, value in kwargs.items():
        if key in ELSEWHERE:
            raise ValueError(f"{key}={value!r} is no setting of EvolvedTransformerConfig; give {ELSEWHERE[key]}.")
        if key in names or hasattr(PreTrainedConfig, key):
            continue
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        if nearest:
            raise ValueError(f"{key!r} is no setting of EvolvedTransformerConfig; did you mean {nearest[0]!r}?")


__all__ = ["EvolvedTransformerConfig"]
