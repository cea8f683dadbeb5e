"""Translation, English to German, Multi30k: the Evolved Transformer beside five others of its size.

So, Liang and Le 2019 (arXiv 1901.11117) found the Evolved Transformer ahead of the Transformer most clearly where
models are small. All rows see the same batches of the same shared BPE in the same order, as often, with the same label
smoothing and schedule; their numbers of parameters differ by less than two percent. The weights tested are the last
ones: nothing is selected. BLEU is sacrebleu's, of the texts as they are, on `test_2016_flickr`; the validation loss is
nats per token, without smoothing. Peak memory is that of training on the batch with the longest sentences, with the
trained weights, in a process that does nothing else.
"""

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from harness import Side, format_table, peak_memory
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MarianConfig, MarianMTModel, PreTrainedModel, PreTrainedTokenizerBase

from hf_efficient import (
    EvolvedTransformerConfig,
    EvolvedTransformerForConditionalGeneration,
    ReformerConfig,
    ReformerForConditionalGeneration,
    UniversalTransformerConfig,
    UniversalTransformerForConditionalGeneration,
)
from hf_efficient.data import IGNORE, PairCollator, read_parallel, tokenize_pairs, train_seq2seq_tokenizer
from hf_efficient.training import bleu

from .batches import Epochs, Groups, in_length_order, to_device
from .summary import by_row, mean_of
from .training import Experiment, Run

FOLDER = "multi30k"
BATCH_FILE = "batch.pt"
FAMILIES = {
    "marian": (MarianConfig, MarianMTModel),
    "evolved_transformer": (EvolvedTransformerConfig, EvolvedTransformerForConditionalGeneration),
    "universal_transformer": (UniversalTransformerConfig, UniversalTransformerForConditionalGeneration),
    "reformer": (ReformerConfig, ReformerForConditionalGeneration),
}
EVALUATION_BATCH = 100
BEAMS = (1, 4)
LONGEST_OUTPUT = 80


def make_model(model: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a row: `family`, and fields of its configuration."""
    config_class, model_class = FAMILIES[model["family"]]
    config = config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        **{name: value for name, value in model.items() if name != "family"},
    )
    return model_class(config)


def trained_parameters(model: nn.Module) -> int:
    """Numbers that training changes: Marian's table of sinusoids is none."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def predict(model: PreTrainedModel, batch: dict[str, Tensor]) -> Any:
    """The model's outputs, with logits for every label; the labels stay outside, so that every loss is the same."""
    labels, config = batch["labels"], model.config
    start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, config.pad_token_id)
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=torch.cat([start, before], 1),
        # Label n is predicted at place n, the start token being at place 0.
        decoder_attention_mask=(labels != IGNORE).long(),
        use_cache=False,
    )


class TranslationTraining(Experiment):
    """The loss of a batch of labelled pairs."""

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        outputs, labels = predict(self.model, batch), batch["labels"]
        loss = cross_entropy(
            outputs.logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORE,
            label_smoothing=self.settings["label_smoothing"],
        )
        figures = {"loss": loss.item()}
        if getattr(outputs, "ponder_loss", None) is not None:
            loss = loss + self.model.config.ponder_cost * outputs.ponder_loss
            figures["ponder_time"] = outputs.ponder_times[labels != IGNORE].mean().item()
        return loss, figures


