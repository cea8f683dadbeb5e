"""SegmentTrainer in one process: carried memory, accumulated updates, evaluation, and what it refuses."""

import math

import pytest
import torch
from torch.testing import assert_close
from training.small_run import RecordingTrainer, logged_losses, small_corpus, small_model, small_trainer
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

from hf_efficient.data import SegmentCollator, segment_lanes
from hf_efficient.training import LiveFiguresCallback, SegmentTrainer, SegmentTrainingArguments

# Float64, so that only the order of additions is between two results that must be equal.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batches(lanes):
    """The batches of one pass over `lanes`."""
    collate = SegmentCollator()
    steps = range(0, len(lanes), lanes.num_lanes)
    return [collate([lanes[step + lane] for lane in range(lanes.num_lanes)]) for step in steps]


def without(column):
    """A collator that loses a column."""
    return lambda items: {name: value for name, value in SegmentCollator()(items).items() if name != column}


def weights(model):
    """A copy of the parameters, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_equal(actual, expected):
    """Bitwise equality of two dictionaries of tensors."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# --- memory is carried -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"cutoffs": [12, 30], "div_val": 2}], ids=["plain", "adaptive"])
def test_evaluation_in_segments_equals_one_long_pass(tmp_path, config):
    corpus = small_corpus(lengths=(203,))
    model = small_model(mem_len=256, **config).double()
    trainer = small_trainer(tmp_path, model, num_lanes=1, segment_length=7, corpus=corpus)
    metrics = trainer.evaluate()
    in_segments = torch.cat(trainer.recorded_losses, dim=1)[:, :202]
    text = torch.tensor([corpus[0]["input_ids"]])
    with torch.no_grad():
        whole = model(text, labels=text)
    assert_close(in_segments, whole.losses, **EXACT)
    assert metrics["eval_loss"] == pytest.approx(whole.loss.item(), rel=1e-12)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(whole.loss), rel=1e-12)
    assert metrics["eval_bits_per_byte"] == pytest.approx(whole.loss.item() / math.log(2) / 2, rel=1e-12)


@pytest.mark.parametrize("config", [{}, {"cutoffs": [12, 30], "div_val": 2}], ids=["plain", "adaptive"])
def test_logits_are_there_for_whoever_asks_and_for_nobody_else(tmp_path, config):
    """All of them may take more memory than the model."""
    kept = []
    model = small_model(**config)
    model.register_forward_hook(lambda module, inputs, output: kept.append(output.logits.shape[1]))
    trainer = small_trainer(tmp_path, model)
    loss = trainer.evaluate()["eval_loss"]
    assert set(kept) == {1}
    del kept[:]
    prediction = trainer.predict(trainer.eval_dataset)
    assert set(kept) == {8}
    assert prediction.predictions.shape[1:] == (8, 48)
    assert prediction.metrics["test_loss"] == pytest.approx(loss, rel=1e-6)


def test_training_forwards_see_the_same_memory_as_one_long_pass(tmp_path):
    corpus = small_corpus(lengths=(203,))
    model = small_model(mem_len=256).double()
    settings = {"num_train_epochs": 1, "learning_rate": 0.0}
    trainer = small_trainer(tmp_path, model, num_lanes=1, segment_length=7, corpus=corpus, **settings)
    trainer.train()
    text = torch.tensor([corpus[0]["input_ids"]])
    with torch.no_grad():
        whole = model(text, labels=text)
    assert_close(torch.cat(trainer.recorded_losses, dim=1)[:, :202], whole.losses, **EXACT)


def test_rows_start_anew_at_documents(tmp_path):
    corpus = small_corpus()
    model = small_model(mem_len=256).double()
    metrics = small_trainer(tmp_path, model, num_lanes=1, boundaries="reset", corpus=corpus).evaluate()
    nats, num_tokens = 0.0, 0
    for document in corpus["input_ids"]:
        text = torch.tensor([document])
        with torch.no_grad():
            nats += model(text, labels=text).losses.sum().item()
        num_tokens += len(document) - 1
    assert metrics["eval_loss"] == pytest.approx(nats / num_tokens, rel=1e-12)


def test_each_epoch_begins_with_an_empty_memory(tmp_path):
    trainer = small_trainer(tmp_path, small_model().double(), num_train_epochs=2, learning_rate=0.0)
    trainer.train()
    half = len(trainer.recorded_losses) // 2
    assert_close(trainer.recorded_losses[:half], trainer.recorded_losses[half:], rtol=0, atol=0)


