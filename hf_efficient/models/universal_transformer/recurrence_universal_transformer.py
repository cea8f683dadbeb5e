"""The stack of a Universal Transformer: a group of blocks applied again and again, to what has not halted.

Letters in shape notes: B batch, L tokens of the call, S keys (earlier tokens too), M live tokens, D hidden_size, H
heads, K head size, T steps, G blocks in the group.

Per step: the coordinates join the states, u = s + P + tau; the halting unit reads u; the group's blocks turn u into
the next state. With `halted_states="copy"` only live positions change, but all serve as keys: those of the group's
first block are made of u (`halted_keys="refresh"`) or kept (`"stale"`), those of its other blocks, whose rows a halted
position no longer has, are kept.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from .adaptive_computation import HaltingState, accumulate_output, halting_step, initial_halting_state, ponder_loss
from .cache_universal_transformer import UniversalTransformerCache, begin_call
from .configuration_universal_transformer import UniversalTransformerConfig
from .coordinates import Coordinates, InputInjection
from .layers_universal_transformer import AttentionInputs, BlockOutput, UniversalTransformerBlock
from .live_positions import LivePositions
from .outputs_universal_transformer import UniversalTransformerOutput
from .packed_recurrence import PackedRecurrence
from .sharded_blocks import gather_for_projections, is_sharded
from .stack_call import Keys, StackCall

# Positions of a call from which on packing pays; below it costs more small operations than it saves large ones.
LEAST_PACKED = 64


class HaltingProjection(nn.Linear):
    """The weights w and the bias b of the halting unit; a class of its own for its initial bias."""


class HaltingUnit(nn.Module):
    """The probability that a position halts, from its u: sigmoid(w u + b), with a LayerNorm of its own before."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.halting_norm else None
        self.projection = HaltingProjection(config.hidden_size, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., D) to probabilities (...), at least float32."""
        logits = self.projection(rows if self.norm is None else self.norm(rows))[..., 0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


class InputBias(nn.Module):
    """One learned vector for all inputs of an encoder: the row of tensor2tensor's target space."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return embeds + self.bias


