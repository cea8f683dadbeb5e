"""What an adaptive vocabulary asks of the model around it: resizing, replacing, and staying whole.

The vocabulary's parts are in `adaptive_softmax.py`; the last bin is the one that grows and shrinks.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_transformer_xl import TransformerXLConfig


def whole_blocks(config: TransformerXLConfig) -> set[str]:
    """Names of the classes whose weights are to be on one device.

    FSDP2 goes by the same names, and shards each such module by itself. Embedding and softmax share tables and
    projections, which it cannot shard twice, so that there they belong to the rest of the model.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    vocabulary = {"AdaptiveEmbedding", "AdaptiveSoftmax"} if config.is_adaptive and not is_distributed else set()
    return {"TransformerXLLayer"} | vocabulary


def fits_vocabulary(config: TransformerXLConfig, module: nn.Module, adaptive: type[nn.Module]) -> None:
    """Raises TypeError if the configuration asks for an `adaptive` module with its bins, and `module` is none."""
    if not config.is_adaptive:
        return
    with torch.device("meta"):
        expected = [end for _, end in adaptive(config).ranges]
    if not isinstance(module, adaptive) or [end for _, end in module.ranges] != expected:
        raise TypeError(
            f"{type(module).__name__} cannot take the place of an {adaptive.__name__} with bins ending at {expected}; "
            "build a model with other cutoffs, div_val or vocab_size instead."
        )


def resize_vocabulary(model: PreTrainedModel, vocab_size: int, mean_resizing: bool) -> nn.Module:
    """Let the last bin take or give words, in the embedding and in the softmax, if there is one; the embedding.

    Raises:
        ValueError: the new size would leave the last bin empty.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    last_start = max(model.config.cutoffs, default=0)
    if vocab_size <= last_start:
        raise ValueError(
            f"new_num_tokens={vocab_size} would leave the last vocabulary bin empty, which begins at {last_start}; "
            "give a larger number."
        )
    if head is not None:
        # Before the embedding: transformers takes a head whose tied table has the new size already for resized.
        words = head.tails[str(len(head.ranges) - 1)] if head.tails else head
        resized = model._get_resized_lm_head(
            _as_linear(words), vocab_size - head.last_start, mean_resizing=mean_resizing
        )
        words.weight, words.bias = resized.weight, resized.bias
        head.ranges[-1] = (head.ranges[-1][0], vocab_size)
    first = embedding.ranges[-1][0]
    table = embedding.tails[str(len(embedding.ranges) - 1)] if embedding.tails else _as_table(embedding)
    model._get_resized_embeddings(table, vocab_size - first, mean_resizing=mean_resizing)
    embedding.ranges[-1] = (first, vocab_size)
    model.config.vocab_size = vocab_size
    model.tie_weights()
    return embedding


def _as_linear(words: nn.Module) -> nn.Linear:
    """A layer over the same parameters, as transformers resizes no other kind."""
    linear = nn.Linear(*reversed(words.weight.shape), device="meta")
    linear.weight, linear.bias = words.weight, words.bias
    return linear


def _as_table(embedding: nn.Module) -> nn.Embedding:
    """A table over the same parameter."""
    table = nn.Embedding(*embedding.weight.shape, device="meta")
    table.weight = embedding.weight
    return table


__all__ = ["fits_vocabulary", "resize_vocabulary", "whole_blocks"]