# --- accumulated updates ---------------------------------------------------------------------------------------------


def train_by_hand(model, lanes, accumulation, learning_rate):
    """Plain SGD over one pass, the loss of an update being the mean over all tokens that it predicts."""
    memory, losses = model.create_cache(), []
    pending = batches(lanes)
    while pending:
        update, pending = pending[:accumulation], pending[accumulation:]
        num_tokens = max(1, sum(batch["shift_labels"].ne(-100).sum().item() for batch in update))
        losses.append(0.0)
        for batch in update:
            reset = batch.pop("reset")
            if memory.get_seq_length() > 0:
                memory.reset_rows(reset)
            loss = model(**batch, past_key_values=memory).losses.sum() / num_tokens
            loss.backward()
            losses[-1] += loss.item()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(learning_rate * parameter.grad)
                parameter.grad = None
    return losses


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("boundaries", ["ignore", "reset"])
def test_training_equals_a_loop_by_hand(tmp_path, boundaries, accumulation):
    trainer = small_trainer(
        tmp_path,
        small_model().double(),
        boundaries=boundaries,
        num_train_epochs=1,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=0.5,
    )
    by_hand = small_model().double()
    losses = train_by_hand(by_hand, trainer.train_dataset, accumulation, learning_rate=0.5)
    trainer.train()
    # The logged loss passes through a float32 sum.
    assert_close(list(logged_losses(trainer).values()), losses, rtol=1e-6, atol=0)
    for name, value in weights(by_hand).items():
        assert_close(weights(trainer.model)[name], value, **EXACT)


