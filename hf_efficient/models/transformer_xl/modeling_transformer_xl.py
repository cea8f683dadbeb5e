"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): attention over the segment and a memory of the segments before.

Letters in shape notes: B batch, H heads, T tokens of the segment, M memory slots, S = M + T keys, K head_dim,
D hidden_size.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from .adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, TailWords
from .adaptive_vocabulary import fits_vocabulary, resize_vocabulary, whole_blocks
from .cache_transformer_xl import TransformerXLCache
from .checkpoint_names_transformer_xl import register_checkpoint_names, to_model_names
from .configuration_transformer_xl import TransformerXLConfig
from .inputs_transformer_xl import (
    can_look_at,
    check_ids,
    inverse,
    is_replica,
    pads_last,
    reorder,
    reorder_attention,
)
from .layers_transformer_xl import TransformerXLLayer
from .relative_attention import memory_attention_mask, sinusoid_table

# Position tables for decoding grow by doubling from this many rows, so that a step rarely projects a new one.
MIN_POSITION_ROWS = 256


class TransformerXLPreTrainedModel(PreTrainedModel):
    """What all Transformer-XL models share: configuration, initialisation and what they support."""

    config: TransformerXLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # A buffer of sinusoids in older files; computed where needed, in float32.
    _keys_to_ignore_on_load_unexpected = [r"pos_emb\.inv_freq$"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @property
    def _no_split_modules(self) -> set[str]:
        """Blocks that stay whole where a `device_map` divides the model, and that FSDP2 shards one by one."""
        return whole_blocks(self.config)

    @_no_split_modules.setter
    def _no_split_modules(self, blocks: set[str]) -> None:
        """transformers collects those of a model's parts, which are the same here."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Spec of the original release: everything N(0, initializer_range) or uniform, LayerNorm around 1."""
        config = self.config
        # First what is never tied, so that the numbers drawn for it do not depend on whether the tables are.
        if isinstance(module, (AdaptiveEmbedding, AdaptiveSoftmax)):
            for projection in module.projections.parameters():
                init.normal_(projection, mean=0.0, std=config.proj_init_std)
        if isinstance(module, AdaptiveSoftmax) and config.cutoffs:
            self._init_weight(module.cluster_weight)
            init.zeros_(module.cluster_bias)
        if hasattr(module, "content_bias"):
            self._init_weight(module.content_bias)
            self._init_weight(module.position_bias)
        if isinstance(module, (nn.Linear, nn.Embedding, AdaptiveEmbedding, AdaptiveSoftmax, TailWords)):
            self._init_weight(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.normal_(module.weight, mean=1.0, std=config.initializer_range)
            init.zeros_(module.bias)

    def _init_weight(self, weight: Tensor) -> None:
        if self.config.init_method == "uniform":
            init.uniform_(weight, -self.config.init_range, self.config.init_range)
        else:
            init.normal_(weight, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers.

        Raises:
            ValueError: the weights are to be sharded while they are read, which would cut the matrix that holds
                queries, keys and values on disk at the wrong rows.
        """
        if kwargs.get("distributed_config") is not None:
            raise ValueError(
                "distributed_config shards each weight as it is read, but a Transformer-XL checkpoint holds queries, "
                "keys and values in one; load the whole model and let Trainer or accelerate shard it (fsdp=True)."
            )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes the names on disk too: the Trainer reads a checkpoint's file by itself when it resumes."""
        return super().load_state_dict(to_model_names(state_dict), strict=strict, assign=assign)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; with an adaptive embedding the last bin takes or gives the tokens.

        Raises:
            ValueError: the new size would leave the last bin empty.
        """
        if not self.config.is_adaptive:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        vocab_size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            vocab_size = -(-vocab_size // pad_to_multiple_of) * pad_to_multiple_of
        return resize_vocabulary(self, vocab_size, mean_resizing)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """As in transformers, but an adaptive embedding gives way to another such one only.

        Raises:
            TypeError: `value` has other bins than the configuration, or none.
        """
        fits_vocabulary(self.config, value, AdaptiveEmbedding)
        super().set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """As in transformers, but an adaptive softmax gives way to another such one only.

        Raises:
            TypeError: `new_embeddings` has other bins than the configuration, or none.
        """
        fits_vocabulary(self.config, new_embeddings, AdaptiveSoftmax)
        super().set_output_embeddings(new_embeddings)

    def create_cache(self) -> TransformerXLCache:
        """An empty memory for this model; pass it as `past_key_values` and go on with the one that comes back."""
        return TransformerXLCache(self.config)


class TransformerXLModel(TransformerXLPreTrainedModel):
    """The body (Dai et al. 2019, arXiv 1901.02860): embedding, layers and memory.

    Transformer-XL has no positions of its own kind for padding: pads are moved behind the tokens before the first
    layer and moved back after the last, so that each row gets what it would get alone, with memory too.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        # Settings may have been changed since the configuration was built.
        config.validate_architecture()
        if config.is_adaptive:
            self.embed_tokens = AdaptiveEmbedding(config)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerXLLayer(config, i) for i in range(config.num_hidden_layers))
        if not config.untie_r:
            self.content_bias = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
            self.position_bias = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
            # Older files repeat the shared biases in every layer.
            self._keys_to_ignore_on_load_unexpected = [
                *self._keys_to_ignore_on_load_unexpected,
                r"layers\.\d+\.self_attn\.(content|position)_bias$",
            ]
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransformerXLCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run one segment, (B, T) ids, against the memory of the segments before.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: 1 for tokens, 0 for pads, anywhere; (B, T) for this segment or (B, tokens seen + T), of
                which the last T columns count. Pads do not enter the memory. None means no pads and is faster.
            past_key_values: the memory; it is updated in place and returned. Under `no_grad` in evaluation it keeps
                keys and values, which go stale when the weights change, otherwise hidden states.
            inputs_embeds: (B, T, D) instead of `input_ids`, before the scaling by sqrt(D).
            use_cache: return a memory when none was passed; default `config.use_cache`.
            output_hidden_states: return the input of every layer and the final states.
            output_attentions: return the attention weights, computed in the eager form for this call.

        Returns:
            Last hidden states (B, T, D) and what was asked for. Cost per layer O(B T (M + T) D + B (M + T) D^2) in
            training, O(B T (M + T) D + B T D^2) with kept keys and values.

        Raises:
            ValueError, TypeError: inputs of a wrong shape, ids outside the vocabulary, a mask of another shape, the
                memory of another batch or model.
        """
        config = self.config
        if "mems" in kwargs:
            raise TypeError("mems of transformers 4 is past_key_values now; pass what the last call returned there.")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        segment = self._embed(input_ids, inputs_embeds)
        order = num_pads = None
        memory, is_kept = self._open_memory(past_key_values, use_cache, segment)
        mask = self._segment_mask(attention_mask, segment, memory)
        if memory is not None:
            memory.start(segment)
        if mask is not None:
            order, num_pads = pads_last(mask)
            segment = reorder(segment, order)
        hidden_states = self.dropout(segment * config.hidden_size**0.5)

        all_hidden_states, all_attentions = [], []
        context = self._context(hidden_states, memory)
        context["implementation"] = "eager" if output_attentions else config._attn_implementation
        for index, layer in enumerate(self.layers):
            layer_input = hidden_states
            remembered = None if memory is None else memory.layers[index].hidden_states
            hidden_states, weights = layer(hidden_states, memory=remembered, num_pads=num_pads, **context)
            if is_kept and context["past_key_values"] is None:
                memory.layers[index].append_hidden_states(layer_input, num_pads)
            if output_hidden_states:
                all_hidden_states.append(layer_input)
            if output_attentions:
                all_attentions.append(weights)
        hidden_states = self.dropout(hidden_states)
        if is_kept:
            memory.count_tokens(hidden_states.shape[1], num_pads)

        if order is not None:
            back = inverse(order)
            hidden_states = reorder(hidden_states, back)
            all_hidden_states = [reorder(states, back) for states in all_hidden_states]
            all_attentions = [reorder_attention(weights, back) for weights in all_attentions]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=memory if is_kept else None,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, but must be (batch, length, "
                    f"{self.config.hidden_size})."
                )
            return inputs_embeds
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}, but must hold whole numbers in "
                "shape (batch, length)."
            )
        # On an accelerator the lookup itself stops at such an id.
        check_ids("input_ids", input_ids, self.config.vocab_size)
        return self.embed_tokens(input_ids)

    def _open_memory(
        self, past_key_values: TransformerXLCache | None, use_cache: bool | None, segment: Tensor
    ) -> tuple[TransformerXLCache | None, bool]:
        """The memory to read from, and whether it is to take in this segment."""
        if past_key_values is not None and not isinstance(past_key_values, TransformerXLCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}, but the memory of Transformer-XL is a "
                "TransformerXLCache; make one with model.create_cache()."
            )
        if torch.compiler.is_exporting():
            if use_cache or past_key_values is not None:
                raise ValueError(
                    "An exported graph takes and returns tensors alone, so it cannot carry the memory of "
                    "Transformer-XL: leave past_key_values out, and use_cache or set it to False."
                )
            use_cache = False
        if is_replica(self, past_key_values, use_cache):
            use_cache = False
        use_cache = self.config.use_cache if use_cache is None else use_cache
        # A model without memory has nothing to return; `generate` then feeds it the whole prefix each step.
        is_kept = past_key_values is not None or (use_cache and self.config.mem_len > 0)
        memory = past_key_values
        if memory is None and (is_kept or self.config.memory_init == "zeros"):
            memory = self.create_cache()
        if memory is not None:
            memory.check_fits(segment.shape[0], self.config)
            if memory.holds_keys and self.training:
                raise ValueError(
                    "past_key_values was filled in evaluation and holds keys and values, through which W_k and W_v "
                    "get no gradient; start training with a new cache."
                )
        return memory, is_kept

    def _segment_mask(
        self, attention_mask: Tensor | None, segment: Tensor, memory: TransformerXLCache | None
    ) -> Tensor | None:
        """The mask's last T columns, (B, T) bool, True for tokens; None when there are no pads."""
        if attention_mask is None:
            return None
        batch_size, length = segment.shape[:2]
        seen = 0 if memory is None else memory.get_seq_length()
        if tuple(attention_mask.shape) not in ((batch_size, length), (batch_size, seen + length)):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but must be ({batch_size}, {length}) for "
                f"the segment or ({batch_size}, {seen + length}) for all tokens so far."
            )
        mask = attention_mask != 0
        if seen and mask.shape[1] > length and not torch.compiler.is_compiling():
            # `generate` passes a mask for its first step only, so that nothing waits here for the device later.
            memory.check_mask(mask[:, :-length])
        mask = mask[:, -length:]
        if can_look_at(mask) and mask.all():
            return None
        return mask.to(segment.device)

    def _context(self, hidden_states: Tensor, memory: TransformerXLCache | None) -> dict[str, Any]:
        """What all layers are given alike: positions, mask, biases, and the cache if it keeps keys and values."""
        config, length = self.config, hidden_states.shape[1]
        memory_len = 0 if memory is None else memory.memory_length
        # An exported graph keeps nothing, and a kept table of positions has lengths of its own.
        is_frozen = not (self.training or torch.is_grad_enabled() or torch.compiler.is_exporting())
        cache = memory if memory is not None and (is_frozen or memory.holds_keys) else None
        return {
            "positions": self._positions(memory_len + length + 1, hidden_states, cache),
            "attention_mask": memory_attention_mask(
                length,
                memory_len,
                None if memory is None else memory.padded_row_lengths,
                config.mem_len if config.same_length else None,
                hidden_states.device,
            ),
            "past_key_values": cache,
            "shared_biases": None if config.untie_r else (self.content_bias, self.position_bias),
        }

    def _positions(self, num_rows: int, hidden_states: Tensor, cache: TransformerXLCache | None) -> Tensor | None:
        """Sinusoid table of at least `num_rows` distances (R, D), or None when the cache holds projected ones."""
        clamp_len = self.config.clamp_len
        limit = clamp_len + 1 if clamp_len > 0 else None
        num_rows = num_rows if limit is None else min(num_rows, limit)
        # A kept projection has no graph, so it serves only where none is built.
        if cache is not None and not torch.is_grad_enabled():
            if cache.clamp_len == clamp_len and cache.num_position_rows >= num_rows:
                return None
            num_rows = max(MIN_POSITION_ROWS, 1 << (num_rows - 1).bit_length())
            num_rows = num_rows if limit is None else min(num_rows, limit)
            cache.clamp_len = clamp_len
        table = sinusoid_table(num_rows, self.config.hidden_size, hidden_states.dtype, hidden_states.device)
        return self.dropout(table)


register_checkpoint_names(TransformerXLConfig.model_type)

__all__ = ["TransformerXLModel", "TransformerXLPreTrainedModel"]