class UniversalTransformerStack(nn.Module):
    """Embeddings to final states: prelude, recurrence, coda, and with pre-norm a last LayerNorm."""

    def __init__(self, config: UniversalTransformerConfig, is_causal: bool, has_cross_attention: bool):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.has_cross_attention = has_cross_attention
        self.input_bias = InputBias(config) if config.encoder_input_bias and not is_causal else None
        self.dropout = nn.Dropout(config.dropout)
        self.coordinates = Coordinates(config)
        self.injection = InputInjection(config) if config.input_injection else None
        self.halting = HaltingUnit(config) if config.is_halting else None
        self.prelude = self._blocks(config.num_prelude_layers)
        self.group = self._blocks(config.num_layers_in_group)
        self.coda = self._blocks(config.num_coda_layers)
        is_pre_norm = config.norm_position == "pre"
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if is_pre_norm else None

    def _blocks(self, number: int) -> nn.ModuleList:
        return nn.ModuleList(
            UniversalTransformerBlock(self.config, self.is_causal, self.has_cross_attention) for _ in range(number)
        )

    def run(self, embeds: Tensor, call: StackCall) -> UniversalTransformerOutput:
        """Embeddings (B, L, D) to the output, and their keys into the call's cache.

        Cost: O(T G B L (D² + D F)) and attention, where T is the mean number of steps with packing, else the largest.
        """
        if call.cache is not None:
            begin_call(call.own_cache, self.config, call.num_steps)
            call.num_past = call.own_cache.get_seq_length()
        states = self.dropout(embeds if self.input_bias is None else self.input_bias(embeds))
        call.report("hidden_states", 0, states)
        self._prepare(states, call)
        states = self._ordinary(self.prelude, states, 0, call)
        if self.injection is not None:
            call.injected = self.injection.prepare(states)
        halting = {}
        if self.halting is None:
            states = self._fixed_steps(states, call)
        else:
            states, halting = self._halting_steps(states, call)
        num_before = len(self.prelude) + self.config.num_layers_in_group * self._num_step_slots(call)
        states = self._ordinary(self.coda, states, num_before, call)
        if self.final_norm is not None:
            states = self.final_norm(states)
        call.report("hidden_states", num_before + len(self.coda), states)
        return UniversalTransformerOutput(
            last_hidden_state=states,
            past_key_values=call.cache,
            hidden_states=call.reported("hidden_states"),
            attentions=call.reported("attentions"),
            cross_attentions=call.reported("cross_attentions"),
            step_hidden_states=call.reported("step_hidden_states"),
            **halting,
        )

    def _prepare(self, states: Tensor, call: StackCall) -> None:
        """Positions, and keys of the encoder: what is the same in every step."""
        call.shape = tuple(states.shape[:2])
        blocks = [*self.prelude, *self.group, *self.coda]
        call.is_sharded = is_sharded(self.group[0])
        if call.is_sharded:
            gather_for_projections(blocks)
        if call.position_offset is None:
            call.position_ids = self.coordinates.shift(call.position_ids, states.shape[0])
        else:
            call.position_ids = call.position_ids + call.position_offset.to(states.device)
        call.signal = self.coordinates.position_signal(call.position_ids, states.dtype)
        call.rotary = self.coordinates.rotary(call.position_ids, states.dtype)
        call.memories = [self._memory(block, index, call) for index, block in enumerate(blocks)]

    def _memory(self, block: UniversalTransformerBlock, index: int, call: StackCall) -> Keys | None:
        """Keys and values (B, H, S, K) of the encoder for a block; computed once for all steps and all tokens.

        Raises:
            ValueError: the cache was begun with a source of another length.
        """
        if not self.has_cross_attention:
            return None
        if not isinstance(call.cache, EncoderDecoderCache):
            return block.project_memory(call.encoder_states)
        cache = call.cache.cross_attention_cache
        if call.cache.is_updated.get(index):
            keys, values = cache.layers[index].keys, cache.layers[index].values
            if keys.shape[2] != call.encoder_states.shape[1]:
                raise ValueError(
                    f"past_key_values holds keys of {keys.shape[2]} encoder positions, but the encoder's states have "
                    f"{call.encoder_states.shape[1]}; pass a new cache for another source."
                )
            return keys, values
        memory = cache.update(*block.project_memory(call.encoder_states), index)
        call.cache.is_updated[index] = True
        return memory

    def _num_step_slots(self, call: StackCall) -> int:
        """Steps that have cache slots of their own."""
        return 1 if self.config.share_cache else call.num_steps

    def slot(self, step: int, index: int) -> int:
        """Cache slot of block `index` of the group in a step."""
        first = 0 if self.config.share_cache else step * len(self.group)
        return len(self.prelude) + first + index

    # Blocks

    def _ordinary(self, blocks: nn.ModuleList, states: Tensor, first_slot: int, call: StackCall) -> Tensor:
        """Blocks that run once, before or after the recurrence; positions are added once before them."""
        if len(blocks) == 0:
            return states
        rows = states if call.signal is None else states + call.signal
        first_block = 0 if blocks is self.prelude else len(self.prelude) + len(self.group)
        inputs = self.attention_inputs(LivePositions.everything(*states.shape[:2]), call)
        for index, block in enumerate(blocks):
            keys = block.project_keys(rows, call.rotary) if call.cache is not None else None
            rows = self.run_block(block, rows, keys, inputs, (first_slot + index, first_block + index), call)
        return rows

    def attention_inputs(self, live: LivePositions, call: StackCall) -> AttentionInputs:
        """What the blocks are told about the rows of `live`."""
        num_encoder_keys = 0 if call.cross_mask is None else call.cross_mask.shape[3]
        rotary, tokens = call.rotary, call.tokens
        if not live.is_everything and rotary is not None:
            shape = (live.batch_size, live.length, rotary[0].shape[-1])
            rotary = (live.gather(rotary[0].expand(shape)), live.gather(rotary[1].expand(shape)))
        return AttentionInputs(
            live=live,
            mask=live.query_mask(call.mask, self.is_causal, call.num_past + call.length),
            cross_mask=live.query_mask(call.cross_mask, False, num_encoder_keys),
            rotary=rotary,
            row_mask=None if tokens is None else live.gather(tokens),
        )

    def run_block(
        self,
        block: UniversalTransformerBlock,
        rows: Tensor,
        keys: Keys | None,
        inputs: AttentionInputs,
        place: tuple[int, int],
        call: StackCall,
    ) -> Tensor:
        """One block: its keys (B, L, H, K) join those of earlier tokens; None where it makes its own.

        Args:
            place: the cache slot, and the number of the block among those with weights of their own.
        """
        slot, number = place
        if keys is not None:
            keys = tuple(part.transpose(1, 2) for part in keys)
            if call.cache is not None:
                keys = call.own_cache.update(*keys, slot)
        has_state = isinstance(call.own_cache, UniversalTransformerCache)
        output = block(
            rows,
            *(keys or (None, None)),
            *(call.memories[number] or (None, None)),
            inputs,
            call.own_cache.convolution_state(slot) if has_state else None,
        )
        # Some checkpointing returns a plain tuple.
        output = BlockOutput(*output)
        if has_state and output.convolution_rows is not None:
            call.own_cache.update_convolution_state(slot, output.convolution_rows)
        call.report("hidden_states", slot + 1, output.rows)
        call.report("attentions", slot, output.attentions)
        call.report("cross_attentions", slot, output.cross_attentions)
        return output.rows

    # Steps

    def _enter(self, states: Tensor, step: int, call: StackCall) -> Tensor:
        """u (B, L, D) of a step, from all states."""
        signal = call.signal
        if self.config.step_position_offset:
            lengths = states.new_full(states.shape[:1], states.shape[1], dtype=torch.int64)
            if call.tokens is not None and not self.config.count_padding:
                lengths = call.tokens.sum(dim=1)
            offset = self.coordinates.step_offset(lengths, step, call.num_steps)
            signal = self.coordinates.position_signal(call.position_ids + offset, states.dtype)
        return self.enter(states, signal, call.injected, step)

    def enter(self, rows: Tensor, signal: Tensor | None, injected: Tensor | None, step: int | None) -> Tensor:
        """u (..., D) of a step: the states, the recurrence's input if it is injected, and the coordinates.

        Args:
            rows, signal, injected: (..., D) of some positions; the last two may be None.
            step: None: as if the step signal were zero.
        """
        if self.injection is not None:
            rows = self.injection(rows, injected)
        return self.coordinates.add(rows, signal, step)

    def _fixed_steps(self, states: Tensor, call: StackCall) -> Tensor:
        """All steps for all positions."""
        live = LivePositions.everything(*states.shape[:2])
        inputs = self.attention_inputs(live, call)
        first = 0 if call.num_gradient_steps is None else call.num_steps - call.num_gradient_steps
        call.report("step_hidden_states", 0, states)
        for step in range(call.num_steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= first):
                rows = self._enter(states, step, call)
                for index, block in enumerate(self.group):
                    keys = block.project_keys(rows, call.rotary) if call.cache is not None else None
                    place = (self.slot(step, index), len(self.prelude) + index)
                    rows = self.run_block(block, rows, keys, inputs, place, call)
            states = rows
            call.report("step_hidden_states", step + 1, states)
        return states

    def _halting_steps(self, states: Tensor, call: StackCall) -> tuple[Tensor, dict[str, Tensor]]:
        """Steps until all positions have halted: the output (B, L, D), and the output's fields about halting."""
        if self._packs(call):
            output, state, probabilities = PackedRecurrence(self, call).run(states)
        else:
            output, state, probabilities = self._full_steps(states, call)
        return output, self._halting_fields(state, probabilities, call)

    def _packs(self, call: StackCall) -> bool:
        """Whether only live positions are computed. A graph has no shapes that depend on data, nor has a static cache,
        and a caller who wants all states gets all computed."""
        config = self.config
        if config.pack_live_positions is False or torch.compiler.is_compiling() or call.wanted:
            return False
        if call.own_cache is not None and call.own_cache.is_compileable:
            return False
        if call.is_sharded or 0 in call.shape:
            return False
        if config.halted_states == "evolving" or config.transition == "separable_convolution":
            return False
        if config.step_position_offset:
            return False
        return bool(config.pack_live_positions) or call.batch_size * call.length >= LEAST_PACKED

    def _full_steps(self, states: Tensor, call: StackCall) -> tuple[Tensor, HaltingState, list[Tensor]]:
        """The steps, computed for all positions: the output (B, L, D), the halting state, and the probabilities of
        every step taken. The truth for `packed_recurrence.py`."""
        state = self.initial_state(states, call)
        output = torch.zeros_like(states, dtype=state.cumulative.dtype)
        kept: list[Keys | None] = [None] * len(self.group)
        probabilities: list[Tensor] = []
        call.report("step_hidden_states", 0, states)
        for step in range(call.num_steps):
            moving = state.live
            if step > 0 and not self._takes_all_steps(call) and not moving.any():
                self._fill_cache(states, kept, step, call)
                break
            entering = self._enter(states, step, call)
            probability = self.pool_probability(self.halting(entering), call)
            probabilities.append(probability * moving)
            state, weights = halting_step(state, probability, step=step, **call.halting_settings(self.config))
            rows = self._group_step(entering, moving, kept, step, call)
            states = self._keep_halted(states, rows, moving)
            call.report("hidden_states", self.slot(step, len(self.group)), states)
            output = accumulate_output(output, states, weights.expand(call.shape), self.config.act_output)
            call.report("step_hidden_states", step + 1, states)
        self._fill_reports(states, len(probabilities), call)
        return output.to(states.dtype), state, probabilities

    def initial_state(self, states: Tensor, call: StackCall) -> HaltingState:
        """Everything live but pads, (B, L); (B, 1) where a sequence halts as a whole."""
        if self.config.halting_scope == "sequence":
            live = torch.ones(call.batch_size, 1, dtype=torch.bool, device=states.device)
        elif call.tokens is None or self.config.count_padding:
            live = torch.ones(call.shape, dtype=torch.bool, device=states.device)
        else:
            live = call.tokens
        return initial_halting_state(live, states.dtype)

    def _takes_all_steps(self, call: StackCall) -> bool:
        """Whether the loop goes on when all have halted: a graph has no such branch, other processes may go on, and
        later tokens, or the caller, may ask for what halted positions go on to do."""
        if torch.compiler.is_compiling() or call.is_sharded or call.wanted & {"hidden_states", "attentions"}:
            return True
        goes_on = self.config.halted_states == "evolving" or self.config.transition == "separable_convolution"
        return goes_on and (call.cache is not None or "step_hidden_states" in call.wanted)

    def pool_probability(self, probability: Tensor, call: StackCall) -> Tensor:
        """(B, L) as it is, or (B, 1) where a sequence halts as a whole: the mean over its tokens."""
        if self.config.halting_scope == "token":
            return probability
        if call.tokens is None or self.config.count_padding:
            return probability.mean(dim=1, keepdim=True)
        tokens = call.tokens
        return (probability * tokens).sum(dim=1, keepdim=True) / tokens.sum(dim=1, keepdim=True).clamp(min=1)

    def _group_step(self, rows: Tensor, moving: Tensor, kept: list[Keys | None], step: int, call: StackCall) -> Tensor:
        """The group's blocks in turn, from u (B, L, D); `kept`, the last keys of each, is brought up to date.

        Args:
            moving: (B, L or 1) bool, positions that had not halted before the step.
        """
        inputs = self.attention_inputs(LivePositions.everything(*call.shape), call)
        for index, block in enumerate(self.group):
            keys = None
            if self._keeps_keys(index):
                keys = block.project_keys(rows, call.rotary)
                if kept[index] is not None:
                    pairs = zip(kept[index], keys, strict=True)
                    keys = tuple(self._keep_halted(old, new, moving) for old, new in pairs)
                kept[index] = keys
            elif call.cache is not None:
                keys = block.project_keys(rows, call.rotary)
            place = (self.slot(step, index), len(self.prelude) + index)
            rows = self.run_block(block, rows, keys, inputs, place, call)
        return rows

    def _keeps_keys(self, index: int) -> bool:
        """Whether a halted position's keys in block `index` of the group are those of its last step."""
        config = self.config
        return config.halted_states == "copy" and (index > 0 or config.halted_keys == "stale")

    def _keep_halted(self, old: Tensor, new: Tensor, moving: Tensor) -> Tensor:
        """(B, L, ...) with what moving positions became; halted ones are as they were, unless they evolve."""
        if self.config.halted_states == "evolving":
            return new
        return torch.where(moving.view(*moving.shape, *[1] * (old.ndim - 2)), new, old)

    # After the last step

    def _fill_cache(self, states: Tensor, kept: list[Keys | None], first_step: int, call: StackCall) -> None:
        """Write the keys that halted positions have in the steps that no position took, for later tokens.

        Those that differ from step to step are made by one projection.
        """
        if call.cache is None:
            return
        steps = range(call.num_steps - 1 if self.config.share_cache else first_step, call.num_steps)
        is_kept = [self._keeps_keys(index) for index in range(len(self.group))]
        if not is_kept[0]:
            shifts = self.coordinates.step_shifts(steps, states)
            rows = self.enter(states, call.signal, call.injected, None) + shifts[:, None, None]
            refreshed = self.group[0].project_keys(rows, call.rotary)
        cache = call.own_cache
        for number, step in enumerate(steps):
            first_slot = self.slot(step, 0)
            for index in range(len(self.group)):
                keys = kept[index] if is_kept[index] else (part[number] for part in refreshed)
                cache.update(*(part.transpose(1, 2) for part in keys), first_slot + index)

    def _fill_reports(self, states: Tensor, num_taken: int, call: StackCall) -> None:
        for step in range(num_taken, call.num_steps):
            call.report("step_hidden_states", step + 1, states)

    def _halting_fields(self, state: HaltingState, probabilities: list[Tensor], call: StackCall) -> dict[str, Tensor]:
        """The output's fields about halting; those of a whole sequence are repeated for its positions."""
        is_whole = self.config.halting_scope == "sequence"
        loss = ponder_loss(state, None if is_whole or self.config.count_padding else call.tokens)
        missing = [torch.zeros_like(probabilities[0])] * (call.num_steps - len(probabilities))
        fields = (state.ponder_times, state.remainders, torch.stack(probabilities + missing))
        fields = tuple(entry.expand(*entry.shape[:-1], call.length) for entry in fields)
        names = ("ponder_times", "remainders", "halting_probabilities")
        fields = dict(zip(names, fields, strict=True)) | {"ponder_loss": loss}
        if isinstance(call.own_cache, UniversalTransformerCache):
            call.own_cache.record_ponder_times(fields["ponder_times"])
        return fields


__all__ = ["HaltingProjection", "HaltingUnit", "InputBias", "StackCall", "UniversalTransformerStack"]
