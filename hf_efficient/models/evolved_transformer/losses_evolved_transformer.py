"""The loss of an Evolved Transformer's predictions.

Letters in shape notes: B batch, L tokens, V vocab_size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Labels that are not counted.
IGNORED = -100


# Copied from hf_efficient/models/universal_transformer/losses_universal_transformer.py::token_losses
def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every label in nats, (...); 0 where there is none.

    Args:
        logits: (..., V); at least float32 is used.
        labels: (...) ids, `IGNORED` where there is none.
        label_smoothing: probability spread evenly over all V ids.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(
        logits.flatten(0, -2).to(exact),
        labels.flatten().to(logits.device, torch.int64),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(labels.shape)


# Copied from hf_efficient/models/universal_transformer/losses_universal_transformer.py::mean_loss
def mean_loss(losses: Tensor, num_items: Tensor | int) -> Tensor:
    """Sum of the losses over a number of items, perhaps of other calls too."""
    return losses.sum() / (num_items.to(losses.device) if isinstance(num_items, Tensor) else num_items)


# Copied from hf_efficient/models/universal_transformer/losses_universal_transformer.py::count_labels
def count_labels(labels: Tensor) -> Tensor:
    """Number of labels that count, at least 1."""
    return (labels != IGNORED).sum().clamp(min=1)


__all__ = ["IGNORED", "count_labels", "mean_loss", "token_losses"]
