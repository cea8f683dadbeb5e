"""Checkpoints and vocabularies of earlier releases -> models and tokenizers that `from_pretrained` loads."""

from .convert import ConversionReport, convert_checkpoint
from .legacy_vocabulary import load_legacy_tokenizer

__all__ = ["ConversionReport", "convert_checkpoint", "load_legacy_tokenizer"]
