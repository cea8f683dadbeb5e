"""Configuration of Transformer-XL (Dai et al. 2019, arXiv 1901.02860)."""

import difflib
import math
from dataclasses import field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ATTENTION_TYPES = {
    1: "Shaw-style learned relative positions",
    2: "Vaswani-style absolute positions",
    3: "Al-Rfou-style learned positions in every layer",
}

# What `TransfoXLConfig` of transformers 4 assumed for a key that a config.json does not hold.
LEGACY_DEFAULTS = {
    "vocab_size": 267735,
    "cutoffs": [20000, 40000, 200000],
    "hidden_size": 1024,
    "embedding_size": 1024,
    "num_attention_heads": 16,
    "head_dim": 64,
    "intermediate_size": 4096,
    "div_val": 4,
    "num_hidden_layers": 18,
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "untie_r": True,
    "eos_token_id": 0,
}

# Settings of older releases with no counterpart, at the value that turns them off.
UNSUPPORTED = {"attn_type": 0, "sample_softmax": -1, "ext_len": 0}

# Settings of older releases that never changed what the model computes; they are read and dropped.
LEGACY_INERT = ("adaptive", "tgt_len", "trainer_compatible", "max_position_embeddings")


@strict
class TransformerXLConfig(PreTrainedConfig):
    r"""Configuration of a Transformer-XL model.

    The names of transformers 4 (`d_model`, `n_head`, `pre_lnorm`, ...) are accepted as keywords and attributes too.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream (`d_model`), even.
        embedding_size: Width of the first vocabulary bin's embeddings (`d_embed`); None means `hidden_size`.
        num_hidden_layers: Number of layers (`n_layer`).
        num_attention_heads: Number of heads (`n_head`).
        head_dim: Width of a head (`d_head`); None means `hidden_size // num_attention_heads`.
            `num_attention_heads * head_dim` need not equal `hidden_size`.
        intermediate_size: Width of the feed-forward layer (`d_inner`).
        mem_len: Length of the memory in tokens, per layer. 0 turns the recurrence off.
        clamp_len: Distances beyond this many tokens are treated as this many; -1 turns it off.
        same_length: Every query sees exactly `mem_len` keys, itself among them, instead of all that are there.
        memory_init: What a stream starts from. `"empty"`: nothing, as in the original PyTorch release. `"zeros"`:
            `mem_len` zero vectors that are attended to, as in the TensorFlow release and in transformers 4
            (a legacy config.json is loaded with it).
        pre_norm: LayerNorm before attention and feed-forward instead of after the residual sum (`pre_lnorm`).
        untie_r: Biases u and v of the relative attention per layer instead of shared by all layers.
        cutoffs: First token ids of the tail bins of the adaptive embedding and softmax (Grave et al. 2017,
            arXiv 1609.04309), ascending; empty means a plain embedding and softmax.
        div_val: Factor by which the embedding width shrinks from bin to bin.
        tie_projs: For each bin, whether the softmax uses the embedding's projection; None means all bins but the
            first.
        tie_word_embeddings: Whether the softmax uses the embedding tables (`tie_weight`).
        dropout: Dropout of embeddings, positions, attention output, feed-forward and final states.
        attention_dropout: Dropout of the attention probabilities (`dropatt`).
        layer_norm_epsilon: Epsilon of LayerNorm.
        init_method: `"normal"` or `"uniform"` initialisation of the weights (`init`).
        initializer_range: Standard deviation for `"normal"` (`init_std`).
        init_range: Bound for `"uniform"`.
        proj_init_std: Standard deviation of the embedding and softmax projections.
        use_cache: Whether a call without `past_key_values` returns a memory.
        bos_token_id: Id that begins a text; None for none.
        eos_token_id: Id, or ids, that end a text; None for none.
        pad_token_id: Id of pads; None for none.

    Raises:
        ValueError: a value is illegal, two values contradict each other, or a keyword is a misspelt field.
    """

    model_type = "transfo-xl"
    keys_to_ignore_at_inference = ["past_key_values", "losses"]
    attribute_map = {
        "n_token": "vocab_size",
        "d_model": "hidden_size",
        "d_embed": "embedding_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "d_head": "head_dim",
        "d_inner": "intermediate_size",
        "pre_lnorm": "pre_norm",
        "dropatt": "attention_dropout",
        "tie_weight": "tie_word_embeddings",
        "init": "init_method",
        "init_std": "initializer_range",
        "layer_norm_eps": "layer_norm_epsilon",
    }
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    vocab_size: int = 32000
    hidden_size: int = 512
    embedding_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    head_dim: int | None = None
    intermediate_size: int = 2048
    mem_len: int = 512
    clamp_len: int = -1
    same_length: bool = False
    memory_init: str = "empty"
    pre_norm: bool = False
    untie_r: bool = True
    cutoffs: list[int] | tuple[int, ...] = field(default_factory=list)
    div_val: int = 1
    tie_projs: list[bool] | tuple[bool, ...] | None = None
    tie_word_embeddings: bool = True
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    layer_norm_epsilon: float | int = 1e-5
    init_method: str = "normal"
    initializer_range: float | int = 0.02
    init_range: float | int = 0.01
    proj_init_std: float | int = 0.01
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "TransformerXLConfig":
        """Build from a config.json's content and overrides. One without `memory_init` gets legacy defaults."""
        settings = {*cls.__dataclass_fields__, *cls.attribute_map, *UNSUPPORTED}
        overrides = {cls.attribute_map.get(key, key): kwargs.pop(key) for key in list(kwargs) if key in settings}
        config_dict = _under_todays_names(config_dict, cls.attribute_map)
        if "memory_init" not in config_dict:
            config_dict = _with_legacy_defaults(config_dict)
        return super().from_dict(config_dict | overrides, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unsupported(kwargs)
        share = kwargs.pop("proj_share_all_but_first", None)
        for name in LEGACY_INERT:
            kwargs.pop(name, None)
        _refuse_misspelt(kwargs, [*self.__dataclass_fields__, *self.attribute_map])
        self._apply_aliases(kwargs)
        super().__post_init__(**kwargs)
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        self.cutoffs = list(self.cutoffs)
        if self.tie_projs is None:
            self.tie_projs = [False] + [share is not False] * len(self.cutoffs)
        self.tie_projs = list(self.tie_projs)
        # Also run by transformers afterwards, but wrapped into an error class that is no ValueError.
        self.validate_architecture()

    def _apply_aliases(self, kwargs: dict[str, Any]) -> None:
        """Move legacy names to their fields, with the fields' type checks, and refuse two answers to one question."""
        defaults = {item.name: item.default for item in fields(self)}
        for alias in [key for key in kwargs if key in self.attribute_map]:
            name, value = self.attribute_map[alias], kwargs.pop(alias)
            given = getattr(self, name)
            if given not in (defaults[name], value):
                raise ValueError(f"{name}={given!r} and its older name {alias}={value!r} disagree; give one of them.")
            setattr(self, name, value)

    @property
    def is_adaptive(self) -> bool:
        """Whether embedding and softmax are split into bins or projected, that is, more than one plain table."""
        return bool(self.cutoffs) or self.div_val > 1 or self.embedding_size != self.hidden_size

    def validate_architecture(self) -> None:
        """Refuse every combination that cannot be built; called by transformers after construction and on save."""
        self._validate_sizes()
        self._validate_choices()
        self._validate_vocabulary_bins()

    def _validate_sizes(self) -> None:
        positive = ("vocab_size", "hidden_size", "embedding_size", "num_hidden_layers", "num_attention_heads")
        for name in (*positive, "head_dim", "intermediate_size", "div_val"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; give a whole number from 1.")
        if self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} is odd, and the sinusoid positions come in pairs of sine and "
                "cosine; give an even number."
            )
        if self.clamp_len < -1:
            raise ValueError(
                f"clamp_len={self.clamp_len} is negative; give a distance in tokens, or -1 to turn it off."
            )
        if self.mem_len < 0:
            raise ValueError(f"mem_len={self.mem_len} is negative; give 0 to turn the memory off.")
        if self.same_length and self.mem_len == 0:
            raise ValueError(
                "same_length=True lets a query see mem_len keys, which is none with mem_len=0; set mem_len to at "
                "least 1 or same_length=False."
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1); give a probability below 1.")
        for name in ("layer_norm_epsilon", "initializer_range", "init_range", "proj_init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is no positive number; give a small one.")

    def _validate_choices(self) -> None:
        for name, legal in (("memory_init", ("empty", "zeros")), ("init_method", ("normal", "uniform"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(legal)}.")

    def _validate_vocabulary_bins(self) -> None:
        ends = [0, *self.cutoffs, self.vocab_size]
        if any(low >= high for low, high in zip(ends, ends[1:], strict=False)):
            raise ValueError(
                f"cutoffs={self.cutoffs} must ascend strictly between 0 and vocab_size={self.vocab_size}; "
                "correct them, or give [] for a plain softmax."
            )
        assert self.tie_projs is not None  # filled in before
        if len(self.tie_projs) != len(self.cutoffs) + 1:
            raise ValueError(
                f"tie_projs={self.tie_projs} has {len(self.tie_projs)} entries for {len(self.cutoffs) + 1} bins; "
                "give one per bin (cutoffs + 1), or None."
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name}={token_id} is outside the vocabulary of {self.vocab_size} ids; correct it, or give "
                        "None when there is no such token."
                    )
        narrowest = self.embedding_size // self.div_val ** len(self.cutoffs)
        if narrowest < 1:
            raise ValueError(
                f"embedding_size={self.embedding_size} shrinks to width 0 in the last bin with "
                f"div_val={self.div_val} and cutoffs={self.cutoffs}; use a smaller div_val or fewer cutoffs."
            )


def _under_todays_names(config_dict: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """A copy with every older name replaced."""
    renamed: dict[str, Any] = {}
    for key, value in config_dict.items():
        name = aliases.get(key, key)
        if renamed.setdefault(name, value) != value:
            other = next(old for old in config_dict if old != key and aliases.get(old, old) == name)
            raise ValueError(f"{other}={renamed[name]!r} and {key}={value!r} disagree, and are one setting; keep one.")
    return renamed


def _with_legacy_defaults(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A transformers-4 config.json with absent keys filled with that release's defaults."""
    filled = LEGACY_DEFAULTS | config_dict | {"memory_init": "zeros"}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # Some old files say -1 for "none".
        if filled.get(name) == -1:
            filled[name] = None
    return filled


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    """Take legacy settings with no counterpart out of `kwargs`; their off values pass, others are refused by name."""
    attn_type = kwargs.get("attn_type", 0)
    if attn_type != 0:
        kind = ATTENTION_TYPES.get(attn_type, "unknown")
        raise ValueError(
            f"attn_type={attn_type} ({kind}) is not supported; only attn_type=0, the relative attention of the "
            "Transformer-XL paper, is. Checkpoints of another type cannot be converted."
        )
    for name, off in UNSUPPORTED.items():
        value = kwargs.pop(name, off)
        if value is not None and value > 0:
            raise ValueError(f"{name}={value} is not supported; set {name}={off} or leave it out.")


def _refuse_misspelt(kwargs: dict[str, Any], names: list[str]) -> None:
    """transformers keeps unknown keywords as attributes; one that nearly is a field is surely a mistake."""
    for key in kwargs:
        if key in names or hasattr(PreTrainedConfig, key):
            continue
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        if nearest:
            raise ValueError(f"{key!r} is no setting of TransformerXLConfig; did you mean {nearest[0]!r}?")


__all__ = ["TransformerXLConfig"]
