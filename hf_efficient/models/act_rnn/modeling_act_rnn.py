"""Recurrent networks with and without Adaptive Computation Time (Graves 2016, arXiv 1603.08983): body.

Letters in shape notes: B batch, L tokens, I input_size, D hidden_size, S a layer's state (D, for an LSTM 2 D),
N most inner steps that any token of the batch took.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .adaptive_recurrence import Pondering, States, ponder
from .cache_act_rnn import ActRnnCache
from .configuration_act_rnn import ActRnnConfig
from .inputs_act_rnn import check_ids, inverse, is_replica, pads_last, reorder, segment_mask
from .recurrent_layers import RECURRENT_MODULES, RecurrentLayer


@dataclass
class ActRnnModelOutput(ModelOutput):
    """Output of `ActRnnModel`; what belongs to pondering is None without ACT.

    Args:
        last_hidden_state: (B, L, D), the topmost layer's output, 0 at pads.
        past_key_values: the recurrent state after the last token.
        hidden_states: on request, the inputs (B, L, I) and every layer's output (B, L, D).
        ponder_times: (B, L), number of inner steps N(t), 0 at pads.
        remainders: (B, L), what the last inner step took, R(t) in (0, 1]; 0 at pads.
        halting_probabilities: on request, (N, B, L), 0 for inner steps that a token did not take.
        ponder_loss: scalar, the mean of N(t) + R(t) over all tokens; in training mode only. (Pipelines take every
            output apart into rows, and stumble over one that has none.)
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: ActRnnCache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    ponder_times: torch.FloatTensor | None = None
    remainders: torch.FloatTensor | None = None
    halting_probabilities: torch.FloatTensor | None = None
    ponder_loss: torch.FloatTensor | None = None


class ActRnnPreTrainedModel(PreTrainedModel):
    """What all of them share: configuration, initialisation and what they support."""

    config: ActRnnConfig
    base_model_prefix = "model"
    _no_split_modules = ["RecurrentLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # A state cannot be rolled back, so there is no assisted decoding.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torch's own: recurrent and linear layers uniform in ±1/sqrt(hidden_size), embeddings normal."""
        config = self.config
        bound = config.hidden_size**-0.5
        if isinstance(module, (*RECURRENT_MODULES.values(), nn.Linear)):
            for parameter in module.parameters(recurse=False):
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Embedding):
            # A tied table is also the output's matrix, whose logits should have size 1.
            init.normal_(module.weight, mean=0.0, std=bound if config.tie_word_embeddings else 1.0)
        if isinstance(module, HaltingUnit):
            init.constant_(module.bias, config.halting_bias_init)

    def create_cache(self) -> ActRnnCache:
        """An empty state for this model; pass it as `past_key_values` and go on with the one that comes back."""
        return ActRnnCache(self.config)


class HaltingUnit(nn.Linear):
    """W_h s + b_h, read from the state after the inner step (equation 5); a class of its own for its initial bias.

    Its result is a linear layer's: tools that put another layer in its place know nothing of the sigmoid.
    """

    def __init__(self, config: ActRnnConfig):
        super().__init__(config.hidden_size, 1)


