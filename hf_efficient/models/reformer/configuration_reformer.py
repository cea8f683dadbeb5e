"""Configuration of the Reformer (Kitaev et al. 2020, arXiv 2001.04451)."""

import difflib
import math
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# Layer types that share queries and keys; a call may exchange one for another, since their weights are the same.
SHARED_QUERY_KEY_LAYERS = ("lsh", "windowed_lsh", "full")
HASHED_LAYERS = ("lsh", "windowed_lsh")
RESIDUAL_DTYPES = ("float32", "float64", None)
LAYER_TYPES = ("local", *SHARED_QUERY_KEY_LAYERS)

# Settings of 2020's files that had been replaced by `local_...` and `lsh_...` ones, or never changed the model.
LEGACY_INERT = (
    "attention_probs_dropout_prob",
    "num_chunks_after",
    "num_chunks_before",
    "output_past",
    "seed",
    "sinusoidal_pos_embds",
)

# Buckets, and one for pads, are kept as 32-bit numbers.
MAX_BUCKETS = 2**31 - 2

LSH_SETTINGS = (
    "lsh_attn_chunk_length",
    "lsh_attention_probs_dropout_prob",
    "lsh_num_chunks_before",
    "lsh_num_chunks_after",
)


@strict
class ReformerConfig(PreTrainedConfig):
    r"""Configuration of a Reformer model: the fields of transformers' own class, and a few more.

    Architecture: Kitaev et al. 2020, arXiv 2001.04451.

    Args:
        attention_head_size: Width of a head. `num_attention_heads * attention_head_size` need not equal `hidden_size`.
        attn_layers: Layer types in order. `"local"`: chunks of `local_attn_chunk_length` that see their neighbours.
            `"lsh"`: the paper's hashed attention, in chunks of the list sorted by bucket. `"windowed_lsh"`: hashed
            attention in which a query sees the last `lsh_attn_chunk_length` keys of its own bucket; its result does
            not depend on later tokens, padding or chunk borders. `"full"`: exact attention with shared queries and
            keys. A model with the last two cannot be loaded by transformers' own Reformer, which refuses it.
        axial_norm_std: Standard deviation of the initial axial position embeddings.
        axial_pos_embds: Axial position embeddings instead of one learned vector per position.
        axial_pos_shape: Shape of the grid that the positions are laid out in, row by row.
        axial_pos_embds_dim: Width of each axis' embedding; the sum is `hidden_size`.
        chunk_size_lm_head: Tokens whose logits are held at once while a loss is computed; 0 chooses a few megabytes.
        chunk_size_feed_forward: Tokens that pass the feed-forward layer at once; 0 means all.
        eos_token_id: Id, or ids, that end a text; None for none.
        feed_forward_size: Width of the feed-forward layer.
        hash_seed: Seed of the hash rotations, then the same in every layer and call. None draws new ones in every
            training step, from one number of torch's generator, and keeps them fixed in evaluation.
        hidden_act: Activation of the feed-forward layer.
        hidden_dropout_prob: Dropout of embeddings, attention outputs, feed-forward and final states.
        hidden_size: Width of each of the two residual streams.
        initializer_range: Standard deviation of the initial weights.
        is_decoder: Whether a token sees only itself and earlier ones.
        layer_norm_eps: Epsilon of LayerNorm.
        local_num_chunks_before: Chunks before its own that a token sees in `local` layers.
        local_num_chunks_after: Chunks after its own.
        local_attention_probs_dropout_prob: Dropout of the attention probabilities in `local` layers.
        local_attn_chunk_length: Tokens in a chunk of `local` layers.
        lsh_attn_chunk_length: Tokens in a chunk of `lsh` layers, keys per bucket and round of `windowed_lsh` ones.
            This and the next three may be None when no layer is hashed.
        lsh_attention_probs_dropout_prob: Dropout of the attention probabilities in all layers but `local` ones.
        lsh_num_chunks_before: Chunks of the sorted list before its own that a token sees in `lsh` layers.
        lsh_num_chunks_after: Chunks of the sorted list after its own.
        max_position_embeddings: Longest sequence.
        num_attention_heads: Number of heads.
        num_buckets: Number of hash buckets, even, or a list of even factors. None chooses it for `lsh` layers by the
            length of the input, and for `windowed_lsh` layers by `max_position_embeddings`.
        num_hashes: Hash rounds.
        vocab_size: Number of token ids.
        tie_word_embeddings: Must be False, unless `is_encoder_decoder`: the head reads both streams and so has twice
            the embedding's width.
        use_cache: Whether a call without `past_key_values` and without gradients returns a cache.
        classifier_dropout: Dropout of the sequence classifier's head; None means `hidden_dropout_prob`.
        bos_token_id: Id that begins a text; None for none.
        pad_token_id: Id of pads; None for none.
        full_attention_threshold: `lsh` and `windowed_lsh` layers compute exact attention for rows of up to this many
            tokens. A text that grows beyond it is then hashed, earlier tokens too; 0 keeps `windowed_lsh` strictly
            causal, and decoding with a cache equal to decoding without.
        reversible: Recompute activations in the backward pass from the layers' outputs, so that memory does not grow
            with depth. False: ordinary autograd, with the same weights and results.
        residual_dtype: What the two streams are kept in where the weights are narrower: `"float32"`, or `"float64"`,
            with which a reversible model's gradients are ordinary autograd's to the bit, under bfloat16 autocast
            too, for the memory of two more streams. None: what the embeddings are in.
        decoder_attn_layers: Layer types of the decoder when `is_encoder_decoder`; None means `attn_layers`.
        decoder_start_token_id: First token of a decoded sequence when `is_encoder_decoder`.

    Raises:
        ValueError: a value is illegal, two values contradict each other, or a keyword is a misspelt field.
    """

    model_type = "reformer"
    keys_to_ignore_at_inference = ["past_key_values", "losses", "buckets", "attention_recall"]
    attribute_map = {"layer_norm_epsilon": "layer_norm_eps"}
    # Not whole layers, whose inputs, the streams, must not be cast to half precision.
    base_model_fsdp_plan = {
        "encoder.layers.*.attention": "free_full_weight",
        "encoder.layers.*.feed_forward": "free_full_weight",
    }

    attention_head_size: int = 64
    attn_layers: list[str] | tuple[str, ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    axial_norm_std: float | int = 1.0
    axial_pos_embds: bool = True
    axial_pos_shape: list[int] | tuple[int, ...] = (64, 64)
    axial_pos_embds_dim: list[int] | tuple[int, ...] = (64, 192)
    chunk_size_lm_head: int = 0
    eos_token_id: int | list[int] | None = 2
    feed_forward_size: int = 512
    hash_seed: int | None = None
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.05
    hidden_size: int = 256
    initializer_range: float | int = 0.02
    is_decoder: bool = False
    layer_norm_eps: float | int = 1e-12
    local_num_chunks_before: int = 1
    local_num_chunks_after: int = 0
    local_attention_probs_dropout_prob: float | int = 0.05
    local_attn_chunk_length: int = 64
    lsh_attn_chunk_length: int | None = 64
    lsh_attention_probs_dropout_prob: float | int | None = 0.0
    lsh_num_chunks_before: int | None = 1
    lsh_num_chunks_after: int | None = 0
    max_position_embeddings: int = 4096
    num_attention_heads: int = 12
    num_buckets: int | list[int] | tuple[int, ...] | None = None
    num_hashes: int = 1
    vocab_size: int = 320
    tie_word_embeddings: bool = False
    use_cache: bool = True
    classifier_dropout: float | int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = 0
    full_attention_threshold: int = 0
    reversible: bool = True
    residual_dtype: str | None = "float32"
    decoder_attn_layers: list[str] | tuple[str, ...] | None = None
    decoder_start_token_id: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ReformerConfig":
        """Build from a config.json's content and overrides."""
        settings = {*cls.__dataclass_fields__, *cls.attribute_map, "num_hidden_layers"}
        overrides = {cls.attribute_map.get(key, key): kwargs.pop(key) for key in list(kwargs) if key in settings}
        named = {*config_dict, *overrides}
        # Where a file holds both names, the Reformer's own counts.
        config_dict = {key: value for key, value in config_dict.items() if cls.attribute_map.get(key) not in named}
        if "attn_layers" in overrides or "reversible" not in config_dict:
            # Releases of 2020 counted `attn_layers` whatever the file said here; ours always write `reversible`.
            config_dict.pop("num_hidden_layers", None)
        return super().from_dict(config_dict | overrides, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        for name in LEGACY_INERT:
            kwargs.pop(name, None)
        _refuse_misspelt(kwargs, [*self.__dataclass_fields__, *self.attribute_map])
        self._apply_aliases(kwargs)
        self.num_hidden_layers = kwargs.pop("num_hidden_layers", len(self.attn_layers))
        super().__post_init__(**kwargs)
        self.attn_layers = list(self.attn_layers)
        self.axial_pos_shape = tuple(self.axial_pos_shape)
        self.axial_pos_embds_dim = tuple(self.axial_pos_embds_dim)
        if isinstance(self.num_buckets, tuple):
            self.num_buckets = list(self.num_buckets)
        if self.is_encoder_decoder or self.decoder_attn_layers is not None:
            self.decoder_attn_layers = list(self.decoder_attn_layers or self.attn_layers)
        # Also run by transformers afterwards, but wrapped into an error class that is no ValueError.
        self.validate_architecture()

    # Copied from hf_efficient/models/transformer_xl/configuration_transformer_xl.py::_apply_aliases
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
    def bucket_factors(self) -> tuple[int, ...] | None:
        """`num_buckets` as a tuple of factors; None when the length decides."""
        if self.num_buckets is None:
            return None
        return (self.num_buckets,) if isinstance(self.num_buckets, int) else tuple(self.num_buckets)

    @property
    def num_positions(self) -> int:
        """The longest sequence that has positions."""
        if not self.axial_pos_embds:
            return self.max_position_embeddings
        return min(self.max_position_embeddings, math.prod(self.axial_pos_shape))

    def validate_architecture(self) -> None:
        """Refuse every combination that cannot be built; called by transformers after construction and on save."""
        self._validate_layers()
        self._validate_sizes()
        self._validate_chunks()
        self._validate_positions()
        self._validate_buckets()
        self._validate_vocabulary()

    def _validate_layers(self) -> None:
        if not self.attn_layers:
            raise ValueError("attn_layers is empty; name at least one layer type, such as ['local', 'lsh'].")
        check_layer_types("attn_layers", self.attn_layers)
        if self.num_hidden_layers != len(self.attn_layers):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}, but attn_layers={self.attn_layers} names "
                f"{len(self.attn_layers)} layers; give attn_layers alone, one entry per layer."
            )
        if self.decoder_attn_layers is not None:
            if not self.is_encoder_decoder:
                raise ValueError(
                    f"decoder_attn_layers={self.decoder_attn_layers} is for encoder-decoder models; set "
                    "is_encoder_decoder=True, or use attn_layers."
                )
            check_layer_types("decoder_attn_layers", self.decoder_attn_layers)
        if self.tie_word_embeddings and not self.is_encoder_decoder:
            raise ValueError(
                f"tie_word_embeddings=True, but the head reads both streams, 2 * hidden_size={2 * self.hidden_size} "
                f"wide, and the embedding has hidden_size={self.hidden_size}; set it to False."
            )

    def _validate_sizes(self) -> None:
        positive = ("attention_head_size", "feed_forward_size", "hidden_size", "max_position_embeddings")
        for name in (*positive, "num_attention_heads", "num_hashes", "vocab_size", "local_attn_chunk_length"):
            _check_at_least(self, name, 1)
        for name in ("chunk_size_lm_head", "chunk_size_feed_forward", "full_attention_threshold"):
            _check_at_least(self, name, 0)
        probabilities = ("hidden_dropout_prob", "local_attention_probs_dropout_prob")
        for name in (*probabilities, "lsh_attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} is outside [0, 1); give a probability below 1.")
        for name in ("layer_norm_eps", "initializer_range", "axial_norm_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is no positive number; give a small one.")
        if self.hash_seed is not None and not -(2**63) <= self.hash_seed < 2**64:
            raise ValueError(f"hash_seed={self.hash_seed} is no 64-bit number; give a smaller one, or None.")
        if self.residual_dtype not in RESIDUAL_DTYPES:
            raise ValueError(f"residual_dtype={self.residual_dtype!r} is unknown; choose one of {RESIDUAL_DTYPES}.")
        if self.hidden_act not in ACT2FN:
            nearest = _nearest(self.hidden_act, ACT2FN)
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; did you mean {nearest!r}?")

    def _validate_chunks(self) -> None:
        for name in ("local_num_chunks_before", "local_num_chunks_after"):
            _check_at_least(self, name, 0)
        layers = {*self.attn_layers, *(self.decoder_attn_layers or ())}
        hashed = [kind for kind in HASHED_LAYERS if kind in layers]
        for name in LSH_SETTINGS:
            if getattr(self, name) is None:
                if hashed:
                    raise ValueError(f"{name}=None, but there are {hashed[0]!r} layers; give it a number.")
            elif name != "lsh_attention_probs_dropout_prob":
                _check_at_least(self, name, 1 if name == "lsh_attn_chunk_length" else 0)

    def _validate_positions(self) -> None:
        if not self.axial_pos_embds:
            return
        shape, widths = self.axial_pos_shape, self.axial_pos_embds_dim
        if len(shape) < 2 or len(shape) != len(widths):
            raise ValueError(
                f"axial_pos_shape={shape} has {len(shape)} axes and axial_pos_embds_dim={widths} has {len(widths)}; "
                "give at least two, and as many of one as of the other."
            )
        if min(*shape, *widths) < 1:
            raise ValueError(
                f"axial_pos_shape={shape} and axial_pos_embds_dim={widths} must be positive; give numbers from 1."
            )
        if sum(widths) != self.hidden_size:
            raise ValueError(
                f"axial_pos_embds_dim={widths} adds up to {sum(widths)}, but hidden_size={self.hidden_size}; make the "
                "sum equal, or set axial_pos_embds=False."
            )

    def _validate_buckets(self) -> None:
        factors = self.bucket_factors
        if factors is None:
            return
        if not factors or any(factor < 2 or factor % 2 for factor in factors):
            raise ValueError(
                f"num_buckets={self.num_buckets} must be even and positive in every factor, because a direction and "
                "its opposite are two buckets; give even numbers, or None to have it chosen."
            )
        if math.prod(factors) > MAX_BUCKETS:
            raise ValueError(
                f"num_buckets={self.num_buckets} makes {math.prod(factors)} buckets, more than the {MAX_BUCKETS} that "
                "can be numbered; give fewer, about two for each chunk of the longest sequence."
            )

    def _validate_vocabulary(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name}={token_id} is outside the vocabulary of {self.vocab_size} ids; correct it, or give "
                        "None when there is no such token."
                    )


