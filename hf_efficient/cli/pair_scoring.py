"""How well a model with encoder and decoder predicts targets, and how like them its own answers are."""

import time
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import PairCollator
from ..training import PonderTotals, perplexity
from .models import quiet
from .scoring import PONDER_FIGURES


def by_length(tokens: Dataset, batch_size: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], DataLoader]:
    """Batches of pairs of similar length, and the places of their rows in `tokens`, in the order of the batches."""
    lengths = tokens["length"][:]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return order, DataLoader(tokens.select(order), batch_size, collate_fn=PairCollator(tokenizer))


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Dataset,
    batch_size: int,
    depth: dict[str, Any],
    progress: str = "",
) -> dict[str, Any]:
    """Loss in nats per target token, the exact mean over all of `tokens` (`tokenize_pairs`), and what follows from it.

    model: in evaluation mode. depth: arguments of every call, from `depth_settings`. progress: label of the progress
    bar; no bar if empty.
    """
    _, batches = by_length(tokens, batch_size, tokenizer)
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    num_tokens, ponder, start = 0, PonderTotals(), time.perf_counter()
    for rows in tqdm(batches, desc=progress, disable=not progress, unit="batch", leave=False):
        batch = {name: tensor.to(model.device) for name, tensor in rows.items()}
        output = model(**batch, **depth)
        losses = F.cross_entropy(output.logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none")
        nats += losses.sum(dtype=torch.float64)
        num_tokens += int((rows["labels"] != -100).sum())
        if getattr(output, "ponder_times", None) is not None:
            ponder.add(output.ponder_times)
    loss, seconds = float(nats) / num_tokens, time.perf_counter() - start
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "num_pairs": len(tokens),
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        **dict(zip(PONDER_FIGURES, ponder.mean_and_spread() or (), strict=False)),
    }


@torch.no_grad()
def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Dataset,
    batch_size: int,
    settings: dict[str, Any],
    progress: str = "",
) -> list[str]:
    """The model's answer to each source of `tokens`, in their order. settings: of `generate`."""
    order, batches = by_length(tokens, batch_size, tokenizer)
    answers = []
    for rows in tqdm(batches, desc=progress, disable=not progress, unit="batch", leave=False):
        sources = {name: rows[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with quiet():  # of a saved longest length beside max_new_tokens
            generated = model.generate(**sources, do_sample=False, **settings)
        answers += tokenizer.batch_decode(generated, skip_special_tokens=True)
    in_order = dict(zip(order, answers, strict=True))
    return [in_order[place].strip() for place in range(len(answers))]
