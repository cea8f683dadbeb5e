"""Models as the command line names them: built from settings or loaded from a folder, with every mistake explained."""

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields
from inspect import getdoc
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .. import (
    ActRnnConfig,
    EvolvedTransformerConfig,
    ReformerConfig,
    TransformerXLConfig,
    UniversalTransformerConfig,
)
from .errors import USER_ERRORS, CommandError, nearest, one_sentence, unknown_name


@dataclass(frozen=True)
class Architecture:
    """One value of `--architecture`.

    starter: settings of a model that a laptop trains in minutes; they stand in for what a user does not give.
    segment_length: tokens that such a model reads at a time.
    pair_starter: the same as `starter` for a model with encoder and decoder; None if the architecture has none.
    """

    config_class: type[PreTrainedConfig]
    starter: dict[str, Any]
    segment_length: int
    pair_starter: dict[str, Any] | None = None


# A further architecture is a further row.
ARCHITECTURES = {
    "transformer_xl": Architecture(
        TransformerXLConfig,
        starter={
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "mem_len": 128,
        },
        segment_length=128,
    ),
    "reformer": Architecture(
        ReformerConfig,
        starter={
            "is_decoder": True,
            "attn_layers": ["local", "windowed_lsh", "local", "windowed_lsh"],
            "hidden_size": 256,
            "num_attention_heads": 4,
            "feed_forward_size": 1024,
            "axial_norm_std": 0.02,  # as small as the token embeddings, which positions would drown at first
            # As many buckets as 4,096 positions have windows: see benchmarks/notes/reformer_quality.md.
            "num_hashes": 2,
            "num_buckets": 64,
        },
        segment_length=1024,
        # Sentences are short: the positions have 1,024 places, and two buckets share a sentence.
        pair_starter={
            "is_encoder_decoder": True,
            "attn_layers": ["local", "windowed_lsh", "local", "windowed_lsh"],
            "hidden_size": 256,
            "num_attention_heads": 4,
            "feed_forward_size": 1024,
            "axial_pos_shape": [32, 32],
            "max_position_embeddings": 1024,
            "axial_norm_std": 0.02,
            "num_hashes": 2,
            "num_buckets": 2,
        },
    ),
    "universal_transformer": Architecture(
        UniversalTransformerConfig,
        starter={
            "is_decoder": True,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "halting": "act",
        },
        segment_length=256,
        pair_starter={
            "is_encoder_decoder": True,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "halting": "act",
            "label_smoothing": 0.1,
        },
    ),
    "evolved_transformer": Architecture(
        EvolvedTransformerConfig,
        starter={"is_decoder": True, "hidden_size": 128, "num_attention_heads": 4},
        segment_length=256,
        pair_starter={
            "is_encoder_decoder": True,
            "hidden_size": 128,  # the preset "tiny"
            "num_attention_heads": 4,
            "label_smoothing": 0.1,
        },
    ),
    "act_rnn": Architecture(
        ActRnnConfig,
        starter={"hidden_size": 256},
        segment_length=128,
    ),
}

# Those that train on pairs of texts.
PAIR_ARCHITECTURES = [name for name, row in ARCHITECTURES.items() if row.pair_starter is not None]

# How the classes of models end that answer otherwise than by a text.
WITHOUT_TEXT = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")

# Settings that the tokenizer decides. The first may be given, to make room for more ids.
FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def model_settings(architecture: str, for_pairs: bool = False) -> dict[str, tuple[str, Any]]:
    """Meaning and default of each setting that `--model.NAME` may give for `architecture`."""
    row = ARCHITECTURES[architecture]
    starter = (row.pair_starter if for_pairs else row.starter) or {}
    inherited = {field.name for field in fields(PreTrainedConfig)}
    meanings = dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", getdoc(row.config_class) or "", re.MULTILINE))
    return {
        field.name: (meanings.get(field.name, ""), starter.get(field.name, _default(field)))
        for field in fields(row.config_class)
        if field.name not in inherited.union(FROM_TOKENIZER[1:])
    }


def _default(field: Field) -> Any:
    if field.name in FROM_TOKENIZER:
        return None
    return field.default if field.default_factory is MISSING else field.default_factory()


def build_config(
    architecture: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, for_pairs: bool = False
) -> PreTrainedConfig:
    """The configuration of a new model for the ids of `tokenizer`: `settings` over the architecture's starter ones.

    for_pairs: of a model with encoder and decoder, whose decoder begins with the pad token.

    Raises CommandError if a setting is unknown or has an illegal value.
    """
    row = ARCHITECTURES[architecture]
    named = check_settings(architecture, settings)
    ids = {name: getattr(tokenizer, name) for name in FROM_TOKENIZER[1:]}
    if for_pairs:
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    vocab_size = named.setdefault("vocab_size", len(tokenizer))
    if isinstance(vocab_size, int) and vocab_size < len(tokenizer):
        raise CommandError(
            f"--model.vocab_size {vocab_size} is less than the tokenizer's {len(tokenizer)} ids; leave it out."
        )
    starter = (row.pair_starter if for_pairs else row.starter) or {}
    if starter.get("is_decoder") and named.get("is_decoder") is False:
        raise CommandError("--model.is_decoder False leaves nothing that can write; set it to True, or leave it out.")
    try:
        return row.config_class(**starter | ids | named)
    except (*USER_ERRORS, TypeError) as error:
        raise CommandError(f"model: {one_sentence(error)}") from error


