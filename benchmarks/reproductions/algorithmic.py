"""Copy, reverse and addition: tested on up to ten times as many symbols as were trained on.

Encoder-decoder models, positions of which begin at a random number in training, the same for both sides of an example
(Dehghani et al. 2019, arXiv 1807.03819, section 3.4). Outputs are scored as tensor2tensor scores them: each symbol is
predicted after the right ones before it. A sequence counts when all of its symbols are right, which is the same as
greedy decoding being right. The weights tested are the last ones: nothing is selected.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from harness import format_table
from torch import Tensor

from hf_efficient import UniversalTransformerConfig, UniversalTransformerForConditionalGeneration
from hf_efficient.data import ALGORITHMIC_TASKS, EOS_ID, IGNORE, PAD_ID, PaddingCollator

from .batches import Groups, in_length_order, to_device
from .summary import by_row, mean_of, percent, training_columns
from .training import Experiment

# A test seed is no training seed.
TEST_SEED = 2**20
TRAINING_EXAMPLES = 2**31
# So many batches are drawn, sorted by length and cut, so that little is padded.
POOL_SIZE = 8


class Algorithmic(Experiment):
    """One task; `lengths` has `train` and `test`, the longest sources of each."""

    def __init__(self, settings: dict[str, Any], seed: int, device: torch.device, data: Path | None = None):
        super().__init__(settings, seed, device, data)
        self.task_class = ALGORITHMIC_TASKS[settings["task"]]
        self.train_set = self.task_class(TRAINING_EXAMPLES, max_length=settings["lengths"]["train"], seed=seed)
        fields = {name: value for name, value in settings["model"].items() if name != "family"}
        config = UniversalTransformerConfig(
            vocab_size=self.train_set.vocab_size,
            pad_token_id=PAD_ID,
            eos_token_id=EOS_ID,
            decoder_start_token_id=PAD_ID,
            **fields,
        )
        self.model = UniversalTransformerForConditionalGeneration(config).to(device)
        self.collate = PaddingCollator(PAD_ID)
        self._pool, self._batches = -1, []

    def batch(self, step: int) -> dict[str, Tensor]:
        pool, batch = divmod(step, POOL_SIZE)
        if pool != self._pool:
            size = self.settings["training"]["batch_size"]
            first = pool * POOL_SIZE * size
            examples = [self.train_set[index] for index in range(first, first + POOL_SIZE * size)]
            order = in_length_order(list(map(length_of, examples)), size)
            self._pool, self._batches = pool, [[examples[index] for index in indices] for indices in order]
        # Short and long in turns: 0, 7, 1, 6, ...
        chosen = self._stack(self._batches[batch // 2 if batch % 2 == 0 else POOL_SIZE - 1 - batch // 2])
        return self._with_positions(chosen, step)

    def _with_positions(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """With the start of each example's positions drawn uniformly, 0 to `max_position_offset`."""
        generator = torch.Generator().manual_seed(hash((self.seed, step)) % 2**31)
        largest = self.settings["max_position_offset"]
        starts = torch.randint(0, largest + 1, (len(batch["labels"]), 1), generator=generator).to(self.device)
        lengths = {"position_ids": "input_ids", "decoder_position_ids": "labels"}
        positions = {
            name: starts + torch.arange(batch[other].shape[1], device=self.device) for name, other in lengths.items()
        }
        return batch | positions

    def _stack(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return to_device(self.collate(examples), self.device)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        outputs = self.model(**batch)
        labels = batch["labels"]
        is_right = outputs.logits.argmax(-1) == labels
        is_counted = labels != IGNORE
        figures = {
            "symbols": is_right[is_counted].float().mean().item(),
            "sequences": (is_right | ~is_counted).all(-1).float().mean().item(),
            "loss": outputs.loss.item(),
        }
        return outputs.loss, figures

    def results(self) -> dict[str, Any]:
        """Accuracy of symbols and sequences, up to the training length, up to the test length, and by length."""
        trained, longest = self.settings["lengths"]["train"], self.settings["lengths"]["test"]
        within = self._score(self.task_class(self.settings["test_examples"], max_length=trained, seed=TEST_SEED))
        beyond = self._score(self.task_class(self.settings["test_examples"], max_length=longest, seed=TEST_SEED))
        return {"in_distribution": within, "long": beyond, "ponder_time": beyond["ponder_time"]}

    def _score(self, task: Any) -> dict[str, Any]:
        """Over a whole test set."""
        examples = [task[index] for index in range(len(task))]
        symbols, sequences, by_length, ponder_times = Groups(), Groups(), Groups(), Groups()
        for indices in in_length_order(list(map(length_of, examples)), batch_size=20):
            batch = self._stack([examples[index] for index in indices])
            outputs = self.model(**batch)
            is_counted = batch["labels"] != IGNORE
            is_right = (outputs.logits.argmax(-1) == batch["labels"]) & is_counted
            for index, right, counted in zip(indices, is_right, is_counted, strict=True):
                span = self._span(length_of(examples[index]))
                symbols.add_all([span] * int(counted.sum()), right[counted].tolist())
                sequences.add(span, bool(right.sum() == counted.sum()))
                by_length.add(span, length_of(examples[index]))
            if outputs.ponder_times is not None:
                ponder_times.add_all([""] * int(is_counted.sum()), outputs.ponder_times[is_counted].tolist())
        return {
            "symbols": symbols.mean(),
            "sequences": sequences.mean(),
            "symbols_by_length": symbols.means(),
            "sequences_by_length": sequences.means(),
            "examples_by_length": by_length.counts(),
            "most_frequent_symbol": most_frequent(examples),
            "ponder_time": ponder_times.mean(),
        }

    def _span(self, length: int) -> int:
        """The upper end of the span of lengths, each twice as long as the one before."""
        end = self.settings["lengths"]["train"]
        while end < length:
            end *= 2
        return min(end, self.settings["lengths"]["test"])


make_experiment = Algorithmic


def length_of(example: dict[str, Tensor]) -> int:
    """Symbols of the source, end of sequence not counted."""
    return len(example["input_ids"]) - 1


def most_frequent(examples: list[dict[str, Tensor]]) -> float:
    """Share of the symbol that is most frequent in the targets."""
    counts = Counter(symbol for example in examples for symbol in example["labels"].tolist())
    return round(max(counts.values()) / sum(counts.values()), 4)


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in percent of symbols and of sequences, in the training lengths and beyond: a table for each."""
    by_lengths: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        lengths = row["settings"]["lengths"]
        by_lengths.setdefault((lengths["train"], lengths["test"]), []).append(row)
    return "\n\n".join(
        ["Percent of symbols / of whole sequences predicted.", *(_table_of(*pair) for pair in by_lengths.items())]
    )


def _table_of(lengths: tuple[int, int], rows: list[dict[str, Any]]) -> str:
    """The rows that were trained and tested on the same lengths."""
    spans = list(rows[0]["results"]["long"]["symbols_by_length"])
    header = ["task, model", "most frequent symbol", f"≤ {lengths[0]}", f"≤ {lengths[1]}"]
    header += [f"{int(low) + 1} to {high}" for low, high in zip(spans[:-1], spans[1:], strict=True)]
    cells = []
    for row, of_row in by_row(rows):
        line = [row, percent(mean_of(of_row, "long", "most_frequent_symbol"))]
        for kind in ("in_distribution", "long"):
            line.append(_pair(mean_of(of_row, kind, "symbols"), mean_of(of_row, kind, "sequences")))
        for span in spans[1:]:
            figures = (mean_of(of_row, "long", f"{unit}_by_length", span) for unit in ("symbols", "sequences"))
            line.append(_pair(*figures))
        cells.append([*line, *training_columns(of_row)])
    return format_table([*header, *training_columns()], cells)


def _pair(symbols: float, sequences: float) -> str:
    return f"{percent(symbols)} / {percent(sequences)}"
