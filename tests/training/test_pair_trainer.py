"""PairTrainer: exact figures, batches by length, exact resuming, answers by generation, several processes."""

import json
import math
import os
import subprocess
import sys

import pytest
import sacrebleu
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from training import small_pairs
from training.small_pairs import (
    MODELS,
    evolved_transformer,
    exact_loss,
    losses,
    pair_trainer,
    prepare,
    universal_transformer,
)
from training.small_pairs import (
    small_pairs as pairs_of_words,
)
from transformers import MarianConfig, MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_efficient.data import PairCollator
from hf_efficient.training import BleuMetric, PairTrainer, PairTrainingArguments
from hf_efficient.training.pair_trainer import LengthGroupedOrder


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def marian(**settings) -> MarianMTModel:
    """A model of transformers that gives no losses of single tokens."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    return MarianMTModel(MarianConfig(vocab_size=280, dropout=0.0, **sizes | ids | settings))


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_model", [*MODELS.values(), marian])
def test_evaluation_is_the_exact_mean_over_target_tokens(tmp_path, make_model):
    model = make_model()
    trainer = pair_trainer(tmp_path, model)
    metrics = trainer.evaluate()
    expected = exact_loss(model, *prepare())
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_evaluation_is_without_label_smoothing_and_ponder_cost(tmp_path):
    model = universal_transformer(label_smoothing=0.3, ponder_cost=0.5)
    assert pair_trainer(tmp_path, model).evaluate()["eval_loss"] == pytest.approx(
        exact_loss(model, *prepare()), rel=1e-5
    )


def test_training_counts_target_tokens(tmp_path):
    trainer = pair_trainer(tmp_path, evolved_transformer(), num_train_epochs=2, gradient_accumulation_steps=2)
    figures = trainer.train().metrics
    assert figures["train_tokens"] == 2 * sum(map(len, prepare()[1]["labels"]))
    assert figures["train_tokens_per_second"] > 0
    assert figures["peak_memory_mb"] > 0
    assert all(entry["perplexity"] > 1 for entry in trainer.state.log_history if "loss" in entry)


def test_bleu_is_that_of_the_generated_texts(tmp_path):
    """Trained until translations are in part right, then translated one by one."""
    model = evolved_transformer(hidden_size=32)
    trainer = pair_trainer(tmp_path, model, max_steps=60, predict_with_generate=True)
    trainer.train()
    metrics = trainer.evaluate()
    tokenizer, _ = prepare()
    pairs = pairs_of_words()
    translations = []
    for source in pairs["source"]:
        ids = tokenizer(source, return_tensors="pt")
        answer = model.generate(**ids, do_sample=False)
        translations.append(tokenizer.decode(answer[0], skip_special_tokens=True))
    expected = sacrebleu.corpus_bleu(translations, [pairs["target"][:]]).score
    assert metrics["eval_bleu"] == pytest.approx(expected)
    assert expected > 5
    assert metrics["eval_loss"] == pytest.approx(exact_loss(model, *prepare()), rel=1e-5)
    assert trainer.evaluate(num_beams=2)["eval_loss"] == metrics["eval_loss"]


def test_generation_ends_at_the_longest_training_target(tmp_path):
    longest = max(map(len, prepare()[1]["labels"])) + 1
    trainer = pair_trainer(tmp_path, evolved_transformer(), predict_with_generate=True)
    assert trainer.model.generation_config.max_length == longest
    trainer.save_model(tmp_path / "saved")
    saved = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert saved.generation_config.max_length == longest
    shorter = pair_trainer(tmp_path, evolved_transformer(), predict_with_generate=True, generation_max_length=5)
    predictions = shorter.predict(shorter.eval_dataset).predictions
    assert predictions.shape[1] == 5


# --- order and resuming ----------------------------------------------------------------------------------------------


def test_batches_hold_similar_lengths_and_every_row_once():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (1000,), generator=generator).tolist()
    order = LengthGroupedOrder(lengths, batch_size=10, seed=3)
    first = list(order)
    assert sorted(first) == list(range(1000))
    batches = [[lengths[row] for row in first[start : start + 10]] for start in range(0, 1000, 10)]
    spreads = [max(batch) - min(batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 15
    torch.rand(7)  # the global generator plays no part
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    assert list(LengthGroupedOrder(lengths, 10, seed=4)) != first


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of two passes and a bit, with dropout, that saved at every step."""
    folder = tmp_path_factory.mktemp("whole")
    model = universal_transformer(dropout=0.2)
    trainer = pair_trainer(folder, model, max_steps=14, save_strategy="steps", save_steps=1)
    return trainer, trainer.train().metrics, folder


