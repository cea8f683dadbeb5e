"""Cards of models that transformers' own Trainer made: its figures, and programs that run as they stand."""

import io
import json
import math
import re
from contextlib import redirect_stdout
from importlib import import_module

import pytest
import torch
from hub.published_models import ALONE, DECODER, ENCODER, PAIR, REFORMER
from huggingface_hub import ModelCard
from models.model_tools import random_ids, word_tokenizer
from transformers import Trainer, TrainingArguments

import hf_efficient
from hf_efficient.hub import publish, write_trainer_card

STATE = {
    "epoch": 2.0,
    "global_step": 40,
    "train_batch_size": 8,
    "best_global_step": 20,
    "best_metric": 1.25,
    "log_history": [
        {"loss": 3.5, "step": 10, "epoch": 0.5},
        {"eval_loss": 1.5, "eval_accuracy": 0.625, "eval_runtime": 2.0, "step": 20, "epoch": 1.0},
        {"loss": 2.25, "step": 40, "epoch": 2.0},
        {"eval_loss": 1.0, "eval_accuracy": 0.75, "eval_runtime": 2.0, "step": 40, "epoch": 2.0},
        {"train_runtime": 61.2, "train_loss": 2.875, "step": 40, "epoch": 2.0},
    ],
}
CLASSES = [
    ("transformer_xl", "TransformerXLForCausalLM", {}),
    ("transformer_xl", "TransformerXLForTokenClassification", {}),
    ("reformer", "ReformerForCausalLM", DECODER),
    ("reformer", "ReformerForQuestionAnswering", REFORMER | ENCODER),
    ("reformer", "ReformerModel", ENCODER),
    ("universal_transformer", "UniversalTransformerForMaskedLM", ENCODER | ALONE),
    ("evolved_transformer", "EvolvedTransformerForSequenceClassification", ENCODER | ALONE),
    ("evolved_transformer", "EvolvedTransformerForConditionalGeneration", PAIR),
]


def save(folder, architecture, class_name, settings):
    """A small model and a tokenizer that knows words for what the card's program asks."""
    small_models = import_module(f"models.{architecture}.small_models")
    model = small_models.small_model(getattr(hf_efficient, class_name), **settings).float()
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.unk_token, tokenizer.mask_token = "w1", "w2"
    tokenizer.backend_tokenizer.model.unk_token = "w1"
    tokenizer.save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps(STATE), encoding="utf-8")
    return model


@pytest.mark.parametrize(("architecture", "class_name", "settings"), CLASSES, ids=[name for _, name, _ in CLASSES])
def test_program_of_the_card_runs(architecture, class_name, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "mine", architecture, class_name, settings)
    tag = "translation" if "Conditional" in class_name else None
    card = ModelCard.load(write_trainer_card(tmp_path / "mine", "my texts", license="mit", pipeline_tag=tag))
    program = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    scope = {}
    with redirect_stdout(io.StringIO()) as said:
        exec(program, scope)
    assert said.getvalue().strip()
    assert type(scope["model"]).__name__ == class_name
    assert publish(tmp_path / "mine", "someone/mine", dry_run=True, with_code=True).hints


def test_figures_are_those_of_the_trainer(tmp_path):
    model = save(tmp_path / "mine", *CLASSES[0])
    path = write_trainer_card(
        tmp_path / "mine", "someone/poems", evaluated_on="held-out poems", base_model="someone/base", language="en"
    )
    card = ModelCard.load(path)
    assert (card.data.datasets, card.data.base_model) == (["someone/poems"], "someone/base")
    results = {result.metric_type: (result.metric_value, result.dataset_name) for result in card.data.eval_results}
    assert results == {"accuracy": (0.75, "held-out poems"), "perplexity": (2.7183, "held-out poems")}
    for words in (
        f"with {sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        "fine-tuned from `someone/base` on someone/poems",
        "after 40 updates",
        "| Loss | 1.0000 |",
        "The best evaluation was after 20 updates: 1.2500.",
        "| Training loss | 3.5000 at first, 2.2500 at last |",
        "| Time | 61 s |",
    ):
        assert words in card.text


def test_after_a_training(tmp_path):
    """Its checkpoint has the state; the Trainer's own folder has it after save_state()."""
    folder = tmp_path / "mine"
    small_models = import_module("models.universal_transformer.small_models")
    model = small_models.small_model(hf_efficient.UniversalTransformerForCausalLM, halting="act").float()
    ids = random_ids(4, 10)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=2, save_steps=2, logging_steps=1, disable_tqdm=True, report_to=[]
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    card = ModelCard.load(write_trainer_card(folder, "words"))  # the state of the checkpoint
    assert "did not evaluate" in card.text
    trainer.save_state()
    card = ModelCard.load(write_trainer_card(folder, "words", evaluated_on="the same words"))
    assert f"| Loss | {loss:.4f} |" in card.text
    assert "Perplexity" not in card.text  # the loss has the cost of pondering in it
    assert card.data.eval_results is None
    assert ModelCard.load(write_trainer_card(folder / "checkpoint-2", "words")).data.model_name == "checkpoint-2"
    with torch.no_grad():
        assert math.isclose(model.eval()(**{"input_ids": ids, "labels": ids}).loss.item(), loss, rel_tol=1e-5)


def test_what_is_missing_is_named(tmp_path):
    folder = tmp_path / "mine"
    save(folder, *CLASSES[-1])
    with pytest.raises(ValueError, match='pipeline_tag is needed .*"translation"'):
        write_trainer_card(folder, "pairs")
    (folder / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer_state\.json is no state"):
        write_trainer_card(folder, "pairs", pipeline_tag="translation")
    (folder / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainer\.save_state\(\)"):
        write_trainer_card(folder, "pairs", pipeline_tag="translation")
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="model_type='bert'"):
        write_trainer_card(folder, "pairs")