def check_layer_types(name: str, layers: list[str] | tuple[str, ...]) -> None:
    """Refuse unknown layer types, naming the nearest known one."""
    for kind in layers:
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"{name}={list(layers)} holds the unknown type {kind!r}; did you mean "
                f"{_nearest(kind, LAYER_TYPES)!r}? Known are {', '.join(LAYER_TYPES)}."
            )


def _check_at_least(config: ReformerConfig, name: str, lowest: int) -> None:
    value = getattr(config, name)
    if value < lowest:
        kind = "not positive" if lowest else "negative"
        raise ValueError(f"{name}={value} is {kind}; give a whole number from {lowest}.")


def _nearest(word: str, known: Any) -> str:
    """The known word most like `word`, whatever is written in capitals."""
    return difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.0)[0]


def _refuse_misspelt(kwargs: dict[str, Any], names: list[str]) -> None:
    """transformers keeps unknown keywords as attributes; one that nearly is a field is surely a mistake."""
    for key in kwargs:
        if key in names or hasattr(PreTrainedConfig, key) or key == "num_hidden_layers":
            continue
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        if nearest:
            raise ValueError(f"{key!r} is no setting of ReformerConfig; did you mean {nearest[0]!r}?")


__all__ = ["HASHED_LAYERS", "LAYER_TYPES", "SHARED_QUERY_KEY_LAYERS", "ReformerConfig", "check_layer_types"]
