"""Reformer (Kitaev et al. 2020, arXiv 2001.04451): hashed attention and reversible layers for long sequences.

Letters in shape notes: B batch, H heads, T tokens, K head_dim, D hidden_size, R hash rounds, S keys.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .axial_positions import AxialPositionEmbeddings, AxialTables, LearnedPositionEmbeddings
from .cache_reformer import ReformerCache
from .configuration_reformer import HASHED_LAYERS, ReformerConfig
from .inputs_reformer import (
    can_look_at,
    check_length,
    check_mask,
    check_overrides,
    check_past_mask,
    check_positions,
    check_tokens,
    chunk_padding,
    count_last_tokens,
    cut,
    inverse,
    is_replica,
    pads_last,
    reorder,
    reorder_attention,
    reorder_buckets,
)
from .layers_reformer import ReformerEncoder
from .self_attention_reformer import ReformerCall

SEED_BOUND = 2**62


@dataclass
class ReformerModelOutput(ModelOutput):
    """Output of `ReformerModel`.

    Args:
        last_hidden_state: (B, T, 2 D), both streams, normalised together.
        past_key_values: keys, values and buckets of all tokens so far.
        hidden_states: on request, the second stream before every layer and at the end, (B, T, D) each.
        attentions: on request, for every layer (B, H, T, S) probabilities, computed in the eager form.
        buckets: on request, for every layer (B, H, R, T) bucket numbers, those of round r after those of round r - 1,
            or None where a layer did not hash.
        attention_recall: on request, for every hashed layer (B, H) the share of exact attention's probability that
            falls on keys the layer sees, else None.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: ReformerCache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    buckets: tuple[torch.LongTensor | None, ...] | None = None
    attention_recall: tuple[torch.FloatTensor | None, ...] | None = None


class ReformerEmbeddings(nn.Module):
    """Word embeddings and positions."""

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = AxialPositionEmbeddings if config.axial_pos_embds else LearnedPositionEmbeddings
        self.position_embeddings = positions(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Ids (B, T) or embeddings (B, T, D), with positions (B or 1, T), to (B, T, D)."""
        words = tokens if tokens.is_floating_point() else self.word_embeddings(tokens)
        if self.training:
            # Positions have dropout of their own, drawn for each row.
            position_ids = position_ids.expand(tokens.shape[0], -1)
        return self.dropout(words) + self.position_embeddings(position_ids)


class ReformerPreTrainedModel(PreTrainedModel):
    """What all Reformer models share: configuration, initialisation and what they support."""

    config: ReformerConfig
    base_model_prefix = "reformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReformerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Constants of masks, and the head's bias a second time, in older files.
    _keys_to_ignore_on_load_unexpected = [r"mask_value_float(16|32)$", r"lm_head\.decoder\.bias$"]

    def __init__(self, config: ReformerConfig, *args: Any, **kwargs: Any):
        # Settings may have been changed since the configuration was built.
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Everything N(0, initializer_range), axial positions N(0, axial_norm_std), LayerNorm 1, biases 0."""
        config = self.config
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, AxialTables):
            for table in module.parameters():
                init.normal_(table, mean=0.0, std=config.axial_norm_std)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """As in transformers, where it is of use.

        Raises:
            ValueError: the model is reversible, and keeps less than checkpoints of its layers would.
        """
        if enable and self.config.reversible:
            raise ValueError(
                "Gradient checkpointing keeps every layer's input, but a reversible model keeps none and recomputes "
                "them all; leave it off, or build the model with reversible=False."
            )
        super()._set_gradient_checkpointing(enable, *args, **kwargs)


