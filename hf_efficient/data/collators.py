"""From items to batches."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .lanes import IGNORE


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


class PaddingCollator:
    """Pad items of different lengths on the right and stack them to a batch.

    Numbers are stacked; what has a length gets the longest of the batch: -100 is filled into names that end with
    "labels", 0 into "inputs_embeds", `pad_token_id` into the others. Beside each "input_ids" or "inputs_embeds" comes
    an "attention_mask" (0 for padding), and likewise "left_attention_mask" beside "left_input_ids"; not where no row
    is padded, so that the model takes its fast path. Matrices, (facts, words) for example, are padded in both
    directions, and masked by row.
    """

    def __init__(self, pad_token_id: int = 0):
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {}
        for name in items[0]:
            values = [torch.as_tensor(item[name]) for item in items]
            batch[name] = pad_and_stack(values, self._fill(name))
            lengths = torch.tensor([len(value) if value.ndim else 0 for value in values])
            kind = next((kind for kind in ("input_ids", "inputs_embeds") if name.endswith(kind)), None)
            if kind is not None and lengths.min() < lengths.max():
                mask = torch.arange(int(lengths.max())) < lengths[:, None]
                batch[name.replace(kind, "attention_mask")] = mask.long()
        return batch

    def _fill(self, name: str) -> int:
        """What stands behind the end of a row."""
        if name.endswith("labels"):
            return IGNORE
        return 0 if name.endswith("inputs_embeds") else self.pad_token_id


def pad_and_stack(values: list[Tensor], fill: int) -> Tensor:
    """Tensors of equal rank as one, each in the upper left corner of its row, `fill` around it."""
    if values[0].ndim == 1:
        return pad_sequence(values, batch_first=True, padding_value=fill)
    sizes = torch.tensor([value.shape for value in values]).amax(0).tolist()
    stacked = values[0].new_full((len(values), *sizes), fill)
    for row, value in zip(stacked, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return stacked
