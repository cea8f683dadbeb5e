"""Training on top of transformers' `Trainer`: on segments of text, with carried memory or without, and on pairs."""

from .arguments import SegmentTrainingArguments
from .callbacks import LiveFiguresCallback, PonderTimeCallback, PonderTotals
from .metrics import bits_per_byte, bits_per_character, peak_memory_mb, perplexity
from .pair_arguments import PairTrainingArguments
from .pair_trainer import PairTrainer
from .run_folder import check_run_folder, last_checkpoint
from .schedules import SCHEDULES, constant_then_inverse_sqrt
from .text_trainer import TextTrainer
from .trainer import SegmentTrainer
from .translation_metrics import Bleu, BleuMetric, bleu

__all__ = [
    "Bleu",
    "BleuMetric",
    "LiveFiguresCallback",
    "PairTrainer",
    "PairTrainingArguments",
    "PonderTimeCallback",
    "PonderTotals",
    "SCHEDULES",
    "SegmentTrainer",
    "SegmentTrainingArguments",
    "TextTrainer",
    "bits_per_byte",
    "bits_per_character",
    "bleu",
    "check_run_folder",
    "constant_then_inverse_sqrt",
    "last_checkpoint",
    "peak_memory_mb",
    "perplexity",
]
