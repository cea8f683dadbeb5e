"""How well a model predicts text when it reads it segment by segment."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import SegmentCollator, SegmentLanes
from ..training import PonderTotals, bits_per_byte, perplexity

PONDER_FIGURES = ("ponder_time", "ponder_time_std")


@dataclass(frozen=True)
class Score:
    """The figures of one pass over a text.

    loss: nats per predicted token. num_tokens, num_bytes: length of the text. seconds: time of the pass.
    ponder: mean and standard deviation of the steps that a token took, of models that choose them; empty for others.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    seconds: float
    tokens_per_second: float
    ponder: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, ready for JSON."""
        figures = asdict(self)
        return figures | figures.pop("ponder")


def has_memory(model: PreTrainedModel) -> bool:
    """Whether what a segment leaves behind is for the next one to read: a memory, or a recurrent state."""
    return hasattr(model, "create_cache") and hasattr(model.create_cache(), "reset_rows")


@torch.no_grad()
def score_lanes(
    model: PreTrainedModel,
    lanes: SegmentLanes,
    carry_memory: bool = True,
    depth: dict[str, Any] | None = None,
    progress: str = "",
) -> Score:
    """Read `lanes` once, with the memory carried from segment to segment, or with each segment on its own.

    model: in evaluation mode; its configuration says how long the memory is. A model without memory carries none.
    depth: arguments of every call, from `depth_settings`. progress: label of the progress bar; no bar if empty. Every
    token of a lane but its first is predicted.
    """
    batches = DataLoader(lanes, batch_size=lanes.num_lanes, collate_fn=SegmentCollator())
    cache = model.create_cache() if carry_memory and has_memory(model) else None
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    ponder = PonderTotals()
    start = time.perf_counter()
    for segments in tqdm(batches, desc=progress, disable=not progress, unit="segment", leave=False):
        batch: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in segments.items()}
        reset = batch.pop("reset")
        if cache is not None:
            cache.reset_rows(reset)
        # Of the logits next to none: all of them may take more memory than the model.
        batch |= {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": 1}
        output = model(**batch, **(depth or {}))
        total += output.losses.sum(dtype=torch.float64)
        if getattr(output, "ponder_times", None) is not None:
            ponder.add(output.ponder_times)
    loss = float(total) / lanes.num_predictions
    seconds = time.perf_counter() - start
    assert lanes.num_bytes is not None  # the lanes are of a text
    return Score(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=bits_per_byte(loss, lanes.num_tokens, lanes.num_bytes),
        num_tokens=lanes.num_tokens,
        num_bytes=lanes.num_bytes,
        seconds=seconds,
        tokens_per_second=lanes.num_tokens / seconds,
        ponder=dict(zip(PONDER_FIGURES, ponder.mean_and_spread() or (), strict=False)),
    )
