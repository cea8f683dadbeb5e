"""Configuration of the Universal Transformer (Dehghani et al. 2019, arXiv 1807.03819)."""

import difflib
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .presets import find_preset

# What a field may be set to, for those that are a choice.
CHOICES = {
    "norm_position": ("pre", "post"),
    "transition": ("feed_forward", "separable_convolution"),
    "position_signal": ("sinusoid", "learned", "rotary", "none"),
    "step_signal": ("learned", "sinusoid", "none"),
    "coordinate_combination": ("add", "concat"),
    "halting": ("none", "act"),
    "halting_scope": ("token", "sequence"),
    "act_output": ("weighted_sum", "interpolation"),
    "halted_states": ("copy", "evolving"),
    "halted_keys": ("refresh", "stale"),
    "share_cache": (None, "last_step"),
    "random_depth": (None, "uniform", "poisson_lognormal"),
    "pooling": ("mean", "first", "last"),
}

# tensor2tensor's other recurrences.
REFUSED_RECURRENCES = ("gru", "lstm", "highway", "skip", "dwa")

# What other architectures call a setting that is meant here by another name.
ELSEWHERE = {
    **dict.fromkeys(("d_model", "n_embd"), "hidden_size"),
    **dict.fromkeys(("n_head", "num_heads", "encoder_attention_heads"), "num_attention_heads"),
    **dict.fromkeys(("d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim"), "intermediate_size"),
    **dict.fromkeys(("n_layer", "num_layers", "encoder_layers", "decoder_layers"), "max_steps, steps of one block"),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), "max_steps, steps of one block"),
    **dict.fromkeys(("dropout_rate", "hidden_dropout_prob", "resid_pdrop"), "dropout"),
    **dict.fromkeys(("n_positions",), "max_position_embeddings"),
}


