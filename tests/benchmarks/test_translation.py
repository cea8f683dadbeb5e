"""The table of translation: equal data and losses for all models, results in their order, peak memory of its own."""

import gzip
import math

import pytest
import torch
from reproductions import rows, training, translation
from torch.nn.functional import log_softmax

from hf_efficient.data import generate_phrases
from hf_efficient.training import Bleu

TINY_SIZES = {
    "marian": {
        "d_model": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "universal_transformer": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "max_steps": 3},
    "reformer": {"hidden_size": 16, "feed_forward_size": 16, "num_attention_heads": 2, "attention_head_size": 8},
    "evolved_transformer": {"hidden_size": 16, "num_attention_heads": 2},
}
SETTINGS = rows.read_settings("translation")
NAMES = list(SETTINGS)


def tiny(name):
    """The row's settings with a small model and a short training."""
    settings = SETTINGS[name]
    sizes = TINY_SIZES[settings["model"]["family"]]
    training_part = {"steps": 3, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 1, "clip": 1.0}
    return settings | {"vocab_size": 300, "model": settings["model"] | sizes, "training": training_part}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in which generated pairs stand for Multi30k."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "multi30k").mkdir()
    pairs = generate_phrases(100)
    for split, places in {"train": range(60), "val": range(60, 80), "test_2016_flickr": range(80, 100)}.items():
        for language, side in (("en", "source"), ("de", "target")):
            with gzip.open(folder / "multi30k" / f"{split}.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(f"{text}\n" for text in pairs.select(places)[side])
    return folder


def make(name, data):
    torch.manual_seed(0)
    return translation.make_experiment(tiny(name), 0, torch.device("cpu"), data)


@pytest.mark.parametrize("name", NAMES)
def test_row_trains_and_is_tested(name, data, monkeypatch):
    experiment = make(name, data)
    monkeypatch.setattr(experiment, "_peak_memory", lambda: 12.0)
    monkeypatch.setattr(translation, "LONGEST_OUTPUT", 6)
    outcome = training.Run(experiment).train()
    experiment.model.eval()
    with torch.no_grad():
        results = experiment.results()
    assert outcome["steps"] == 3
    assert 0 < results["validation_loss"] < 2 * math.log(300)
    assert set(results["bleu"]) == {"1", "4"}
    assert results["peak_memory_mb"] == 12.0
    assert "tok:13a" in results["signature"]
    for stack in ("", "encoder_"):
        steps = results[f"{stack}ponder_time"]
        assert (steps is not None) == ("ACT" in name)
        assert steps is None or 1 <= steps <= 3


@pytest.mark.parametrize("name", NAMES)
def test_a_label_is_predicted_from_those_before_it(name, data):
    experiment = make(name, data)
    experiment.model.eval()
    batch = experiment.batch(0)
    with torch.no_grad():
        before = translation.predict(experiment.model, batch).logits
        labels = batch["labels"].clone()
        labels[:, 3] = (labels[:, 3] + 5) % 300
        after = translation.predict(experiment.model, batch | {"labels": labels}).logits
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4], before[:, 4])


def test_loss_is_smoothed_and_counts_what_is_pondered(data):
    experiment = make("Universal Transformer with ACT, up to 6 steps", data)
    experiment.model.eval()
    batch = experiment.batch(0)
    with torch.no_grad():
        loss, figures = experiment.loss(batch)
        outputs = translation.predict(experiment.model, batch)
    scores = log_softmax(outputs.logits, dim=-1)
    tokens = [
        0.9 * scores[row, place, label] + 0.1 * scores[row, place].mean()
        for row, labels in enumerate(batch["labels"].tolist())
        for place, label in enumerate(labels)
        if label != -100
    ]
    expected = -torch.stack(tokens).mean()
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected.item() + 0.01 * outputs.ponder_loss.item(), rel=1e-5)


def test_validation_loss_is_the_mean_over_tokens_without_smoothing(data):
    experiment = make("Transformer, 2 + 2 layers", data)
    experiment.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for pair in experiment.validation_set:
            ids, labels = (torch.tensor([pair[name]]) for name in ("input_ids", "labels"))
            total += experiment.model(input_ids=ids, labels=labels).loss.item() * labels.shape[1]
            count += labels.shape[1]
        assert experiment._validate()["validation_loss"] == pytest.approx(total / count, abs=2e-4)