class ActRnnModel(ActRnnPreTrainedModel):
    """The body (Graves 2016, arXiv 1603.08983): embedding, if there is a vocabulary, and recurrent layers.

    Without ACT each layer reads the whole sequence by torch's fused kernels. With ACT all layers together ponder over
    one token after the other: cost per token is the largest number of inner steps of any row.
    """

    def __init__(self, config: ActRnnConfig):
        super().__init__(config)
        # Settings may have been changed since the configuration was built.
        config.validate_architecture()
        self.is_adaptive = config.halting == "act"
        self.embed_tokens = None
        if config.vocab_size is not None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.input_size)
        # The flag unit tells a new input from one that is pondered over (equation 4).
        input_sizes = [config.input_size + self.is_adaptive] + [config.hidden_size] * (config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(RecurrentLayer(config.cell, size, config.hidden_size) for size in input_sizes)
        if self.is_adaptive:
            self.halting = HaltingUnit(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: ActRnnCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_halting_probabilities: bool = False,
        **kwargs: Any,
    ) -> ActRnnModelOutput:
        """Read a batch of sequences, (B, L) ids or (B, L, I) vectors.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: 1 for tokens, 0 for pads, anywhere; (B, L) for this segment or (B, tokens seen + L), of
                which the last L columns count. A pad leaves the state as it is. None means no pads and is faster.
            past_key_values: the state to go on from; it is updated in place and returned.
            inputs_embeds: (B, L, I) instead of `input_ids`.
            use_cache: return a state when none was passed; default `config.use_cache`.
            output_hidden_states: return the inputs and every layer's output.
            output_halting_probabilities: return the probability of halting at every inner step.

        Raises:
            ValueError, TypeError: inputs of a wrong shape, ids outside the vocabulary, a mask of another shape, the
                state of another batch or model.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs = self._embed(input_ids, inputs_embeds)
        cache = self._open_cache(past_key_values, use_cache, inputs)
        mask = segment_mask(attention_mask, inputs.shape[:2], 0 if cache is None else cache.get_seq_length())
        if cache is not None and torch.compiler.is_exporting():
            raise ValueError("An exported program cannot keep a recurrent state; export it with use_cache=False.")
        states = None if cache is None else cache.states()
        if states is None:
            states = (inputs.new_zeros(inputs.shape[0], config.state_size),) * config.num_hidden_layers

        run = self._run_adaptively if self.is_adaptive else self._run_fused
        outputs, states, tokens = run(self.dropout(inputs), states, mask)
        if cache is not None:
            cache.update_states(states, inputs.shape[1])
        hidden_states = self.dropout(outputs[-1])
        return ActRnnModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            hidden_states=(inputs, *outputs[:-1], hidden_states) if output_hidden_states else None,
            **self._pondering(tokens, mask, output_halting_probabilities),
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != config.input_size or inputs_embeds.shape[1] == 0:
                raise ValueError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, but must be (batch, length from 1, "
                    f"{config.input_size})."
                )
            return inputs_embeds
        if config.vocab_size is None:
            raise ValueError("input_ids were given, but vocab_size=None reads vectors only; give inputs_embeds.")
        if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}, but must hold whole numbers in "
                "shape (batch, length from 1)."
            )
        # On an accelerator the lookup itself stops at such an id.
        check_ids("input_ids", input_ids, config.vocab_size)
        return self.embed_tokens(input_ids)

    def _open_cache(
        self, past_key_values: ActRnnCache | None, use_cache: bool | None, inputs: Tensor
    ) -> ActRnnCache | None:
        if is_replica(self, past_key_values, use_cache):
            return None
        if past_key_values is None:
            if use_cache is None:
                # An exported program cannot return one.
                use_cache = self.config.use_cache and not torch.compiler.is_exporting()
            return self.create_cache() if use_cache else None
        if not isinstance(past_key_values, ActRnnCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}, but the state of a recurrent network is an "
                "ActRnnCache; make one with model.create_cache()."
            )
        past_key_values.check_fits(inputs.shape[0], self.config)
        return past_key_values

    def _run_fused(
        self, inputs: Tensor, states: States, mask: Tensor | None
    ) -> tuple[list[Tensor], States, list[Pondering]]:
        """All layers over the whole sequence: each layer's outputs (B, L, D), final states, no pondering."""
        order = lengths = None
        if mask is not None:
            order, num_pads = pads_last(mask)
            lengths = mask.shape[1] - num_pads
            inputs = reorder(inputs, order)
        outputs, final_states = [], []
        for layer, state in zip(self.layers, states, strict=True):
            output, final_state = layer(self.dropout(outputs[-1]) if outputs else inputs, state, lengths)
            outputs.append(output)
            final_states.append(final_state)
        if order is not None:
            back = inverse(order)
            outputs = [reorder(output, back) for output in outputs]
        return outputs, tuple(final_states), []

    def _check_single_steps(self) -> None:
        """Refuse what brings weights back, or records, for calls of whole layers only."""
        if torch.compiler.is_exporting():
            raise ValueError(
                "Pondering repeats its step as often as the data asks for, which an exported program cannot; only "
                'models with halting="none" can be exported.'
            )
        weights = list(self.layers.parameters())
        if any(weight.is_meta for weight in weights):
            raise ValueError(
                "Weights of the recurrent layers are offloaded (device_map, or accelerate's offload), but pondering "
                "takes single steps, for which they are not brought back; load the layers onto a device."
            )
        # The attribute tells a DTensor, of which the import is slow.
        if any(hasattr(weight, "placements") for weight in weights):
            raise ValueError(
                "FSDP2 has sharded the recurrent layers, but pondering takes single steps, for which they are not "
                "gathered; use DDP, or shard the model as a whole: fully_shard(model) alone."
            )

    def _run_adaptively(
        self, inputs: Tensor, states: States, mask: Tensor | None
    ) -> tuple[list[Tensor], States, list[Pondering]]:
        """One token after the other: each layer's outputs (B, L, D), final states, each token's pondering."""
        self._check_single_steps()
        size = self.config.hidden_size
        # What does not depend on the state is computed for all tokens at once.
        projected, flag = self.layers[0].project_flagged(inputs)
        tokens: list[Pondering] = []
        for position, of_token in enumerate(projected.unbind(dim=1)):
            live = None if mask is None else mask[:, position]
            token = self._ponder(of_token, flag, states, live)
            states = token.states
            tokens.append(token)
        outputs = []
        for layer_states in zip(*(token.states for token in tokens), strict=True):
            output = torch.stack([state[:, :size] for state in layer_states], dim=1)
            # At a pad stands what the state was before; the output there is nothing.
            outputs.append(output if mask is None else output * mask[..., None])
        return outputs, states, tokens

    def _ponder(self, projected: Tensor, flag: Tensor, states: States, live: Tensor | None) -> Pondering:
        """Inner steps on one token, from the inputs' part of the lowest layer's gates (B, G D)."""
        flagged = projected + flag

        def transition(states: States, is_first: bool) -> States:
            new_states = [self.layers[0].step(flagged if is_first else projected, states[0])]
            for layer, state in zip(self.layers[1:], states[1:], strict=True):
                below = self.dropout(new_states[-1][:, : self.config.hidden_size])
                new_states.append(layer.step(layer.project(below), state))
            return tuple(new_states)

        def halting_unit(states: States) -> Tensor:
            scores = self.halting(states[-1][:, : self.config.hidden_size])[:, 0]
            return torch.sigmoid(scores.to(torch.promote_types(scores.dtype, torch.float32)))

        config = self.config
        token = ponder(
            transition,
            halting_unit,
            states,
            live,
            max_steps=config.max_steps,
            threshold=config.halting_threshold,
        )
        if live is None:
            return token
        kept = (torch.where(live[:, None], new, old) for new, old in zip(token.states, states, strict=True))
        return token._replace(states=tuple(kept))

    def _pondering(self, tokens: list[Pondering], mask: Tensor | None, with_probabilities: bool) -> dict[str, Tensor]:
        """What the tokens' inner steps came to, as fields of `ActRnnModelOutput`, 0 at pads and steps not taken."""
        if not tokens:
            return {}
        found = {
            name: torch.stack([getattr(token, name) for token in tokens], dim=1)
            for name in ("ponder_times", "remainders")
        }
        if mask is not None:
            found = {name: of_tokens * mask for name, of_tokens in found.items()}
        if with_probabilities:
            probabilities = _stack_probabilities(tokens)
            step_index = torch.arange(len(probabilities), device=probabilities.device)[:, None, None]
            found["halting_probabilities"] = probabilities * (step_index < found["ponder_times"])
        if self.training:
            found["ponder_loss"] = mean_ponder_loss(found["ponder_times"], found["remainders"])
        return found


def mean_ponder_loss(ponder_times: Tensor, remainders: Tensor) -> Tensor:
    """Mean of N(t) + R(t) over the tokens, from (B, L) each, 0 at pads; 0 where there is no token."""
    return (ponder_times + remainders).sum() / (ponder_times > 0).sum().clamp(min=1)


def _stack_probabilities(tokens: list[Pondering]) -> Tensor:
    """(N, B) of each token, N its own, to (N, B, L)."""
    deepest = max(len(token.halting_probabilities) for token in tokens)
    padded = [
        F.pad(token.halting_probabilities, (0, 0, 0, deepest - len(token.halting_probabilities))) for token in tokens
    ]
    return torch.stack(padded, dim=-1)


__all__ = ["ActRnnModel", "ActRnnModelOutput", "ActRnnPreTrainedModel", "mean_ponder_loss"]