@strict
class UniversalTransformerConfig(PreTrainedConfig):
    r"""Configuration of a Universal Transformer. The defaults are tensor2tensor's `universal_transformer_small`.

    A vanilla Transformer of N layers is `max_steps=1, num_layers_in_group=N, step_signal="none"`.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the states.
        num_attention_heads: Number of heads, a divisor of `hidden_size`.
        intermediate_size: Width inside the transition.
        hidden_act: Activation of the transition.
        max_steps: Steps of the recurrence; with halting, the limit.
        num_layers_in_group: Blocks that one step applies in turn, each with its own weights.
        num_prelude_layers: Ordinary blocks before the recurrence.
        num_coda_layers: Ordinary blocks after it.
        norm_position: `"pre"`: LayerNorm before every sub-layer, and one at the end (tensor2tensor). `"post"`: after
            every residual sum (the paper's formula).
        layer_norm_eps: Epsilon of LayerNorm.
        transition: `"feed_forward"`, or `"separable_convolution"` over neighbouring positions.
        position_signal: What tells positions apart: `"sinusoid"` or `"learned"` vectors added at every step,
            `"rotary"` angles of queries and keys, or `"none"`.
        max_position_embeddings: Longest sequence with learned positions; the others know no limit.
        rope_theta: Base of the rotary angles.
        step_signal: What tells steps apart: a `"learned"` table of `max_steps` rows, a `"sinusoid"`, or `"none"`. A
            call may take more than `max_steps` steps with the last two.
        coordinate_combination: `"add"` the two signals to the states, or `"concat"` and project them back.
        max_position_offset: In training the positions of every row begin at a random number from 0 to this.
        step_position_offset: Positions of step t begin at floor(length * t / steps), as tensor2tensor's `"step"`.
            Encoders only.
        input_injection: Every step begins with a linear map of the state and the recurrence's input side by side.
        halting: `"none"`: every position takes all steps. `"act"`: Adaptive Computation Time (Graves 2016).
        halting_scope: What halts: every `"token"` by itself, or the whole `"sequence"` at once (encoders only).
        act_output: `"weighted_sum"` of the states (Graves), or the running `"interpolation"` of tensor2tensor.
        halted_states: What becomes of a position that halted: `"copy"`: its state stays, and no more work is done for
            it. `"evolving"`: it goes on as before, unseen by the output (tensor2tensor).
        halted_keys: With `"copy"`, the keys others see of it: `"refresh"`: made anew from its state at every step.
            `"stale"`: those of its last step. Blocks after a group's first always keep the last.
        halting_threshold: A position halts when its summed probability would exceed this.
        min_steps: Steps that every position takes.
        force_final_halt: The last step takes all remaining probability (Graves). False: it is lost (tensor2tensor).
        halting_norm: LayerNorm before the halting unit.
        halting_bias_init: Initial bias of the halting unit; 1 means about two steps.
        ponder_cost: Weight of the mean number of steps and remainders in the loss.
        count_padding: Pads halt, are paid for and add to a row's length like tokens (tensor2tensor).
        pack_live_positions: Compute only positions that have not halted. None: where it saves time. Never where
            blocks are sharded one by one (FSDP2), which must do the same in all processes.
        share_cache: `"last_step"`: the cache keeps one step's keys instead of all steps'. An approximation, unless
            the model was trained with it.
        random_depth: Number of steps in training: `"uniform"` from 1 to `max_steps`, or `"poisson_lognormal"` around
            `mean_training_steps` (Geiping et al. 2025, arXiv 2502.05171). One number for a whole batch.
        mean_training_steps: Mean of the second; None means `max_steps`.
        backprop_steps: In training only the last so many steps get gradients. Needs `input_injection`, without which
            the embeddings would get none.
        dropout: Dropout of embeddings and of every sub-layer's output.
        attention_dropout: Dropout of attention probabilities.
        activation_dropout: Dropout inside the transition.
        label_smoothing: Probability spread over the whole vocabulary in training. Set it here rather than in the
            Trainer, whose own would drop the ponder cost.
        scale_embeddings: Multiply embeddings by sqrt(`hidden_size`).
        zero_pad_embedding: The pad's embedding counts as zero (tensor2tensor).
        encoder_input_bias: One learned vector added to every embedding of the encoder (tensor2tensor's target space).
        tie_word_embeddings: The output layer is the embedding's table.
        pooling: What the sequence classifier reads: the `"mean"`, the `"first"` or the `"last"` token's state.
        classifier_dropout: Dropout of the classifiers' heads; None means `dropout`.
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

    model_type = "universal_transformer"
    attribute_map = {"layer_norm_epsilon": "layer_norm_eps"}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "encoder_last_hidden_state",
        "task_loss",
        "losses",
        "ponder_loss",
        "ponder_times",
        "remainders",
        "halting_probabilities",
        "step_hidden_states",
        "encoder_ponder_times",
        "encoder_remainders",
        "encoder_halting_probabilities",
        "encoder_step_hidden_states",
    ]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "relu"
    max_steps: int = 6
    num_layers_in_group: int = 1
    num_prelude_layers: int = 0
    num_coda_layers: int = 0
    norm_position: str = "pre"
    layer_norm_eps: float | int = 1e-6
    transition: str = "feed_forward"
    position_signal: str = "sinusoid"
    max_position_embeddings: int = 1024
    rope_theta: float | int = 10000.0
    step_signal: str = "learned"
    coordinate_combination: str = "add"
    max_position_offset: int = 0
    step_position_offset: bool = False
    input_injection: bool = False
    halting: str = "none"
    halting_scope: str = "token"
    act_output: str = "weighted_sum"
    halted_states: str = "copy"
    halted_keys: str = "refresh"
    halting_threshold: float | int = 0.99
    min_steps: int = 1
    force_final_halt: bool = True
    halting_norm: bool = True
    halting_bias_init: float | int = 1.0
    ponder_cost: float | int = 0.01
    count_padding: bool = False
    pack_live_positions: bool | None = None
    share_cache: str | None = None
    random_depth: str | None = None
    mean_training_steps: int | None = None
    backprop_steps: int | None = None
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
    def from_preset(cls, name: str, **overrides: Any) -> "UniversalTransformerConfig":
        """A published size by its name in `presets.py`, with changes.

        Raises:
            ValueError: no preset has this name, or it needs a recurrence that is not supported.
        """
        return cls(**(find_preset(name) | overrides))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "UniversalTransformerConfig":
        """Build from a config.json's content and overrides, which are checked together."""
        settings = {*cls.__dataclass_fields__, "num_hidden_layers"}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in settings}
        return super().from_dict(config_dict | overrides, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_recurrence(kwargs)
        num_hidden_layers = kwargs.pop("num_hidden_layers", None)
        _refuse_misspelt(kwargs, [*self.__dataclass_fields__, *self.attribute_map])
        if self.is_encoder_decoder is None:
            self.is_encoder_decoder = not self.is_decoder
        super().__post_init__(**kwargs)
        if num_hidden_layers not in (None, self.num_hidden_layers):
            raise ValueError(
                f"num_hidden_layers={num_hidden_layers}, but this number follows from others; set max_steps and "
                "num_layers_in_group."
            )
        # Also run by transformers afterwards, but wrapped into an error class that is no ValueError.
        self.validate_architecture()

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved; transformers leaves out False here, which is no default of ours."""
        return super().to_diff_dict() | {"is_encoder_decoder": self.is_encoder_decoder}

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """What FSDP2 gathers at once: a whole stack, whose blocks would otherwise be gathered anew in every step."""
        names = {"encoder": not self.is_decoder, "decoder": self.is_decoder or self.is_encoder_decoder}
        return {name: "free_full_weight" for name, is_there in names.items() if is_there}

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def slots_per_recurrence(self) -> int:
        """Cache slots of the recurrence: one per step and block, or with `share_cache` one per block."""
        return self.num_layers_in_group * (1 if self.share_cache else self.max_steps)

    @property
    def num_hidden_layers(self) -> int:
        """Layers as caches count them: one for each slot, however few blocks there are."""
        return self.num_prelude_layers + self.slots_per_recurrence + self.num_coda_layers

    @property
    def num_distinct_layers(self) -> int:
        """Blocks with weights of their own, in each stack."""
        return self.num_prelude_layers + self.num_layers_in_group + self.num_coda_layers

    @property
    def is_halting(self) -> bool:
        """Whether positions halt by themselves."""
        return self.halting == "act"

    def validate_architecture(self) -> None:
        """Refuse every combination that cannot be built; called by transformers after construction and on save."""
        self._validate_choices()
        self._validate_numbers()
        self._validate_stacks()
        self._validate_coordinates()
        self._validate_halting()
        self._validate_depth()
        self._validate_vocabulary()

    def _validate_choices(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = [choice for choice in choices if choice is not None]
                raise ValueError(
                    f"{name}={value!r} is unknown; did you mean {_nearest(value, known)!r}? Known are "
                    f"{', '.join(map(repr, choices))}."
                )
        if self.hidden_act not in ACT2FN:
            nearest = _nearest(self.hidden_act, ACT2FN)
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; did you mean {nearest!r}?")

    def _validate_numbers(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
        for name in (*sizes, "max_steps", "num_layers_in_group", "min_steps", "mean_training_steps", "backprop_steps"):
            _check_at_least(self, name, 1)
        for name in ("num_prelude_layers", "num_coda_layers", "max_position_offset"):
            _check_at_least(self, name, 0)
        dropouts = ("dropout", "attention_dropout", "activation_dropout", "classifier_dropout")
        for name in (*dropouts, "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} is outside [0, 1); give a probability below 1.")
        for name in ("layer_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is no positive number; give one above 0.")
        if not 0 <= self.ponder_cost < math.inf:
            raise ValueError(f"ponder_cost={self.ponder_cost} is no cost; give 0 or a small positive number.")
        if not math.isfinite(self.halting_bias_init):
            raise ValueError(f"halting_bias_init={self.halting_bias_init} is not finite; give a number such as 1.")

    def _validate_stacks(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} cannot be shared out to num_attention_heads="
                f"{self.num_attention_heads} heads; make it a multiple."
            )
        if self.is_decoder and self.is_encoder_decoder:
            raise ValueError(
                "is_decoder=True is a causal stack alone, is_encoder_decoder=True has an encoder too; set one of them "
                "to False."
            )
        if self.encoder_input_bias and self.is_decoder:
            raise ValueError("encoder_input_bias=True, but is_decoder=True has no encoder; set it to False.")
        if self.is_decoder or self.is_encoder_decoder:
            self._refuse_in_causal_stacks()

    def _refuse_in_causal_stacks(self) -> None:
        mend = "for an encoder alone set is_encoder_decoder=False and is_decoder=False"
        if self.halting_scope == "sequence":
            raise ValueError(
                "halting_scope='sequence' lets later tokens decide when earlier ones halt, but the model is causal; "
                f"use 'token', or {mend}."
            )
        if self.step_position_offset:
            raise ValueError(
                "step_position_offset=True shifts positions by the length of the whole text, but the model is causal; "
                f"set it to False, or {mend}."
            )

    def _validate_coordinates(self) -> None:
        if self.position_signal == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"position_signal='rotary' turns pairs, but a head is {self.head_dim} wide (hidden_size="
                f"{self.hidden_size} / num_attention_heads={self.num_attention_heads}); make it even."
            )
        has_vectors = self.position_signal in ("sinusoid", "learned")
        if self.coordinate_combination == "concat" and not has_vectors and self.step_signal == "none":
            raise ValueError(
                f"coordinate_combination='concat', but position_signal={self.position_signal!r} and "
                "step_signal='none' leave nothing to concatenate; use 'add'."
            )
        if self.max_position_offset and not has_vectors:
            raise ValueError(
                f"max_position_offset={self.max_position_offset} has no effect with position_signal="
                f"{self.position_signal!r}; use 'sinusoid' or 'learned', or leave it out."
            )
        if self.step_position_offset and self.position_signal != "sinusoid":
            raise ValueError(
                f"step_position_offset=True goes beyond a text's own positions, but position_signal="
                f"{self.position_signal!r}; use 'sinusoid', or set it to False."
            )
        if self.max_position_offset and self.step_position_offset:
            raise ValueError(
                f"max_position_offset={self.max_position_offset} and step_position_offset=True both decide where "
                "positions begin; give one of them."
            )
        if self.position_signal == "learned" and self.max_position_offset >= self.max_position_embeddings:
            raise ValueError(
                f"max_position_offset={self.max_position_offset} leaves no room in max_position_embeddings="
                f"{self.max_position_embeddings}; make one smaller or the other larger."
            )

    def _validate_halting(self) -> None:
        if not 0.0 < self.halting_threshold < 1.0:
            raise ValueError(
                f"halting_threshold={self.halting_threshold} is outside (0, 1); give a probability such as 0.99."
            )
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps={self.min_steps} is more than max_steps={self.max_steps}; make it {self.max_steps} or "
                "less."
            )
        if self.halted_keys == "stale" and self.halted_states == "evolving":
            raise ValueError(
                "halted_keys='stale', but with halted_states='evolving' positions make new keys after halting; use "
                "'refresh', or halted_states='copy'."
            )
        if self.pack_live_positions:
            self._validate_packing()

    def _validate_packing(self) -> None:
        reasons = {
            "halting='none' lets no position halt": not self.is_halting,
            "halted_states='evolving' computes halted positions too": self.halted_states == "evolving",
            "transition='separable_convolution' needs a position's neighbours": (
                self.transition == "separable_convolution"
            ),
        }
        for reason, is_true in reasons.items():
            if is_true:
                raise ValueError(f"pack_live_positions=True, but {reason}; set it to None or False.")

    def _validate_depth(self) -> None:
        if self.is_halting and self.random_depth is not None:
            raise ValueError(
                f"random_depth={self.random_depth!r}, but with halting='act' the model chooses its depth; set one of "
                "them to None or 'none'."
            )
        if self.mean_training_steps is not None and self.random_depth != "poisson_lognormal":
            raise ValueError(
                f"mean_training_steps={self.mean_training_steps} has no effect with random_depth="
                f"{self.random_depth!r}; use 'poisson_lognormal', or leave it out."
            )
        if self.backprop_steps is None:
            return
        if not self.input_injection:
            raise ValueError(
                f"backprop_steps={self.backprop_steps} cuts the embeddings off from the loss; set "
                "input_injection=True, which brings them to every step, or leave it out."
            )
        if self.is_halting:
            raise ValueError(
                f"backprop_steps={self.backprop_steps} would cut off the first steps' halting; use halting='none', or "
                "leave it out."
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
        if self.zero_pad_embedding and self.pad_token_id is None:
            raise ValueError("zero_pad_embedding=True, but pad_token_id=None; name the pad's id.")


# Copied from hf_efficient/models/reformer/configuration_reformer.py::_nearest
def _nearest(word: str, known: Any) -> str:
    """The known word most like `word`, whatever is written in capitals."""
    return difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.0)[0]


def _check_at_least(config: UniversalTransformerConfig, name: str, lowest: int) -> None:
    value = getattr(config, name)
    if value is not None and value < lowest:
        kind = "not positive" if lowest else "negative"
        raise ValueError(f"{name}={value} is {kind}; give a whole number from {lowest}.")


def _refuse_recurrence(kwargs: dict[str, Any]) -> None:
    """tensor2tensor's name for its variants of the recurrence."""
    name = kwargs.get("recurrence")
    if name in REFUSED_RECURRENCES:
        raise ValueError(
            f"recurrence={name!r} is not supported: no table of the paper uses it; leave it out, or see halting."
        )
    if name is not None:
        raise ValueError(f"recurrence={name!r} is no setting here; leave it out, or set halting='none' or 'act'.")


def _refuse_misspelt(kwargs: dict[str, Any], names: list[str]) -> None:
    """transformers keeps unknown keywords as attributes; one that nearly is a field is surely a mistake."""
    for key, value in kwargs.items():
        if key in ELSEWHERE:
            raise ValueError(f"{key}={value!r} is no setting of UniversalTransformerConfig; give {ELSEWHERE[key]}.")
        if key in names or hasattr(PreTrainedConfig, key):
            continue
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        if nearest:
            raise ValueError(f"{key!r} is no setting of UniversalTransformerConfig; did you mean {nearest[0]!r}?")


__all__ = ["UniversalTransformerConfig"]