def test_accumulation_equals_one_big_batch(tmp_path):
    """Documents of one segment each, so that their lanes do not matter: 12 rows at once, or fewer more often."""
    corpus = small_corpus(lengths=(8, 2, 5, 7, 3, 8, 6, 4, 8, 2, 7, 5) * 2)
    results = []
    for rows in (12, 6, 3, 2):
        trainer = small_trainer(
            tmp_path,
            small_model(),
            num_lanes=rows,
            corpus=corpus,
            gradient_accumulation_steps=24 // rows,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        assert trainer.state.global_step == 2
        results.append((list(logged_losses(trainer).values()), weights(trainer.model)))
    for losses, values in results[1:]:
        assert_close(losses, results[0][0], rtol=1e-6, atol=1e-6)
        assert_close(values, results[0][1], rtol=1e-6, atol=1e-6)


def test_activation_checkpointing_changes_nothing(tmp_path):
    # Named `gradient_checkpointing` before transformers 5.23.
    fields = SegmentTrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    results = []
    for checkpointing in (False, True):
        trainer = small_trainer(tmp_path, small_model(dropout=0.2), max_steps=6, **{name: checkpointing})
        trainer.train()
        assert trainer.model.model.layers[0].gradient_checkpointing == checkpointing
        results.append((logged_losses(trainer), weights(trainer.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_does_not_disturb_training(tmp_path):
    results = []
    for strategy in ("no", "steps"):
        trainer = small_trainer(
            tmp_path,
            small_model(dropout=0.3, attention_dropout=0.3),
            max_steps=8,
            eval_strategy=strategy,
            eval_steps=1,
        )
        trainer.train()
        results.append((logged_losses(trainer), weights(trainer.model), trainer.memory.state_dict()))
    (losses, values, memory), (other_losses, other_values, other_memory) = results
    assert losses == other_losses
    assert_equal(other_values, values)
    assert_equal(other_memory, memory)


def test_each_evaluation_begins_with_an_empty_memory(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=3)
    trainer.train()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == first["eval_loss"]


def test_training_goes_on_after_an_evaluation_that_failed(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=3)
    trainer.train()
    memory = trainer.memory
    trainer.data_collator = without("labels")
    with pytest.raises(ValueError, match="no column 'labels'"):
        trainer.evaluate()
    assert trainer.memory is memory


def test_prediction_carries_memory(tmp_path):
    corpus = small_corpus(lengths=(203,))
    model = small_model(mem_len=256)
    trainer = small_trainer(tmp_path, model, num_lanes=1, segment_length=7, corpus=corpus)
    output = trainer.predict(trainer.eval_dataset)
    with torch.no_grad():
        whole = model(torch.tensor([corpus[0]["input_ids"]])).logits[0]
    logits = torch.from_numpy(output.predictions).flatten(0, 1)[:203]
    assert_close(logits, whole, rtol=1e-5, atol=1e-5)
    assert output.label_ids.reshape(-1)[:203].tolist() == corpus[0]["input_ids"]
    assert output.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_several_evaluation_datasets(tmp_path):
    trainer = small_trainer(tmp_path)
    whole = trainer.eval_dataset
    trainer.eval_dataset = {"a": whole, "b": segment_lanes(small_corpus(lengths=(70, 80)), 4, 8)}
    metrics = trainer.evaluate()
    assert metrics["eval_a_loss"] == trainer.evaluate(whole)["eval_loss"]
    assert metrics["eval_b_perplexity"] == pytest.approx(math.exp(metrics["eval_b_loss"]))


def test_best_model_by_bits_per_byte(tmp_path):
    trainer = small_trainer(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="bits_per_byte",
    )
    trainer.train()
    figures = [entry["eval_bits_per_byte"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(figures)


# --- logs ------------------------------------------------------------------------------------------------------------


def test_logs_hold_the_figures_of_the_run(tmp_path):
    trainer = small_trainer(tmp_path, num_train_epochs=1, logging_steps=3)
    result = trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
    dataset = trainer.train_dataset
    per_byte = entry["loss"] / math.log(2) * dataset.num_tokens / dataset.num_bytes
    assert entry["bits_per_byte"] == pytest.approx(per_byte)
    assert entry["tokens_per_second"] > 0
    assert entry["memory_length"] == trainer.model.config.mem_len
    assert entry["peak_memory_mb"] > 0
    assert result.metrics["train_tokens"] == trainer.train_dataset.num_predictions
    assert result.metrics["train_tokens_per_second"] > 0


def test_progress_bar_is_trainers_with_figures(tmp_path, capfd):
    trainer = small_trainer(tmp_path, max_steps=2, disable_tqdm=False, eval_strategy="steps", eval_steps=2)
    assert [type(callback) for callback in trainer.callback_handler.callbacks].count(LiveFiguresCallback) == 1
    trainer.train()
    bar = capfd.readouterr()
    for figure in ("loss=", "ppl=", "bpb=", "tok/s=", "memory=", "peak MB="):
        assert figure in bar.err
    assert "eval_loss" in bar.out + bar.err


# --- what is refused -------------------------------------------------------------------------------------------------


def test_model_without_memory_is_refused(tmp_path):
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=48, **tiny))
    with pytest.raises(TypeError, match=r"BertForMaskedLM has no create_cache.*transformers\.Trainer"):
        small_trainer(tmp_path, model)


def test_plain_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="SegmentTrainingArguments"):
        SegmentTrainer(small_model(), TrainingArguments(str(tmp_path), use_cpu=True))


def test_lanes_must_be_the_rows_of_a_batch(tmp_path):
    trainer = small_trainer(tmp_path, per_device_train_batch_size=3, max_steps=1)
    with pytest.raises(ValueError, match=r"train_dataset has num_lanes=4.*per_device_train_batch_size=3.*num_lanes=3"):
        trainer.train()
    with pytest.raises(ValueError, match=r"eval_dataset has num_lanes=4.*per_device_eval_batch_size=8"):
        small_trainer(tmp_path, per_device_eval_batch_size=8)


def test_dataset_without_lanes_is_refused(tmp_path):
    args = SegmentTrainingArguments(str(tmp_path), use_cpu=True, max_steps=1)
    trainer = SegmentTrainer(small_model(), args, train_dataset=small_corpus())
    with pytest.raises(TypeError, match="train_dataset must be a dataset of lanes, got Dataset: .*segment_lanes"):
        trainer.train()


@pytest.mark.parametrize("column", ["reset", "labels", "shift_labels"])
def test_batch_without_a_column_is_refused(tmp_path, column):
    trainer = small_trainer(tmp_path, max_steps=1)
    trainer.data_collator = without(column)
    with pytest.raises(ValueError, match=f"no column '{column}': use a dataset of .*segment_lanes"):
        trainer.train()
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        trainer.evaluate()


def test_default_arguments_and_collator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = RecordingTrainer(small_model())
    assert isinstance(trainer.args, SegmentTrainingArguments)
    assert isinstance(trainer.data_collator, SegmentCollator)
