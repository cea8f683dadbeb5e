"""Text to documents, documents to tokens, tokens to lanes of segments, and those to batches."""

from .collators import SegmentCollator
from .documents import load_documents
from .lanes import SegmentLanes, segment_lanes
from .tokenization import load_tokenizer, tokenize_documents, train_tokenizer

__all__ = [
    "SegmentCollator",
    "SegmentLanes",
    "load_documents",
    "load_tokenizer",
    "segment_lanes",
    "tokenize_documents",
    "train_tokenizer",
]