class Translation(TranslationTraining):
    """One model on Multi30k."""

    def __init__(self, settings: dict[str, Any], seed: int, device: torch.device, data: Path | None = None):
        super().__init__(settings, seed, device, data)
        pairs = {split: load_pairs(data, split) for split in ("train", "val", "test_2016_flickr")}
        self.tokenizer = train_seq2seq_tokenizer(pairs["train"], settings["vocab_size"])
        self.train_set, self.validation_set = (
            tokenize_pairs(pairs[split], self.tokenizer).to_list() for split in ("train", "val")
        )
        self.test_set = tokenize_pairs(pairs["test_2016_flickr"], self.tokenizer).to_list()
        self.references = pairs["test_2016_flickr"]["target"][:]
        self.model = make_model(settings["model"], self.tokenizer).to(device)
        self.epochs = Epochs(lengths_of(self.train_set), settings["training"]["batch_size"], seed)
        self.collate = PairCollator(self.tokenizer)

    def batch(self, step: int) -> dict[str, Tensor]:
        return self._stack(self.train_set, self.epochs.indices(step))

    def _stack(self, examples: list[dict[str, Any]], indices: list[int]) -> dict[str, Tensor]:
        return to_device(dict(self.collate([examples[index] for index in indices])), self.device)

    def results(self) -> dict[str, Any]:
        """Loss and steps on the validation set, BLEU of greedy decoding and of beams, the peak of memory."""
        scores = {num_beams: bleu(self.translate(num_beams), self.references) for num_beams in BEAMS}
        return {
            "parameters": trained_parameters(self.model),
            "bleu": {str(num_beams): round(score.bleu, 2) for num_beams, score in scores.items()},
            "length_ratio": {str(num_beams): round(score.length_ratio, 3) for num_beams, score in scores.items()},
            "signature": scores[1].signature,
            **self._validate(),
            "peak_memory_mb": self._peak_memory(),
        }

    def translate(self, num_beams: int) -> list[str]:
        """A translation for every source of the test set, in its order."""
        translations: dict[int, str] = {}
        for indices in in_length_order(lengths_of(self.test_set), EVALUATION_BATCH):
            batch = self._stack(self.test_set, indices)
            output_ids = self.model.generate(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_beams=num_beams,
                do_sample=False,
                max_new_tokens=LONGEST_OUTPUT,
            )
            texts = self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)
            translations |= dict(zip(indices, texts, strict=True))
        return [translations[index] for index in range(len(self.test_set))]

    def _validate(self) -> dict[str, Any]:
        """Nats per token, and the mean steps of decoder and encoder for a model that halts."""
        losses, ponder_times = Groups(), Groups()
        for indices in in_length_order(lengths_of(self.validation_set), EVALUATION_BATCH):
            batch = self._stack(self.validation_set, indices)
            outputs, is_counted = predict(self.model, batch), batch["labels"] != IGNORE
            token_losses = cross_entropy(outputs.logits[is_counted], batch["labels"][is_counted], reduction="none")
            losses.add_all([""] * len(token_losses), token_losses.tolist())
            for name, mask in (("", is_counted), ("encoder_", batch["attention_mask"].bool())):
                steps = getattr(outputs, f"{name}ponder_times", None)
                if steps is not None:
                    ponder_times.add_all([name] * int(mask.sum()), steps[mask].tolist())
        return {
            "validation_loss": losses.mean(),
            "ponder_time": ponder_times.mean([""]),
            "encoder_ponder_time": ponder_times.mean(["encoder_"]),
        }

    def _peak_memory(self) -> float | None:
        """MB that training takes beyond the imported libraries; measured on a CPU only."""
        if self.device.type != "cpu":
            return None
        longest = in_length_order(lengths_of(self.train_set), self.settings["training"]["batch_size"])[-1]
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            torch.save(self._stack(self.train_set, longest), Path(folder) / BATCH_FILE)
            side = Side(__name__, LongestBatch.__name__, {"folder": folder, "settings": self.settings})
            return round(peak_memory(side, torch.get_num_threads())["mb"], 1)


make_experiment = Translation


class LongestBatch(TranslationTraining):
    """Updates on one batch, in the process whose memory is measured.

    folder: holds the model and the batch.
    """

    def __init__(self, folder: str, settings: dict[str, Any]):
        super().__init__(settings, seed=0, device=torch.device("cpu"))
        model_class = FAMILIES[settings["model"]["family"]][1]
        self.model = model_class.from_pretrained(folder).train()
        self._batch = torch.load(Path(folder) / BATCH_FILE)
        self._training = Run(self)

    def batch(self, step: int) -> dict[str, Tensor]:
        return self._batch

    def run(self) -> None:
        """One update."""
        self._training.update()


def load_pairs(data: Path | None, split: str) -> Dataset:
    """The pairs of a split.

    Raises:
        FileNotFoundError: no data folder, or no such files in it.
    """
    if data is None:
        raise FileNotFoundError(f"Multi30k is not ours to ship: give a folder that holds {FOLDER}/ by --data FOLDER.")
    return read_parallel(*(data / FOLDER / f"{split}.{language}.gz" for language in ("en", "de")))


def lengths_of(examples: list[dict[str, Any]]) -> list[int]:
    """Tokens of both sides."""
    return [example["length"] for example in examples]


def table(rows: list[dict[str, Any]]) -> str:
    """Quality and cost of every model; means over the seeds, and how far these lie apart."""
    header = ["model", "parameters", "BLEU greedy", "BLEU, 4 beams", "validation loss", "updates", "training s"]
    header += ["peak MB", "steps of a token: decoder", "encoder", "seeds"]
    cells = []
    for row, of_row in by_row(rows):
        memory = mean_of(of_row, "peak_memory_mb")
        cells.append(
            [
                row,
                f"{of_row[0]['results']['parameters']:,}",
                *(with_range(of_row, 2, "bleu", str(num_beams)) for num_beams in BEAMS),
                with_range(of_row, 3, "validation_loss"),
                f"{of_row[0]['training']['steps']:,}",
                f"{fmean(run['training']['seconds'] for run in of_row):.0f}",
                "" if memory is None else f"{memory:.0f}",
                *(steps_of(of_row, f"{stack}ponder_time") for stack in ("", "encoder_")),
                str(len(of_row)),
            ]
        )
    return format_table(header, cells)


def with_range(of_row: list[dict[str, Any]], digits: int, *path: str) -> str:
    """Mean of a figure over the seeds, and its lowest and highest value where there are several."""
    text = f"{mean_of(of_row, *path):.{digits}f}"
    if len(of_row) == 1:
        return text
    values = [mean_of([run], *path) for run in of_row]
    return f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def steps_of(of_row: list[dict[str, Any]], name: str) -> str:
    """Mean steps of a token; nothing for a model that does not halt."""
    steps = mean_of(of_row, name)
    return "" if steps is None else f"{steps:.2f}"