@pytest.mark.parametrize("step", [2, 6, 9])
def test_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, step):
    whole, figures, folder = uninterrupted
    settings = {"max_steps": 14, "eval_strategy": "steps", "eval_steps": 4}
    trainer = pair_trainer(tmp_path, universal_transformer(dropout=0.2), **settings)
    resumed = trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}")).metrics
    assert losses(trainer) == losses(whole)
    assert len(losses(whole)) == 14
    assert_equal(weights(trainer), weights(whole))
    assert resumed["train_tokens"] == figures["train_tokens"]


def test_a_folder_with_a_run_is_not_written_over(uninterrupted):
    _, _, folder = uninterrupted
    trainer = pair_trainer(folder, universal_transformer(), save_strategy="steps")
    with pytest.raises(ValueError, match="already holds a run"):
        trainer.train()


def test_meena_s_course_of_the_learning_rate(tmp_path):
    settings = {"optim": "adafactor", "learning_rate": 0.01, "constant_steps": 3, "max_steps": 8}
    trainer = pair_trainer(tmp_path, evolved_transformer(), **settings)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.01 * min(1, (3 / max(step, 1)) ** 0.5) for step in range(8)])


# --- several processes -----------------------------------------------------------------------------------------------


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "evolved_transformer"]


@pytest.mark.parametrize("name", ["evolved_transformer", *SLOW])
def test_two_processes_equal_one(tmp_path, name):
    """Losses, weights, BLEU and the exact loss, though the pairs do not divide by two."""
    settings = {"max_steps": 5, "predict_with_generate": True}  # the next batch of training would be filled up
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [small_pairs.__file__, str(tmp_path), "--model", name, "--settings", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    alone = pair_trainer(tmp_path / "alone", MODELS[name](), **settings)
    figures = alone.train().metrics
    evaluation = alone.evaluate()
    for rank in range(2):
        measured = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert {int(step): loss for step, loss in measured["losses"].items()} == pytest.approx(losses(alone), rel=1e-4)
        assert measured["train_tokens"] == figures["train_tokens"]
        for figure in ("eval_loss", "eval_perplexity", "eval_bleu", "eval_length_ratio"):
            assert measured["evaluation"][figure] == pytest.approx(evaluation[figure], rel=1e-3), figure
    if name == "reformer":
        return  # rows of its position tables hardly get a gradient, whose rounding Adam makes large
    for weight, value in load_file(tmp_path / "weights.safetensors").items():
        assert_close(value, weights(alone)[weight], rtol=1e-3, atol=1e-4)


# --- what is refused, and plain transformers -------------------------------------------------------------------------


def test_label_smoothing_belongs_into_the_model(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 .* set label_smoothing=0.1 in the model's"):
        pair_trainer(tmp_path, universal_transformer(), label_smoothing_factor=0.1)


def test_models_without_label_smoothing_take_the_trainer_s(tmp_path):
    model = marian()
    trainer = pair_trainer(tmp_path, model, max_steps=2, label_smoothing_factor=0.1)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(exact_loss(model, *prepare()), rel=1e-5)


def test_wrong_arguments(tmp_path):
    tokenizer, tokens = prepare()
    with pytest.raises(TypeError, match="args must be PairTrainingArguments, got Seq2SeqTrainingArguments"):
        PairTrainer(marian(), Seq2SeqTrainingArguments(str(tmp_path)), processing_class=tokenizer)
    with pytest.raises(TypeError, match="processing_class=None"):
        PairTrainer(marian(), PairTrainingArguments(str(tmp_path), use_cpu=True), train_dataset=tokens)
    with pytest.raises(ValueError, match="constant_steps=-1"):
        PairTrainingArguments(str(tmp_path), constant_steps=-1, use_cpu=True)
    with pytest.raises(ValueError, match="label_names"):
        PairTrainingArguments(str(tmp_path), label_names=["answers"], use_cpu=True)


def test_less_perplexity_and_more_bleu_are_better(tmp_path):
    for metric, greater in (("eval_perplexity", False), ("eval_loss", False), ("eval_bleu", True)):
        args = PairTrainingArguments(str(tmp_path), metric_for_best_model=metric, use_cpu=True)
        assert args.greater_is_better is greater


@pytest.mark.parametrize("name", MODELS)
def test_transformers_own_trainer_trains_and_decodes(tmp_path, name):
    tokenizer, tokens = prepare()
    model = MODELS[name]()
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=3,
            predict_with_generate=True,
            generation_max_length=12,
            generation_num_beams=2,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        data_collator=PairCollator(tokenizer),
        train_dataset=tokens,
        eval_dataset=tokens,
        processing_class=tokenizer,
        compute_metrics=BleuMetric(tokenizer),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_bleu"] <= 100
    assert math.isfinite(metrics["eval_loss"])
