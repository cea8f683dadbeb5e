"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): attention over the segment and a memory of the segments before.

Letters in shape notes: B batch, H heads, T tokens of the segment, M memory slots, S = M + T keys, K head_dim,
D hidden_size, V vocab_size.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    ModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, TailWords
from .adaptive_vocabulary import fits_vocabulary, resize_vocabulary, whole_blocks
from .cache_transformer_xl import TransformerXLCache
from .checkpoint_names_transformer_xl import register_checkpoint_names, to_model_names
from .configuration_transformer_xl import TransformerXLConfig
from .inputs_transformer_xl import (
    can_look_at,
    check_ids,
    check_labels,
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


@dataclass
class TransformerXLCausalLMOutput(ModelOutput):
    """Output of `TransformerXLForCausalLM`.

    Args:
        loss: scalar, mean negative log-likelihood in nats per predicted token.
        losses: per token and in token order, 0 where ignored: (B, T - 1) for `labels`, (B, T) for `shift_labels`.
        logits: (B, T, V); with an adaptive softmax normalised log-probabilities, which in training, beside a loss, are
            not computed: None.
        past_key_values: the memory after this segment.
        hidden_states: on request, the input of every layer and the final states, (B, T, D) each.
        attentions: on request and with `"eager"`, (B, H, T, S) for every layer.
    """

    loss: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: TransformerXLCache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


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


class TransformerXLForCausalLM(TransformerXLPreTrainedModel, GenerationMixin):
    """Language model: the body and a softmax, plain or adaptive, that may share the embedding's tables.

    Architecture: Dai et al. 2019, arXiv 1901.02860.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.model = TransformerXLModel(config)
        if config.is_adaptive:
            self.lm_head = AdaptiveSoftmax(config)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        if config.is_adaptive:
            for name in self.lm_head.tails:
                source = f"model.embed_tokens.tails.{name}.weight"
                self._tied_weights_keys[f"lm_head.tails.{name}.weight"] = source
            # Older files repeat the projections that the softmax takes from the embedding.
            tied = [str(i) for i, is_tied in enumerate(self.lm_head.tied_projections) if is_tied]
            self._keys_to_ignore_on_load_unexpected = [
                *self._keys_to_ignore_on_load_unexpected,
                *(rf"lm_head\.projections\.{i}$" for i in tied),
            ]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransformerXLCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TransformerXLCausalLMOutput:
        """Predict the next token of every position; arguments of `TransformerXLModel.forward` and these.

        Args:
            labels: (B, T) ids, shifted by one in here; -100 is ignored.
            shift_labels: (B, T), already shifted: entry t is token t + 1, so that the last one may be the first token
                of the next segment. Used instead of `labels` when both are given. (Among the keywords, because the
                Trainer would demand every named argument with "label" in it from each data set.)
            logits_to_keep: compute logits for the last so many positions, or for these indices; 0 means all. A loss
                does not depend on it; an adaptive softmax then computes no others.
            num_items_in_batch: predicted tokens of the whole (accumulated) batch, by which the summed loss is divided.

        Returns:
            `TransformerXLCausalLMOutput`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        tokens = inputs_embeds if input_ids is None else input_ids
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and tokens is not None:
                # Before the body runs, because that changes the memory.
                check_labels(name, given, tokens.shape[:2], self.config.vocab_size)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = losses = None
        if shift_labels is None and labels is not None:
            shift_labels, scored = labels[:, 1:], hidden_states[:, :-1]
        elif shift_labels is not None:
            scored = hidden_states
        if shift_labels is None or not (self.config.is_adaptive and self.training):
            logits = self._score(slice_logits_to_keep(hidden_states, logits_to_keep))
        if shift_labels is not None:
            is_whole = logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
            losses = self._losses(scored, shift_labels.to(scored.device), logits if is_whole else None)
        return TransformerXLCausalLMOutput(
            loss=None if losses is None else _mean_loss(losses, shift_labels, num_items_in_batch),
            losses=losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _score(self, hidden_states: Tensor, labels: Tensor | None = None) -> Tensor:
        """(..., D) to logits (..., V); with an adaptive softmax and `labels` (tokens,) to losses (tokens,)."""
        if not self.config.is_adaptive:
            return self.lm_head(hidden_states)
        shared = self.model.embed_tokens.project_back(hidden_states, self.lm_head.shared_bins)
        return self.lm_head(hidden_states, shared, labels)

    def _losses(self, hidden_states: Tensor, labels: Tensor, logits: Tensor | None) -> Tensor:
        """Negative log-likelihoods (B, T) of the shifted labels, float32, 0 where ignored; `logits` if at hand."""
        flat_labels = labels.reshape(-1)
        if self.config.is_adaptive and logits is None:
            losses = self._score(hidden_states.flatten(0, 1), flat_labels)
        else:
            logits = self._score(hidden_states) if logits is None else logits[:, : labels.shape[1]]
            exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
            loss = F.nll_loss if self.config.is_adaptive else F.cross_entropy
            losses = loss(logits.flatten(0, 1).to(exact), flat_labels, reduction="none")
        # A copy, because FSDP2 warns of outputs that are views.
        return losses.view(labels.shape).clone()

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.FloatTensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, but a generated token is never a pad, and the memory knows those of the prompt."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        cache = inputs.get("past_key_values")
        # A prompt read in chunks comes without `next_sequence_length`, before transformers 5.23 not even as the first.
        is_prompt = kwargs.get("is_first_iteration") or "next_sequence_length" not in kwargs
        if cache is not None and cache.get_seq_length() > 0 and not is_prompt:
            inputs.pop("attention_mask", None)
        return inputs

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let `generate` use a `TransformerXLCache`, and refuse what the memory cannot do exactly."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation={implementation!r} is no memory of Transformer-XL; leave it out, or use "
                "'offloaded' to keep the memory on the CPU."
            )
        is_rolled_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        if is_rolled_back:
            self._check_rollback(max_cache_length)
        if self.config.mem_len == 0:
            # Without a memory every step needs the whole prefix again. (This is `generate`'s own copy.)
            generation_config.use_cache = False
        if generation_config.use_cache is False:
            return
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = TransformerXLCache(self.config, offloading=implementation == "offloaded")
            model_kwargs["past_key_values"] = cache
        else:
            cache._is_user_defined = True
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def _check_rollback(self, max_length: int) -> None:
        config = self.config
        fits = config.memory_init == "empty" and max_length <= config.mem_len
        if not fits and not config.same_length:
            raise ValueError(
                f"Assisted decoding up to length {max_length} is not exact with mem_len={config.mem_len}, "
                f"memory_init={config.memory_init!r} and same_length=False: a token checked together with others sees "
                "more memory than one decoded alone. Set config.same_length=True, or a larger config.mem_len."
            )


# The Trainer asks this table of names whether labels are shifted in the model, for label smoothing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TransformerXLConfig.model_type] = TransformerXLForCausalLM.__name__


def _mean_loss(losses: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Sum of the losses over the number of predicted tokens; 0 when there are none."""
    if num_items is None:
        num_items = (labels != -100).sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(losses.device)
    return losses.sum() / num_items


class TransformerXLForSequenceClassification(TransformerXLPreTrainedModel):
    """The body (Dai et al. 2019, arXiv 1901.02860) and a linear layer on the last token of each row."""

    # Loss per row; transformers' Trainer then averages over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransformerXLModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransformerXLCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify each row by its last token: the last one the mask has, else the last that is no `pad_token_id`.

        Args:
            labels: (B,) class ids, (B,) or (B, num_labels) numbers for regression, (B, num_labels) of 0 and 1 for
                several classes a row; `config.problem_type` says which.
            kwargs: more arguments of `TransformerXLModel`; the others are described there.

        Raises:
            ValueError: several rows, and neither a mask nor `pad_token_id` to find their ends with.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = self._last_token(input_ids, attention_mask, outputs.last_hidden_state)
        rows = torch.arange(last.shape[0], device=last.device)
        logits = self.score(outputs.last_hidden_state[rows, last])
        loss = None
        if labels is not None:
            # A copy, because the loss function writes the problem type that it guesses into it.
            config = copy.copy(self.config)
            loss = self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_token(self, input_ids: Tensor | None, attention_mask: Tensor | None, states: Tensor) -> Tensor:
        """(B,) index of each row's last token within the segment."""
        batch_size, length, _ = states.shape
        if attention_mask is not None:
            is_token = attention_mask[:, -length:].to(states.device) != 0
        elif self.config.pad_token_id is not None and input_ids is not None:
            is_token = input_ids != self.config.pad_token_id
        elif batch_size == 1 or input_ids is None:
            return torch.full((batch_size,), length - 1, device=states.device)
        else:
            raise ValueError(
                f"Cannot tell where the {batch_size} rows end; pass an attention_mask, or set config.pad_token_id."
            )
        return (is_token * torch.arange(length, device=states.device)).argmax(dim=1)


class TransformerXLForTokenClassification(TransformerXLPreTrainedModel):
    """The body (Dai et al. 2019, arXiv 1901.02860) and a linear layer on every token."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransformerXLModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransformerXLCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify each token. `labels` (B, T) holds class ids, -100 is ignored; others as in `TransformerXLModel`."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


register_checkpoint_names(TransformerXLConfig.model_type)

__all__ = [
    "TransformerXLCausalLMOutput",
    "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification",
    "TransformerXLForTokenClassification",
    "TransformerXLModel",
    "TransformerXLPreTrainedModel",
]
