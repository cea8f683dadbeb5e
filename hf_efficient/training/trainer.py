"""Trainer that carries a model's memory from segment to segment."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .arguments import SegmentTrainingArguments
from .metrics import LossTotals
from .text_trainer import TextTrainer


class SegmentTrainer(TextTrainer):
    """`TextTrainer` with segment memory: what a segment leaves in `past_key_values`, the next one attends to.

    From Dai et al. 2019, arXiv 1901.02860, section 3.2.

    The datasets come from `hf_efficient.data.segment_lanes`: row b of every batch continues row b of the batch before,
    in each process its own rows. Memory moves on with every batch, also inside an accumulated update; rows start anew
    where a batch's column `reset` says so (lane starts, and document starts if the dataset marks them). Gradients stop
    at the segment's border (Dai et al. 2019, section 3.2).

    - Evaluation and prediction begin with an empty memory of their own and leave training's as it was, random numbers
      included, so that a run does not depend on how often it is evaluated.
    - `evaluate()` returns `eval_loss`, the exact mean over all predicted tokens in nats, `eval_perplexity` and, if the
      dataset knows its bytes, `eval_bits_per_byte`.
    - Each process saves its memory with every checkpoint (safetensors), so that a resumed run repeats the
      uninterrupted one bit for bit. `resume_from_checkpoint=True` passes over a checkpoint that was cut short.
    - Logs and progress bar show perplexity, bits per byte, tokens per second, memory length and peak memory.

    The model needs `create_cache()`, and outputs with `losses` (per token) and `past_key_values`; a cache needs
    `reset_rows`, `state_dict` and `load_state_dict`, and `memory_length` for the logs. A recurrent network's state is
    such a memory too: truncated back-propagation through time. All else is `Trainer`'s: DDP and FSDP2 through
    `torchrun` or `accelerate launch`, mixed precision, activation checkpointing, schedules, callbacks, the Hub.

    Attributes:
        memory: the memory of this process's rows, a Cache; None before the first step.

    Example:

        lanes = segment_lanes(tokens, num_lanes=16, segment_length=128)
        args = SegmentTrainingArguments("runs/xl", per_device_train_batch_size=16, max_steps=1000)
        SegmentTrainer(model, args, train_dataset=lanes).train()

    Raises TypeError if the model has no `create_cache`, the arguments are not `SegmentTrainingArguments`, or a dataset
    has no lanes; ValueError if a dataset's lanes are not those of a batch, or if `output_dir` holds another run.
    """

    args: SegmentTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: SegmentTrainingArguments | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, data_collator, **kwargs)
        if not hasattr(self.model, "create_cache"):
            raise TypeError(
                f"{type(self.model).__name__} has no create_cache(), so there is no memory to carry between segments: "
                "train it with TextTrainer or transformers.Trainer"
            )
        if self.eval_dataset is not None:
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for dataset in named.values():
                self._check_lanes(dataset, "eval")
        self.memory: Any = None

    def _check_lanes(self, dataset: Dataset, kind: str) -> None:
        """Refuse a dataset whose lanes are not the rows of a batch; kind: "train" or "eval"."""
        name, field = f"{kind}_dataset", f"per_device_{kind}_batch_size"
        num_lanes = getattr(dataset, "num_lanes", None)
        if num_lanes is None:
            raise TypeError(
                f"{name} must be a dataset of lanes, got {type(dataset).__name__}: make one with "
                "hf_efficient.data.segment_lanes, or train with transformers.Trainer, which carries no memory"
            )
        rows, processes = getattr(self.args, field), self.args.world_size
        if num_lanes != rows * processes:
            raise ValueError(
                f"{name} has num_lanes={num_lanes}, but a batch has {field}={rows} rows x {processes} process(es): "
                f"make it with num_lanes={rows * processes}"
            )

    def get_train_dataloader(self) -> DataLoader:
        """The batches in the order of the text; this process's rows of them."""
        if self.train_dataset is not None:
            self._check_lanes(self.train_dataset, "train")
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """The order of the text."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None:
            return None
        return SequentialSampler(dataset)  # type: ignore[arg-type]  # torch declares no length

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train with an empty memory, or from a checkpoint with the memory saved there; see `TextTrainer.train`.

        Raises FileNotFoundError if the checkpoint holds no memory for this number of processes.
        """
        self.memory = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Loss of one segment of every lane, given the memory of the segments before; the memory moves on.

        inputs: the model's inputs with `shift_labels` (batch, length), and `reset` (batch,), true where a row starts
        anew.
        """
        if self.memory is None:
            self.memory = self.model.create_cache()
        else:
            self.memory.reset_rows(inputs["reset"])
        inputs = {**inputs, "past_key_values": self.memory}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.memory = outputs["past_key_values"]
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """One pass over a dataset with a memory of its own."""
        self._check_lanes(dataloader.dataset, "eval")
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    @contextlib.contextmanager
    def _apart_from_training(self) -> Iterator[LossTotals]:
        """Own memory too; training's is put back behind the block."""
        training_memory, self.memory = self.memory, None
        try:
            with super()._apart_from_training() as totals:
                yield totals
        finally:
            self.memory = training_memory

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the memory's length as well, if it has one: the state of a recurrent network has none."""
        if "loss" in logs and hasattr(self.memory, "memory_length"):
            logs["memory_length"] = self.memory.memory_length
        super().log(logs, start_time)

    # Trainer calls the next two in every process, where a checkpoint is written and read. Of what rank 0 writes only
    # trainer_state.json comes later, which therefore marks a checkpoint as complete.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        memory = self.model.create_cache() if self.memory is None else self.memory
        save_file(memory.state_dict(), self._memory_path(output_dir))
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.memory = self._load_memory(checkpoint)

    def _memory_path(self, checkpoint: str | os.PathLike) -> Path:
        return Path(checkpoint) / f"memory_{self.args.process_index}_of_{self.args.world_size}.safetensors"

    def _load_memory(self, checkpoint: str | os.PathLike) -> Any:
        path = self._memory_path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: resume with as many processes as wrote the checkpoint, and from one that "
                "SegmentTrainer wrote"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): resume from an earlier checkpoint") from error
        memory = self.model.create_cache()
        memory.load_state_dict({name: tensor.to(self.args.device) for name, tensor in tensors.items()})
        return memory