def test_translations_come_in_the_order_of_the_test_set(data, monkeypatch):
    experiment = make("Transformer, 2 + 2 layers", data)
    monkeypatch.setattr(translation, "EVALUATION_BATCH", 6)
    monkeypatch.setattr(experiment.model, "generate", lambda input_ids, **_: input_ids)
    sources = generate_phrases(100)["source"][80:100]
    assert experiment.translate(1) == sources


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_that_of_training_on_the_longest_batch(name, data, monkeypatch):
    experiment, seen = make(name, data), {}

    def peak_memory(side, threads):
        # In this process what the other would do.
        step = getattr(translation, side.name)(**side.options)
        seen["before"] = [parameter.clone() for parameter in step.model.parameters()]
        step.run()  # of which warming up makes nothing
        step.run()
        seen["after"], seen["batch"] = list(step.model.parameters()), step.batch(0)
        return {"mb": 3.14159}

    monkeypatch.setattr(translation, "peak_memory", peak_memory)
    assert experiment._peak_memory() == 3.1
    longest = max(len(pair["input_ids"]) + len(pair["labels"]) for pair in experiment.train_set)
    batch = seen["batch"]
    assert longest in ((batch["input_ids"] != 0).sum(1) + (batch["labels"] != -100).sum(1)).tolist()
    assert len(batch["labels"]) <= 8
    torch.testing.assert_close(seen["before"], list(experiment.model.parameters()))
    assert not all(map(torch.equal, seen["before"], seen["after"]))


@pytest.mark.slow
def test_peak_of_memory_is_measured_in_another_process(data):
    assert 0 < make("Evolved Transformer, 1 + 1 blocks", data)._peak_memory() < 200


def test_models_are_of_one_size(data):
    tokenizer = make(NAMES[0], data).tokenizer
    counts = []
    for settings in SETTINGS.values():
        model = translation.make_model(settings["model"], tokenizer)
        embedding = model.get_input_embeddings()
        missing = (settings["vocab_size"] - len(tokenizer)) * embedding.embedding_dim
        counts.append(translation.trained_parameters(model) + missing)
    assert max(counts) / min(counts) < 1.02
    for shared in ("training", "label_smoothing", "vocab_size"):
        assert len({str(settings[shared]) for settings in SETTINGS.values()}) == 1


def test_data_is_expected_in_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data FOLDER"):
        translation.load_pairs(None, "train")
    with pytest.raises(FileNotFoundError, match=r"train\.en\.gz"):
        translation.load_pairs(tmp_path, "train")


def test_table_has_means_and_ranges():
    def made_up(name, seed, bleu, ponder_time, memory):
        results = {
            "parameters": 1_234_567,
            "bleu": {"1": bleu, "4": bleu + 1},
            "validation_loss": 2.0 + seed,
            "peak_memory_mb": memory,
            "ponder_time": ponder_time,
            "encoder_ponder_time": ponder_time,
        }
        training_part = {"steps": 1000, "seconds": 10.0 * (seed + 1)}
        return {"row": name, "seed": seed, "training": training_part, "results": results}

    lines = translation.table(
        [made_up("A", 0, 20.0, None, 90.4), made_up("B", 0, 10.0, 2.5, None), made_up("B", 1, 12.0, 3.5, None)]
    ).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == ["A", "1,234,567", "20.00", "21.00", "2.000", "1,000", "10", "90", "", "", "1"]
    assert cells[3] == [
        *("B", "1,234,567", "11.00 (10.00–12.00)", "12.00 (11.00–13.00)", "2.500 (2.000–3.000)"),
        *("1,000", "15", "", "3.00", "3.00", "2"),
    ]


def test_score_is_that_of_the_package(data, monkeypatch):
    experiment = make("Transformer, 2 + 2 layers", data)
    monkeypatch.setattr(experiment, "_peak_memory", lambda: None)
    monkeypatch.setattr(experiment, "translate", lambda num_beams: experiment.references)
    monkeypatch.setattr(
        translation, "bleu", lambda texts, references: Bleu(100.0 * (texts == references), 1.0, "made up")
    )
    assert experiment.results()["bleu"] == {"1": 100.0, "4": 100.0}
