"""transformers' own Trainer on our models: no carried memory, and everything as for a model of its own."""

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from training.small_run import VOCAB_SIZE, small_corpus, small_model
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments


@pytest.fixture(scope="module")
def tokenizer():
    """A word-level tokenizer of the small vocabulary."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCAB_SIZE)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>"
    )


def arguments(output_dir, **settings) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, **settings}
    return TrainingArguments(
        str(output_dir), learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, **settings
    )


def blocks() -> Dataset:
    """Texts of one length, as run_clm.py makes them: labels are the inputs."""
    tokens = [token for document in small_corpus()["input_ids"] for token in document]
    inputs = [tokens[start : start + 16] for start in range(0, 16 * 24, 16)]
    return Dataset.from_dict({"input_ids": inputs, "labels": inputs})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trains_and_evaluates_blocks_of_text(tmp_path):
    data = blocks()
    trainer = Trainer(small_model(), arguments(tmp_path, num_train_epochs=4), train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    text = torch.tensor(data["input_ids"])
    with torch.no_grad():
        assert before == pytest.approx(trainer.model(text, labels=text).loss.item(), rel=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1


def test_memory_is_not_carried(tmp_path):
    data = blocks()
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    trainer = Trainer(small_model(), arguments(tmp_path, **settings), train_dataset=data)
    trainer.args.learning_rate = 0.0
    trainer.train()
    text = torch.tensor(data["input_ids"])
    with torch.no_grad():
        alone = [trainer.model(text[i : i + 4], labels=text[i : i + 4]).loss.item() for i in (0, 4, 8)]
    assert losses(trainer) == pytest.approx(alone, rel=1e-6)


def test_language_model_collator_with_padding(tmp_path, tokenizer):
    """Rows of unequal length, padded by the collator; the loss is the mean over real tokens whatever the batch."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = small_corpus().remove_columns("num_bytes")
    results = []
    for rows in (12, 3):
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 12 // rows, "max_steps": 2}
        trainer = Trainer(
            small_model(),
            arguments(tmp_path, train_sampling_strategy="sequential", **settings),
            data_collator=collator,
            train_dataset=data,
            eval_dataset=data,
        )
        trainer.train()
        results.append((losses(trainer), dict(trainer.model.named_parameters())))
    assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    assert trainer.evaluate()["eval_loss"] > 0


def test_resumes_exactly(tmp_path):
    """The checkpoint is under the names on disk, the Trainer loads it by the names in the model."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = Trainer(small_model(dropout=0.2), arguments(tmp_path, **settings), train_dataset=blocks())
    whole.train()
    resumed = Trainer(small_model(seed=1, dropout=0.2), arguments(tmp_path, **settings), train_dataset=blocks())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.named_parameters():
        assert torch.equal(dict(resumed.model.named_parameters())[name], value), name


def test_loads_the_best_model(tmp_path):
    data = blocks()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = Trainer(
        small_model(),
        arguments(tmp_path, load_best_model_at_end=True, **settings),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
