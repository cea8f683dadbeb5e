"""From items to batches."""

import torch
from torch import Tensor


class SegmentCollator:
    """Stack items of `SegmentLanes` to a batch: each tensor gets a first dimension, (batch, T), and "reset" (batch,).

    A batch without padding has no "attention_mask", so that the model takes its fast path. That is decided here, on
    the CPU, where looking costs no synchronisation with the device.
    """

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        if "attention_mask" in batch and batch["attention_mask"].all():
            del batch["attention_mask"]
        return batch
