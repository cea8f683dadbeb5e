"""Training: checkpointed gradients and transformers' trainers."""

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contract.check_loading import saved
from contract.inputs import generated, gradients, inputs_of, result, training_inputs_of
from contract.rows import Row
from models.model_tools import EXACT
from torch.nn.functional import cross_entropy
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

SCRIPT = Path(__file__).parent / "run_clm.py"


def check_gradient_checkpointing(row: Row, folder: Path) -> None:
    """Both kinds, reentrant and not: the gradients of ordinary training."""
    expected = gradients(row, row.build().train())
    for use_reentrant in (True, False):
        model = row.build().train()
        # The second name came with transformers 5.23, which warns at the first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
        assert model.is_gradient_checkpointing
        given = gradients(row, model)
        for name, gradient in expected.items():
            torch.testing.assert_close(given[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


# --- trainers ---------------------------------------------------------------------------------------------


def examples(row: Row, count: int = 4) -> list[dict[str, Any]]:
    """Rows of a data set; every other one has labels for half its tokens only."""
    batch = training_inputs_of(row, num_rows=count)
    if batch.get("labels") is not None and batch["labels"].ndim == 2:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][::2, batch["labels"].shape[1] // 2 :] = -100
    return [{name: tensor[index] for name, tensor in batch.items()} for index in range(count)]


def arguments(folder: Path, cls: type = TrainingArguments, **settings: Any) -> TrainingArguments:
    """One step of plain gradient descent over four examples, in order."""
    fixed = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    one_step = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.1, "max_grad_norm": 0.0}
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    return cls(**(fixed | one_step | plain | settings))


def trained(row: Row, folder: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], float]:
    """Parameters after one step, and the loss that was logged."""
    model = row.build()
    trainer = Trainer(model, arguments(folder, logging_steps=1, **settings), train_dataset=examples(row))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, losses[0]


def check_trainer(row: Row, folder: Path) -> None:
    """transformers' `Trainer`: trains, evaluates, and predicts what the model computes."""
    model = row.build()
    settings = arguments(folder, per_device_eval_batch_size=2)
    trainer = Trainer(model, settings, train_dataset=examples(row), eval_dataset=examples(row))
    before = trainer.evaluate()["eval_loss"]
    before_training = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before_training[name], value) for name, value in model.named_parameters())
    prediction = trainer.predict(examples(row))
    assert prediction.metrics["test_loss"] == trainer.evaluate()["eval_loss"] != before
    inputs = {name: torch.stack([example[name] for example in examples(row)]) for name in examples(row)[0]}
    model.eval()
    with torch.no_grad():
        output = model(**inputs)
    predictions = prediction.predictions
    expected = output.start_logits if row.kind == "ForQuestionAnswering" else output.logits
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    torch.testing.assert_close(torch.as_tensor(logits), expected, **EXACT)


def check_accumulation(row: Row, folder: Path) -> None:
    """Two batches of two make the same step as one of four, though they have unequal numbers of labels."""
    expected, loss = trained(row, folder)
    given, given_loss = trained(row, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert abs(given_loss - loss) <= 1e-4 * abs(loss)
    for name, parameter in expected.items():
        torch.testing.assert_close(
            given[name], parameter, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )


def check_label_smoothing(row: Row, folder: Path) -> None:
    """The Trainer's smoothed loss is that of each token's own label: the next token, where a language model has it."""
    model, rows = row.build(), examples(row)
    if row.kind == "ForConditionalGeneration":
        # As DataCollatorForSeq2Seq does: the Trainer keeps the labels from the model.
        for example in rows:
            shifted = model.prepare_decoder_input_ids_from_labels(labels=example["labels"][None])
            example["decoder_input_ids"] = shifted[0]
    inputs = {name: torch.stack([example[name] for example in rows]) for name in rows[0]}
    labels = inputs.pop("labels")
    logits = result(model, **inputs)
    settings = arguments(folder, logging_steps=1, label_smoothing_factor=0.3)
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    if row.kind in ("ForCausalLM", "ModelWithLMHead"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=0.3).item()
    assert abs(trainer.state.log_history[0]["loss"] - expected) <= 1e-4 * abs(expected)


def check_seq2seq_trainer(row: Row, folder: Path) -> None:
    """transformers' `Seq2SeqTrainer` with `predict_with_generate`: predictions are what `generate` gives."""
    model = row.build(bos_token_id=1, eos_token_id=2)
    settings = arguments(
        folder, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=7, generation_num_beams=1
    )
    trainer = Seq2SeqTrainer(model, settings, train_dataset=examples(row), eval_dataset=examples(row))
    trainer.train()
    given = trainer.predict(examples(row)).predictions
    ids = inputs_of(row, num_rows=4)["input_ids"]
    model.eval()
    expected = generated(model, ids, max_new_tokens=None, max_length=7, eos_token_id=2)
    assert given[:, : expected.shape[1]].tolist() == expected.tolist()


def check_script(row: Row, folder: Path) -> None:
    """A script of library calls alone, as transformers' run_clm.py: trains, saves and evaluates a folder's model."""
    saved(row, folder / "model")
    words = " ".join(f"w{1 + number * 7 % 15}" for number in range(400))
    (folder / "text.txt").write_text(f"{words}\n" * 2, encoding="utf-8")
    options = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "text.txt",
        "validation_file": folder / "text.txt",
        "block_size": 16,
        "output_dir": folder / "output",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with mock.patch.object(sys, "argv", [str(SCRIPT), *words, "--do_train", "--do_eval"]):
        metrics = runpy.run_path(str(SCRIPT))["main"]()
    assert metrics["eval_loss"] > 0
    loaded = row.auto_class.from_pretrained(folder / "output")
    start = row.auto_class.from_pretrained(folder / "model")
    assert type(loaded) is type(start)
    assert any(not torch.equal(one, other) for one, other in zip(loaded.parameters(), start.parameters(), strict=True))
