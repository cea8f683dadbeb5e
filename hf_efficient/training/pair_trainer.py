"""Trainer for encoder-decoder models on pairs of texts, with exact losses and generated answers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..data import PairCollator
from .measured import MeasuredRun
from .pair_arguments import PairTrainingArguments
from .schedules import constant_then_inverse_sqrt


class PairTrainer(MeasuredRun, Seq2SeqTrainer):
    """`Seq2SeqTrainer` on pairs of texts, for any encoder-decoder model of transformers.

    The datasets come from `hf_efficient.data.tokenize_pairs`, the tokenizer goes into `processing_class`.

    - `evaluate()` returns `eval_loss`, the exact mean over all target tokens in nats without label smoothing, and
      `eval_perplexity`; with `predict_with_generate` also what `compute_metrics` makes of the generated texts. In
      several processes each pair counts once.
    - Generation ends at the longest target of the training set where neither the arguments nor the model say another
      length; this length goes into the model's generation_config and is saved with it.
    - Batches hold pairs of similar length; their order depends on the seed and the epoch alone, so that a resumed run
      repeats the uninterrupted one bit for bit.
    - Evaluation leaves training's random numbers as they were. `resume_from_checkpoint=True` passes over a checkpoint
      that was cut short.
    - Logs and progress bar show perplexity, target tokens per second and peak memory.

    Label smoothing belongs into the model's configuration where that has `label_smoothing`; the trainer's own would
    drop what else is in the model's loss, such as a ponder cost, and is refused. Other models may use it.

    Example:

        args = PairTrainingArguments("runs/de", predict_with_generate=True, num_train_epochs=10)
        PairTrainer(
            model, args, train_dataset=train, eval_dataset=validation, processing_class=tokenizer,
            compute_metrics=BleuMetric(tokenizer),
        ).train()

    Raises TypeError if the arguments are not `PairTrainingArguments` or there is no tokenizer, ValueError for label
    smoothing in the wrong place, or if `output_dir` holds another run.
    """

    args: PairTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: PairTrainingArguments | None = None,
        data_collator: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = PairTrainingArguments() if args is None else args
        if not isinstance(args, PairTrainingArguments):
            raise TypeError(f"args must be PairTrainingArguments, got {type(args).__name__}: they have more fields")
        if processing_class is None:
            raise TypeError("processing_class=None, but batches are padded with a tokenizer; give it")
        super().__init__(model, args, data_collator, processing_class=processing_class, **kwargs)
        smoothing = args.label_smoothing_factor
        if smoothing > 0 and hasattr(self.model.config, "label_smoothing"):
            raise ValueError(
                f"label_smoothing_factor={smoothing} would drop what else is in the model's loss; leave it at 0 and "
                f"set label_smoothing={smoothing} in the model's configuration"
            )
        if data_collator is None:
            # The trainer's own smoothing takes the labels away, and with them what decoder inputs are made from.
            self.data_collator = PairCollator(processing_class, model=self.model if smoothing > 0 else None)
        self._limit_generation()

    def _limit_generation(self) -> None:
        """Give generation a longest length if it has none: transformers would end every text after 20 tokens."""
        config = self.model.generation_config
        if self.args.generation_max_length is not None:
            config.max_length = self.args.generation_max_length
        elif self.train_dataset is not None and config.max_length is None and config.max_new_tokens is None:
            config.max_length = longest_target(self.train_dataset) + 1  # the start token counts

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Batches of similar length, others in each epoch; other strategies are `Trainer`'s."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return LengthGroupedOrder(self._lengths(), rows, seed)

    def _lengths(self) -> list[int]:
        """Of each training pair: its column of lengths, which the trainer has dropped by now, or its tokens."""
        if self.args.length_column_name in getattr(self.train_dataset, "column_names", ()):
            return self.train_dataset[self.args.length_column_name][:]
        return [len(row["input_ids"]) + len(row["labels"]) for row in self.train_dataset]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The learning rate's course; with `constant_steps`, constant and then the inverse square root."""
        known = self.lr_scheduler  # type: ignore[has-type]  # transformers sets it, which mypy does not read
        if known is None and self.args.constant_steps:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = constant_then_inverse_sqrt(optimizer, self.args.constant_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from the beginning or from a checkpoint; see `MeasuredRun.train`."""
        self._saved_tokens = 0
        return super().train(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, and with it how many target tokens were read, which the steps alone do not tell."""
        num_tokens = self._meter.all_tokens
        self.state.num_input_tokens_seen += num_tokens - self._saved_tokens
        self._saved_tokens = num_tokens
        super()._save_checkpoint(*args, **kwargs)

    def _train_tokens(self) -> int:
        """With those before the checkpoint that the training went on from."""
        return super()._train_tokens() + self.state.num_input_tokens_seen - self._saved_tokens

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """One pass over a dataset; pairs that fill up the last batch of several processes are left out."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, generated ids (batch, length) and labels of one batch; without generation the loss alone.

        Rows of different lengths are padded with -100 when batches are put together.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        loss = None
        if labels is not None:
            loss, _, _ = super().prediction_step(model, dict(inputs), prediction_loss_only=True)
        if not self.args.predict_with_generate or prediction_loss_only:
            return loss, None, None
        made_from_labels = ("labels", "decoder_input_ids", "decoder_attention_mask")
        sources = {name: value for name, value in inputs.items() if name not in made_from_labels}
        settings = {**getattr(self, "_gen_kwargs", {}), **generation}
        settings = {name: value for name, value in settings.items() if value is not None}
        return loss, self.model.generate(**sources, **settings), labels

    def _add_eval_losses(self, outputs: Any, predicted: Tensor) -> None:
        """Count each row once, also where a row fills up the last batch of several processes."""
        losses = outputs.get("losses")
        if losses is None or self.label_smoother is not None:
            losses = token_losses(outputs["logits"], predicted)
        is_predicted = predicted.ne(-100)
        assert self._eval_totals is not None
        nats, counts = self.accelerator.gather_for_metrics(
            (losses.sum(1, dtype=self._eval_totals.dtype), is_predicted.sum(1))
        )
        if self.accelerator.is_main_process:
            self._eval_totals.add_sums(nats.sum(), counts.sum())


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every label (batch, length) in nats; 0 where there is none."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(exact), labels.flatten(), reduction="none").view_as(labels)


def longest_target(tokens: Dataset) -> int:
    """Tokens of the longest row of "labels"."""
    if not hasattr(tokens, "select_columns"):
        return max(len(row["labels"]) for row in tokens)  # type: ignore[attr-defined]  # torch declares no iterator
    batches = tokens.select_columns("labels").with_format("arrow").iter(batch_size=10_000)
    return max(batch["labels"].combine_chunks().value_lengths().to_numpy().max() for batch in batches).item()


class LengthGroupedOrder(Sampler):
    """Indices in random order such that rows of similar length meet in a batch, as `LengthGroupedSampler`'s.

    The order depends on the seed and the epoch alone, not on the global generator, and is the same in all processes.

    lengths: of each row. batch_size: rows of one update over all processes.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called at the begin of every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        seed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1).item()
        generator = torch.Generator().manual_seed(seed)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
