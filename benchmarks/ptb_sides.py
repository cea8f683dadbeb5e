"""A small Transformer-XL trained on Penn Treebank, words, with a memory of any length; 0 is none."""

import time
from pathlib import Path
from typing import Any

import torch

from hf_efficient import TransformerXLConfig, TransformerXLForCausalLM
from hf_efficient.data import SegmentLanes, load_documents, segment_lanes, tokenize_documents, train_tokenizer
from hf_efficient.training import SegmentTrainer, SegmentTrainingArguments

EVAL_LANES = 10


class TrainOnPtb:
    """Trains for a fixed number of steps, then evaluates with any memory length.

    Everything but `mem_len` is the same in every run with the same options: text, order, initial weights, schedule.

    Args:
        data: folder with `ptb.train.txt` and `ptb.test.txt`, plain or `.gz`.
        model: fields of `TransformerXLConfig` but the vocabulary's size and `mem_len`.
        mem_len: memory in training.
        training: fields of `SegmentTrainingArguments`.
        segment_len, lanes: tokens and rows of a training step.
        folder: where tables and the run may be written.
    """

    def __init__(
        self,
        data: str,
        model: dict[str, Any],
        mem_len: int,
        training: dict[str, Any],
        segment_len: int,
        lanes: int,
        folder: str,
    ):
        train, test = (load_documents(text_file(data, split), cache_dir=folder) for split in ("train", "test"))
        tokenizer = train_tokenizer(train, "word", lowercase=True)
        self.train_lanes, self.test_lanes = (
            self._cut(documents, tokenizer, rows, segment_len)
            for documents, rows in ((train, lanes), (test, EVAL_LANES))
        )
        torch.manual_seed(training["seed"])
        self.model = TransformerXLForCausalLM(TransformerXLConfig(vocab_size=len(tokenizer), mem_len=mem_len, **model))
        arguments = SegmentTrainingArguments(
            folder,
            per_device_train_batch_size=lanes,
            per_device_eval_batch_size=EVAL_LANES,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            **training,
        )
        self.trainer = SegmentTrainer(self.model, arguments, train_dataset=self.train_lanes)

    def _cut(self, documents: Any, tokenizer: Any, lanes: int, segment_len: int) -> SegmentLanes:
        return segment_lanes(
            tokenize_documents(documents, tokenizer, add_eos=False, eos_per_line=True), lanes, segment_len
        )

    def describe(self) -> dict[str, Any]:
        """What must be the same in the runs that are compared: sizes, and a checksum of the weights."""
        weights = sum(p.double().abs().sum().item() for p in self.model.parameters())
        return {
            "parameters": self.model.num_parameters(),
            "weights": weights,
            "train tokens": self.train_lanes.num_tokens,
            "test tokens": self.test_lanes.num_tokens,
        }

    def train(self) -> dict[str, float]:
        """Train; seconds per step and the mean loss over all of them."""
        start = time.perf_counter()
        result = self.trainer.train()
        seconds = time.perf_counter() - start
        return {"seconds_per_step": seconds / result.global_step, "loss": result.training_loss}

    def test_perplexity(self, mem_len: int) -> float:
        """Perplexity of the test text, read in segments with a memory of `mem_len`."""
        trained_with, self.model.config.mem_len = self.model.config.mem_len, mem_len
        try:
            return self.trainer.evaluate(self.test_lanes)["eval_perplexity"]
        finally:
            self.model.config.mem_len = trained_with


def text_file(data: str, split: str) -> Path:
    """`ptb.<split>.txt` of a folder, plain or compressed.

    Raises:
        FileNotFoundError: neither is there.
    """
    for name in (f"ptb.{split}.txt", f"ptb.{split}.txt.gz"):
        if (Path(data) / name).exists():
            return Path(data) / name
    raise FileNotFoundError(f"{data} holds neither ptb.{split}.txt nor ptb.{split}.txt.gz; give the folder by --data.")
