"""SegmentTrainingArguments: defaults that fit, contradictions refused."""

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_efficient.training import SegmentTrainingArguments


def test_defaults():
    args = SegmentTrainingArguments(use_cpu=True)
    assert args.train_sampling_strategy == "sequential"
    assert not args.remove_unused_columns
    assert args.label_names == ["labels"]
    assert args.logging_steps == 10


def test_no_new_fields():
    ours, theirs = (set(cls.__dataclass_fields__) for cls in (SegmentTrainingArguments, TrainingArguments))
    assert ours == theirs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' .*'sequential'"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random' .*order of the text"),
        ({"dataloader_in_order": False, "dataloader_num_workers": 1}, "dataloader_in_order=False .*True"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True .*middle of its lanes"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True .*number of lanes"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True .*reset"),
        ({"label_names": ["start_positions"]}, "label_names=.*start_positions.*labels"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 .*border"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False .*padded"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config split_batches=True .*own lanes"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config dispatch_batches=True .*own lanes"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentTrainingArguments(use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("metric", "greater_is_better"),
    [("loss", False), ("perplexity", False), ("eval_bits_per_byte", False), ("accuracy", True), (None, None)],
)
def test_direction_of_the_best_metric(metric, greater_is_better):
    args = SegmentTrainingArguments(use_cpu=True, metric_for_best_model=metric)
    assert args.greater_is_better == greater_is_better


def test_direction_may_be_given():
    args = SegmentTrainingArguments(use_cpu=True, metric_for_best_model="perplexity", greater_is_better=True)
    assert args.greater_is_better


def test_several_gpus_in_one_process_become_one(monkeypatch, caplog):
    monkeypatch.setattr(SegmentTrainingArguments, "n_gpu", property(lambda args: getattr(args, "_n_gpu", 4)))
    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(lambda args: None))
    args = SegmentTrainingArguments(use_cpu=True)
    assert args.n_gpu == 1
    assert "torchrun --nproc_per_node 4" in caplog.text


def test_parses_from_a_command_line():
    (args,) = HfArgumentParser(SegmentTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "x", "--use_cpu"]
    )
    assert args.train_sampling_strategy == "sequential"
    assert args.label_names == ["labels"]