class ReformerBody(ReformerPreTrainedModel):
    """What happens around the layers: inputs, pads, positions, the cache and what is reported.

    A subclass has `embeddings` and `_run_layers`. Pads may stand anywhere in a row: they are moved behind the tokens
    before the first layer and back after the last, and positions count the tokens alone. With `full`, `windowed_lsh`
    and causal `local` layers each row gets what it would get alone. `lsh` layers, and bidirectional `local` ones, let
    their chunks wrap around the end of the row with its pads, as transformers' Reformer does, so there a row's result
    depends on how many pads follow it.
    """

    def _run_layers(self, hidden_states: Tensor, call: ReformerCall, **kwargs: Any) -> Tensor:
        """All layers and what normalises their result, (B, T, D) to (B, T, ...); `kwargs` are those of the call."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value

    def create_cache(self, attn_layers: list[str] | None = None) -> ReformerCache:
        """An empty cache for this model, or for calls with other layer types."""
        if attn_layers is None:
            return ReformerCache(self.config)
        config = copy.copy(self.config)
        config.attn_layers = list(attn_layers)
        return ReformerCache(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_key_values: ReformerCache | None = None,
        use_cache: bool | None = None,
        num_hashes: int | None = None,
        attn_layers: list[str] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> ReformerModelOutput:
        """Run (B, T) ids, after those in the cache if there is one.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: 1 for tokens, 0 for pads, anywhere; (B, T), or (B, tokens seen + T), of which the last T
                columns count. None means no pads and is faster.
            position_ids: (B or 1, T); default: a token's index among the tokens of its row.
            inputs_embeds: (B, T, D) instead of `input_ids`.
            past_key_values: keys and values of the tokens before, added to in place and returned.
            use_cache: return a cache when none was passed; default `config.use_cache`, without gradients only.
            num_hashes: hash rounds of this call instead of `config.num_hashes`.
            attn_layers: layer types of this call; `lsh`, `windowed_lsh` and `full` can stand in for each other.
            output_hidden_states: return the second stream before every layer and at the end.
            output_attentions: return attention probabilities; the eager form is computed then, O(T^2) in memory.
            rotations: among the keywords, one tensor of hash rotations per layer or None, (H, K, R, F) or
                (B, H, K, R, F): repeats another run's hashing, and spares a compiled graph a break.
            output_buckets: among the keywords, return the buckets.
            output_attention_recall: among the keywords, return what share of exact attention hashing finds, O(T^2).

        Returns:
            `ReformerModelOutput`. Cost per layer O(B T D^2), and for attention O(B T R C) with chunks or windows of C,
            O(B T^2) if `full`.

        Raises:
            ValueError, TypeError: inputs of a wrong shape, ids outside the vocabulary, more tokens than positions,
                overrides that do not fit the weights, a cache in training or in a bidirectional model.
        """
        if kwargs.get("past_buckets_states") is not None:
            raise TypeError("past_buckets_states is past_key_values here; pass what the last call returned there.")
        config = self.config
        num_hashes, layer_types = check_overrides(num_hashes, attn_layers, config.attn_layers, config)
        tokens = check_tokens(input_ids, inputs_embeds, config)
        cache = self._open_cache(past_key_values, use_cache, layer_types)
        num_seen = 0 if cache is None else cache.get_seq_length()
        mask = check_mask(attention_mask, tokens, num_seen)
        check_past_mask(attention_mask, tokens.shape[1], num_seen, None if cache is None else cache.row_lengths)
        check_positions(position_ids, tokens, config)
        order = num_pads = None
        is_counted = mask is not None and cache is not None and not torch.compiler.is_compiling()
        num_last_tokens = count_last_tokens(mask) if is_counted else 0
        if mask is not None:
            order, num_pads = pads_last(mask)
            mask = mask.gather(1, order)
            tokens = tokens.gather(1, order) if tokens.ndim == 2 else reorder(tokens, order)
            position_ids = None if position_ids is None else position_ids.expand_as(order).gather(1, order)
        if position_ids is None:
            position_ids = self._default_positions(tokens, cache, num_pads)
        hidden_states = self.embeddings(tokens, position_ids)

        rotations = self._check_rotations(kwargs.get("rotations"))
        call = ReformerCall(
            layer_types=layer_types,
            num_hashes=num_hashes,
            seed=self._seed(layer_types, rotations),
            attention_mask=mask,
            num_tokens=tokens.shape[1],
            num_pads=num_pads,
            num_last_tokens=num_last_tokens,
            rotations=rotations,
            cache=cache,
            is_continued=num_seen > 0,
            wanted=self._wanted(output_hidden_states, output_attentions, kwargs),
        )
        call.implementation = "eager" if "attentions" in call.wanted else config._attn_implementation
        if not call.is_continued:
            hidden_states = _fill_chunks(hidden_states, call, self.config)
        hidden_states = self._run_layers(hidden_states, call, **kwargs)
        output = self._output(hidden_states, call, order)
        # A checkpoint would report once more when it runs a layer again.
        call.reports.clear()
        call.wanted = frozenset()
        return output

    def _open_cache(
        self, past_key_values: ReformerCache | None, use_cache: bool | None, layer_types: list[str]
    ) -> ReformerCache | None:
        """The cache to read and add to, or None."""
        if is_replica(self, past_key_values, use_cache):
            return None
        if past_key_values is None:
            if use_cache is None:
                # An exported program cannot return one.
                is_possible = not torch.is_grad_enabled() and not torch.compiler.is_exporting()
                use_cache = self.config.use_cache and is_possible
            is_kept = use_cache and self.config.is_decoder and not self.training
            return self.create_cache(layer_types) if is_kept else None
        if not isinstance(past_key_values, ReformerCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}, but the Reformer's cache is a ReformerCache; "
                "make one with model.create_cache()."
            )
        if len(past_key_values.layers) != len(layer_types):
            raise ValueError(
                f"past_key_values has {len(past_key_values.layers)} layers, but the model has {len(layer_types)}; "
                "make one with model.create_cache()."
            )
        if not self.config.is_decoder:
            raise ValueError(
                "past_key_values was given, but is_decoder=False: earlier tokens would have to see later ones; leave "
                "it out."
            )
        if self.training:
            raise ValueError(
                "past_key_values was given in training, but no gradient flows through a cache; call model.eval(), or "
                "give the whole sequence."
            )
        return past_key_values

    def _default_positions(self, tokens: Tensor, cache: ReformerCache | None, num_pads: Tensor | None) -> Tensor:
        """Index of each token among those of its row, (B or 1, T); pads, which are last, go on counting."""
        length = tokens.shape[1]
        num_seen = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(num_seen, num_seen + length, device=tokens.device)[None]
        row_lengths = None if cache is None else cache.row_lengths
        if row_lengths is not None and num_seen:
            positions = torch.arange(length, device=tokens.device) + row_lengths[:, None]
        has_pads = num_pads is not None or row_lengths is not None
        if not has_pads:
            check_length(num_seen + length, self.config)
        elif can_look_at(positions):
            last = positions[:, -1] - (0 if num_pads is None else num_pads)
            check_length(int(last.max()) + 1, self.config)
        return positions.clamp(max=self.config.num_positions - 1) if has_pads else positions

    def _seed(self, layer_types: list[str], rotations: list[Tensor | None] | None) -> int:
        """Where this call's rotations come from: in evaluation always the same, the caller's generator untouched."""
        given = rotations if rotations is not None else [None] * len(layer_types)
        lacks = any(kind in HASHED_LAYERS and own is None for kind, own in zip(layer_types, given, strict=True))
        if not lacks or not self.training or self.config.hash_seed is not None:
            return 0
        if torch.compiler.is_exporting():
            raise ValueError(
                "In training mode each call draws rotations of its own for hashing, which an exported program could "
                "not; call model.eval(), set config.hash_seed, or give rotations."
            )
        return draw_seed()

    def _check_rotations(self, rotations: list[Tensor | None] | None) -> list[Tensor | None] | None:
        num_layers = len(self.config.attn_layers)
        if rotations is not None and len(rotations) != num_layers:
            raise ValueError(
                f"rotations has {len(rotations)} entries, but the model has {num_layers} layers; give one per layer, "
                "None for those that do not hash."
            )
        return rotations

    def _wanted(
        self, output_hidden_states: bool | None, output_attentions: bool | None, kwargs: dict[str, Any]
    ) -> frozenset[str]:
        config = self.config
        answers = {
            "hidden_states": config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            "attentions": config.output_attentions if output_attentions is None else output_attentions,
            "buckets": kwargs.get("output_buckets"),
            "attention_recall": kwargs.get("output_attention_recall"),
        }
        return frozenset(name for name, is_wanted in answers.items() if is_wanted)

    def _output(self, hidden_states: Tensor, call: ReformerCall, order: Tensor | None) -> ReformerModelOutput:
        """Cut off what filled chunks, move pads back, and gather what was asked for."""
        length, num_layers = call.num_tokens, len(call.layer_types)
        back = None if order is None else inverse(order)

        def states_back(states: Tensor) -> Tensor:
            states = cut(states, 1, length)
            return states if back is None else reorder(states, back)

        def weights_back(weights: Tensor) -> Tensor:
            num_keys = weights.shape[3] - (weights.shape[2] - length)
            weights = cut(cut(weights, 2, length), 3, num_keys)
            return weights if back is None else reorder_attention(weights, back)

        def buckets_back(buckets: Tensor | None) -> Tensor | None:
            if buckets is None:
                return None
            buckets = cut(buckets, 3, length)
            return buckets if back is None else reorder_buckets(buckets, back)

        def each(name: str, move: Callable[[Any], Any], count: int) -> tuple[Any, ...] | None:
            entries = call.reported(name, count)
            return None if entries is None else tuple(move(entry) for entry in entries)

        return ReformerModelOutput(
            last_hidden_state=states_back(hidden_states),
            past_key_values=call.cache,
            hidden_states=each("hidden_states", states_back, num_layers + 1),
            attentions=each("attentions", weights_back, num_layers),
            buckets=each("buckets", buckets_back, num_layers),
            attention_recall=call.reported("attention_recall", num_layers),
        )


class ReformerModel(ReformerBody):
    """The body: embeddings, reversible layers and the LayerNorm over both streams.

    Architecture: Kitaev et al. 2020, arXiv 2001.04451.
    """

    def __init__(self, config: ReformerConfig):
        if config.is_encoder_decoder:
            raise ValueError(
                "is_encoder_decoder=True, but this is one stack; use ReformerForConditionalGeneration "
                "(AutoModelForSeq2SeqLM), or set it to False."
            )
        super().__init__(config)
        self.embeddings = ReformerEmbeddings(config)
        self.encoder = ReformerEncoder(config, config.attn_layers, config.is_decoder)
        self.post_init()

    def _run_layers(self, hidden_states: Tensor, call: ReformerCall, **kwargs: Any) -> Tensor:
        """(B, T, D) to (B, T, 2 D)."""
        return self.encoder(hidden_states, call)


@torch.compiler.disable
def draw_seed() -> int:
    """One number from torch's generator."""
    return int(torch.randint(SEED_BOUND, ()))


def _fill_chunks(hidden_states: Tensor, call: ReformerCall, config: ReformerConfig) -> Tensor:
    """Add masked pads up to whole chunks, where layers need them; changes the call's mask to match."""
    num_added = chunk_padding(call.num_tokens, call.layer_types, config.is_decoder, config)
    # An exported program may leave the length open, which makes it a symbol: then some are added, or none.
    if isinstance(num_added, int) and num_added == 0:
        return hidden_states
    mask = call.attention_mask
    if mask is None:
        mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    call.attention_mask = F.pad(mask, (0, num_added), value=False)
    return F.pad(hidden_states, (0, 0, 0, num_added))


__all__ = ["ReformerBody", "ReformerEmbeddings", "ReformerModel", "ReformerModelOutput", "ReformerPreTrainedModel"]
