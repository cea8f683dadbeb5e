"""Batches with and without padding."""

import torch

from hf_efficient.data import SegmentCollator


def item(length: int, segment_length: int = 4, reset: bool = False) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.arange(segment_length),
        "attention_mask": (torch.arange(segment_length) < length).long(),
        "reset": torch.tensor(reset),
    }


def test_batch_without_padding_has_no_mask():
    batch = SegmentCollator()([item(4), item(4, reset=True)])
    assert batch.keys() == {"input_ids", "reset"}
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch["reset"].tolist() == [False, True]


def test_batch_with_padding_has_a_mask():
    batch = SegmentCollator()([item(4), item(3)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_items_whose_mask_a_trainer_removed():
    assert SegmentCollator()([{"input_ids": torch.arange(4)}]).keys() == {"input_ids"}
