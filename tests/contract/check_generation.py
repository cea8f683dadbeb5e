"""Generating: padded batches, streams, assistants."""

from pathlib import Path

import torch
from contract.inputs import generated, token_ids
from contract.rows import Row
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Collector(BaseStreamer):
    """Keeps what `generate` hands out, call by call."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def check_left_padding(row: Row, folder: Path) -> None:
    """A batch of texts of unequal lengths, padded on the left, continues each as it is continued alone."""
    model = row.build()
    texts = [token_ids(1, length, seed=length) for length in (5, 11, 8)]
    width = max(text.shape[1] for text in texts)
    padded = torch.cat([torch.nn.functional.pad(text, (width - text.shape[1], 0)) for text in texts])
    given = generated(model, padded, attention_mask=(padded != 0).long())
    for text, continuation in zip(texts, given, strict=True):
        assert continuation[-6:].tolist() == generated(model, text)[0, -6:].tolist()


def check_streaming(row: Row, folder: Path) -> None:
    """Tokens arrive one by one, and are those that `generate` returns."""
    model, streamer, ids = row.build(), Collector(), token_ids(1, 6)
    whole = generated(model, ids, streamer=streamer)
    assert streamer.ended
    assert torch.cat(streamer.pieces).tolist() == whole[0].tolist()
    assert [len(piece) for piece in streamer.pieces[1:]] == [1] * 6


def check_assisted(row: Row, folder: Path) -> None:
    """With an assistant that is often wrong, and with words found in the prompt: what greedy search alone gives."""
    model, assistant, ids = row.build(), row.build(seed=11), token_ids(1, 6)
    expected = generated(model, ids, max_new_tokens=12).tolist()
    assert generated(model, ids, max_new_tokens=12, assistant_model=assistant).tolist() == expected
    assert generated(model, ids, max_new_tokens=12, prompt_lookup_num_tokens=3).tolist() == expected
