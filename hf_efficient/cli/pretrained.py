"""`--pretrained`: a training that begins with a saved model instead of new weights."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .errors import USER_ERRORS, CommandError, one_sentence
from .models import (
    ARCHITECTURES,
    auto_class_of,
    check_settings,
    check_source,
    default_segment_length,
    not_loaded,
    quiet,
)

PRETRAINED_HELP = (
    "Saved model to go on from: its folder, or its name on the Hub. Architecture, tokenizer and settings are its own; "
    "--model.NAME changes those that no weight depends on"
)
# What a saved model brings along.
ITS_OWN = ("tokenizer", "tokenizer_vocab_size", "lowercase")


def adopt(options: Any, given: dict[str, Any], for_pairs: bool) -> None:
    """Set what the model of `--pretrained` decides: architecture and tokenizer, and the usual segment length.

    Without `--pretrained`, nothing. given: the settings that were named, which may not contradict the model.

    Raises CommandError if they do, or if there is no such model or one for another task.
    """
    source = options.pretrained
    if source is None:
        return
    for name in ITS_OWN:
        if name in given:
            raise CommandError(f"--{name} '{given[name]}' is not for --pretrained '{source}', which has its own.")
    config = read_config(source)
    architecture = next(name for name, row in ARCHITECTURES.items() if isinstance(config, row.config_class))
    if given.get("architecture", architecture) != architecture:
        raise CommandError(
            f"--architecture {given['architecture']} is not that of --pretrained '{source}', {architecture}; leave it "
            "out."
        )
    if config.is_encoder_decoder != for_pairs:
        task = "a task on pairs, such as --task translation" if config.is_encoder_decoder else "language modelling"
        raise CommandError(f"--pretrained '{source}' is a model for {task}; choose that, or another model.")
    options.architecture, options.tokenizer = architecture, source
    if "segment_length" in asdict(options) and options.segment_length is None:
        options.segment_length = default_segment_length(config)


def read_config(source: str) -> PreTrainedConfig:
    """The configuration of a saved model. Raises CommandError if there is none, or one that is not from here."""
    check_source(source, "--pretrained")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source)
    except Exception as error:  # broken files raise whatever their reader raises
        raise not_loaded("--pretrained", source, error) from error
    if not isinstance(config, tuple(row.config_class for row in ARCHITECTURES.values())):
        raise CommandError(
            f"--pretrained '{source}' is a {config.model_type} model; it must be one of {', '.join(ARCHITECTURES)}."
        )
    return config


def pretrained_config(source: str, architecture: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a saved model, with `settings` in place of its own.

    Raises CommandError if a setting is unknown or has an illegal value.
    """
    config = read_config(source)
    named = check_settings(architecture, settings)
    try:
        return type(config).from_dict(config.to_dict() | named)
    except (*USER_ERRORS, TypeError) as error:
        raise CommandError(f"model: {one_sentence(error)}") from error


def pretrained_model(source: str, config: PreTrainedConfig, settings: Iterable[str]) -> PreTrainedModel:
    """The saved model under `config`, in single precision.

    settings: names of those that were changed, for the error.

    Raises CommandError if its weights are incomplete, broken, or do not fit the configuration.
    """
    try:
        with quiet():  # what is wrong is said below
            model, info = auto_class_of(config).from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # broken files raise whatever their reader raises
        changed = "".join(f" --model.{name}" for name in settings)
        hint = f" Do the weights fit{changed}?" if changed else ""
        raise CommandError(f"--pretrained '{source}' cannot be loaded: {one_sentence(error)}{hint}") from error
    if missing := sorted(info["missing_keys"]):
        raise CommandError(
            f"--pretrained '{source}' lacks {len(missing)} of its weights, such as '{missing[0]}'; save or copy it "
            "again, and change no setting that weights depend on."
        )
    return model