def check_settings(architecture: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` of a model by today's names. Raises CommandError if the architecture lacks one."""
    aliases = ARCHITECTURES[architecture].config_class.attribute_map
    known = [*model_settings(architecture), *aliases]
    for name, value in settings.items():
        if name not in known:
            try:  # it may follow from others, or have another name elsewhere: the configuration says so
                ARCHITECTURES[architecture].config_class(**{name: value})
            except ValueError as error:
                if str(error).startswith(f"{name}="):
                    raise CommandError(f"model: {one_sentence(error)}") from error
            raise unknown_name(f"setting of the {architecture} model", name, known, "hf-efficient train --help")
    return {aliases.get(name, name): value for name, value in settings.items()}


def check_length(config: PreTrainedConfig, segment_length: int, flag: str = "--segment_length") -> None:
    """Raises CommandError, naming `flag`, if the model has fewer positions than a segment has tokens."""
    positions = num_positions(config)
    if positions is not None and segment_length > positions:
        raise CommandError(
            f"{flag} {segment_length} is more than the {positions} positions of the model; take shorter segments, or "
            "train a model with more (max_position_embeddings, and axial_pos_shape where it has that)."
        )


def num_positions(config: PreTrainedConfig) -> int | None:
    """The longest text that a model can read at once; None if there is no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if getattr(config, "position_signal", "learned") != "learned":
        return None
    if positions is not None and getattr(config, "axial_pos_embds", False):
        positions = min(positions, math.prod(config.axial_pos_shape))
    return positions


def default_segment_length(config: PreTrainedConfig) -> int:
    """Tokens that a saved model reads at a time unless told otherwise."""
    usual = next((row.segment_length for row in ARCHITECTURES.values() if isinstance(config, row.config_class)), None)
    if usual is None:
        raise CommandError(f"--model is a {config.model_type} model; it must be one of {', '.join(ARCHITECTURES)}.")
    return min(usual, num_positions(config) or usual)


def load_model(source: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model that writes text, in evaluation mode, and its tokenizer.

    A model with encoder and decoder comes as one that answers its input, any other as one that continues it.

    source: a folder, or a name on the Hub. device: a torch device; None takes the accelerator if there is one.
    Raises CommandError if there is no such model, its weights are incomplete or broken, or the device is missing.
    """
    check_source(source, "--model")
    try:
        with quiet():  # what is wrong is said below
            config = AutoConfig.from_pretrained(source)
            head = next(iter(config.architectures or []), "")
            if head.endswith(WITHOUT_TEXT):
                raise ValueError(f"it is a {head}, which writes no text; load it with its own Auto class")
            auto_class = auto_class_of(config)
            model, info = auto_class.from_pretrained(source, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # broken files raise whatever their reader raises
        raise not_loaded("--model", source, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CommandError(
            f"--model '{source}' lacks {len(missing)} of its weights, such as '{missing[0]}'; save or copy it again."
        )
    return model.eval().to(choose_device(device)), tokenizer


def check_source(source: str, flag: str) -> None:
    """Raises CommandError, naming `flag`, for a folder without a model, and for a path that does not exist."""
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise CommandError(f"{flag} '{source}' holds no config.json; give a folder that `hf-efficient train` wrote.")
    if not folder.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise CommandError(f"{flag} '{source}' does not exist; give a folder that `hf-efficient train` wrote.")
    if not folder.exists() and (beside := sorted(str(path.parent) for path in folder.parent.glob("*/config.json"))):
        # A name on the Hub looks the same, but here is a folder of models, and asking the Hub takes its time.
        raise CommandError(
            f"{flag} '{source}' does not exist; the nearest model there is '{nearest(source, beside)}'."
        )


def not_loaded(flag: str, source: str, error: Exception) -> CommandError:
    """The error for a model that cannot be loaded, which says where it was looked for."""
    where = "" if Path(source).exists() else "is no folder here, and from the Hub it "
    return CommandError(f"{flag} '{source}' {where}cannot be loaded: {one_sentence(error)}")


def auto_class_of(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    """The Auto class of a model that writes text: one that answers its input, or one that continues it."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers within the block."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def choose_device(device: str | None) -> torch.device:
    """The device named, or the accelerator if there is one, or the CPU. Raises CommandError if torch lacks it."""
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # an unknown name, a missing build, a missing card
        raise CommandError(f"--device '{device}' is not available here; try --device cpu.") from error
    return torch.device(device)


def depth_settings(model: PreTrainedModel, **settings: Any) -> dict[str, Any]:
    """Those of `num_steps`, `exit_threshold` and `min_steps` that are not None: arguments of every call of the model.

    Raises CommandError if the model takes no such argument, or refuses the value.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    known = inspect.signature(model.forward).parameters
    for name in settings:
        if name not in known:
            raise CommandError(f"--{name} means nothing to a {model.config.model_type} model; leave it out.")
    if settings:
        try:
            token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            target = {"decoder_input_ids": token} if model.config.is_encoder_decoder else {}
            with torch.no_grad():
                model(token, **target, **settings)
        except USER_ERRORS as error:
            raise CommandError(one_sentence(error)) from error
    return settings


@contextmanager
def memory_settings(config: PreTrainedConfig, **settings: Any) -> Iterator[None]:
    """Within the block, the settings that are not None replace those of `config` (`mem_len`, `clamp_len`, ...).

    Raises CommandError if the architecture has no such setting, or refuses the value.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in settings:
        if not hasattr(config, name):
            raise CommandError(f"--{name} means nothing to a {config.model_type} model; leave it out.")
    before = {name: getattr(config, name) for name in settings}
    try:
        _assign(config, settings)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _assign(config: PreTrainedConfig, settings: dict[str, Any]) -> None:
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        config.validate()
    except (*USER_ERRORS, TypeError) as error:
        raise CommandError(one_sentence(error)) from error
