"""The contract's table: every check, the models it is for, and what an architecture cannot do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract import check_generation, check_loading, check_replicas, check_tools, check_training
from contract.rows import ROWS, VARIANTS, Row

Function = Callable[[Row, Path], None]

CAUSAL = ("ForCausalLM", "ModelWithLMHead")
GENERATING = (*CAUSAL, "ForConditionalGeneration")
BODIES = ("Model", "EncoderModel")
ALL = (
    *GENERATING,
    *BODIES,
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
TRAINED = tuple(kind for kind in ALL if kind not in BODIES)
# One language model, one pair and one classifier of every way to build an architecture.
EXPORTED_OPEN = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification")
SMOOTHED = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification")


@dataclass(frozen=True)
class Check:
    """One promise: what the documentation calls it, its function, the kinds of models it is for."""

    title: str
    function: Function
    kinds: tuple[str, ...] = ALL
    is_slow: bool = False


CHECKS = {
    "auto": Check("Auto classes", check_loading.check_auto_classes),
    "safetensors": Check("safetensors, bit for bit", check_loading.check_safetensors),
    "key_names": Check("Earlier and own names of weights", check_loading.check_key_names),
    "text_generation": Check("`pipeline`: text-generation", check_loading.check_text_generation, CAUSAL),
    "text_classification": Check(
        "`pipeline`: text-classification", check_loading.check_text_classification, ("ForSequenceClassification",)
    ),
    "zero_shot": Check(
        "`pipeline`: zero-shot-classification", check_loading.check_zero_shot, ("ForSequenceClassification",)
    ),
    "token_classification": Check(
        "`pipeline`: token-classification", check_loading.check_token_classification, ("ForTokenClassification",)
    ),
    "fill_mask": Check("`pipeline`: fill-mask", check_loading.check_fill_mask, ("ForMaskedLM",)),
    "feature_extraction": Check("`pipeline`: feature-extraction", check_loading.check_feature_extraction, BODIES),
    "resize": Check("Embeddings resized", check_loading.check_resize),
    "inputs_embeds": Check("`inputs_embeds`", check_loading.check_inputs_embeds),
    "hidden_states": Check("`output_hidden_states`", check_loading.check_hidden_states),
    "left_padding": Check("`generate`, padded on the left", check_generation.check_left_padding, GENERATING),
    "streaming": Check("`generate`, streamed", check_generation.check_streaming, GENERATING),
    "assisted": Check("`generate`, assisted", check_generation.check_assisted, GENERATING),
    "checkpointing": Check("Gradient checkpointing, both kinds", check_training.check_gradient_checkpointing),
    "data_parallel": Check(
        "`nn.DataParallel`, as `Trainer` uses it on several GPUs", check_replicas.check_data_parallel
    ),
    "trainer": Check("`Trainer`", check_training.check_trainer, TRAINED, is_slow=True),
    "accumulation": Check(
        "`Trainer`, accumulated gradients", check_training.check_accumulation, TRAINED, is_slow=True
    ),
    "smoothing": Check("`Trainer`, label smoothing", check_training.check_label_smoothing, SMOOTHED, is_slow=True),
    "seq2seq_trainer": Check(
        "`Seq2SeqTrainer`", check_training.check_seq2seq_trainer, ("ForConditionalGeneration",), is_slow=True
    ),
    "script": Check(
        "A script like run_clm.py, unmodified", check_training.check_script, ("ForCausalLM",), is_slow=True
    ),
    "device_map": Check("`device_map` by blocks, part on disk", check_loading.check_device_map, is_slow=True),
    "offload": Check("Offload to processor and disk", check_loading.check_offload, is_slow=True),
    "lora": Check("LoRA: train, save, merge (peft)", check_tools.check_lora, is_slow=True),
    "int8": Check("int8 weights (optimum-quanto)", check_tools.check_int8, is_slow=True),
    "compile": Check("`torch.compile`", check_tools.check_compile, is_slow=True),
    "export": Check("`torch.export`", check_tools.check_export, is_slow=True),
    "open_sizes": Check(
        "`torch.export`, any batch and length", check_tools.check_open_sizes, EXPORTED_OPEN, is_slow=True
    ),
    "onnx": Check("ONNX through torch's exporter", check_tools.check_onnx, is_slow=True),
}


@dataclass(frozen=True)
class Limit:
    """What some models cannot do: the reason that the documentation gives, and a part of the error's text.

    Without such a part the models raise no error of their own, and the reason says so.
    """

    check: str
    variants: tuple[str, ...]
    reason: str
    message: str
    error: type[Exception] | tuple[type[Exception], ...] = ValueError
    kinds: tuple[str, ...] = ALL


REVERSIBLE, RECURRENT = ("reformer", "reformer_lsh"), ("rnn", "rnn_act")
LIMITS = [
    Limit(
        "checkpointing",
        REVERSIBLE,
        "Reversible layers keep no activations, so there is nothing to checkpoint; `reversible=False` allows it.",
        "a reversible model keeps none and recomputes them all",
    ),
    Limit(
        "checkpointing",
        RECURRENT,
        "A recurrent layer is one call for all tokens; cut the text into segments and carry the state instead.",
        "does not support (activation|gradient) checkpointing",
    ),
    Limit(
        "assisted",
        ("reformer_lsh",),
        "The chunks of `lsh` layers depend on the tokens that follow; those of `windowed_lsh` do not.",
        "Assisted decoding is not exact with 'lsh' layers",
    ),
    Limit(
        "assisted",
        RECURRENT,
        "A recurrent state cannot be taken back to an earlier token.",
        "assisted generation is not supported with stateful models",
    ),
    Limit(
        "left_padding",
        ("reformer_lsh",),
        "The chunks of `lsh` layers wrap around, so that pads in the source change them a little, without an error; "
        "`windowed_lsh` layers are exact.",
        "",
        AssertionError,
        ("ForConditionalGeneration",),
    ),
    *(
        Limit(
            check,
            ("rnn_act",),
            "Pondering takes single steps of the recurrent layers, for which offloaded weights are not brought back.",
            "pondering takes single steps, for which they are not brought back",
        )
        for check in ("device_map", "offload")
    ),
    Limit(
        "fsdp2",
        ("rnn_act",),
        "Pondering takes single steps of the recurrent layers, for which FSDP2 does not gather them; use DDP, or "
        "shard the model as a whole.",
        "pondering takes single steps, for which they are not gathered",
    ),
    Limit(
        "int8",
        ("rnn",),
        "The body holds no linear layer to quantise; nothing changes.",
        "",
        AssertionError,
        ("Model",),
    ),
    Limit(
        "lora",
        ("rnn",),
        "Recurrent layers hold no linear layer; the error is peft's.",
        "target_modules",
        ValueError,
        ("Model", "ForCausalLM"),
    ),
    *(
        Limit(
            check,
            ("rnn_act",),
            "Pondering repeats its step as often as the data asks for, which an exported program cannot.",
            "can be exported",
            # torch's exporter to ONNX hands the message on in an error of its own.
            (ValueError, RuntimeError),
        )
        for check in ("export", "open_sizes", "onnx")
    ),
    Limit(
        "open_sizes",
        ("rnn",),
        "torch writes a recurrent layer out for one length; the batch may be open. The error is torch's.",
        "your code specialized it to be a constant",
        RuntimeError,
    ),
]


def limit_of(check: str, row: Row) -> Limit | None:
    """What keeps a row from passing a check."""
    for limit in LIMITS:
        if limit.check == check and row.variant_name in limit.variants and row.kind in limit.kinds:
            return limit
    return None


# In test_distributed.py, all rows in one launch.
DISTRIBUTED = {"ddp": "DDP, two processes", "fsdp2": "FSDP2, two processes"}
TITLES = {name: check.title for name, check in CHECKS.items()} | DISTRIBUTED


def is_distributed(row: Row) -> bool:
    """One language model, one pair and one classifier of every way to build an architecture."""
    return row.kind in ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification")


CELLS = [(name, row) for name, check in CHECKS.items() for row in ROWS if row.kind in check.kinds]


def description() -> dict[str, Any]:
    """What the documentation has to know of the table beside the results."""
    asked = {check: [row.name for name, row in CELLS if name == check] for check in TITLES}
    return {
        "checks": TITLES,
        "variants": {name: variant.title for name, variant in VARIANTS.items()},
        "rows": {row.name: [row.variant_name, row.class_name] for row in ROWS},
        "asked": asked | dict.fromkeys(DISTRIBUTED, [row.name for row in ROWS if is_distributed(row)]),
    }


__all__ = [
    "CELLS",
    "CHECKS",
    "DISTRIBUTED",
    "LIMITS",
    "TITLES",
    "Check",
    "Limit",
    "description",
    "is_distributed",
    "limit_of",
]
