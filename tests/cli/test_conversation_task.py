"""Conversations from a file to a model that talks: train, resume, evaluate, talk."""

import io
import json
import math
import sys

import pytest

from hf_efficient.cli.__main__ import main
from hf_efficient.data import split_of_conversation

MODEL = (
    *("--model.hidden_size", "16", "--model.num_attention_heads", "2"),
    *("--model.num_encoder_layers", "1", "--model.num_decoder_layers", "1"),
)
RUN = (
    *(
        "--tokenizer_vocab_size",
        "280",
        "--per_device_train_batch_size",
        "8",
        "--logging_steps",
        "2",
        "--save_steps",
        "4",
    ),
    *("--learning_rate", "0.01", "--disable_tqdm", "true", "--use_cpu"),
)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A file of conversations with all three splits."""
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    conversations = [[f"I am number {n}.", "Hello, number!", "How are you?", "Fine."] for n in range(150)]
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in conversations), "utf-8")
    splits = [split_of_conversation(turns) for turns in conversations]
    assert set(splits) == {"train", "validation", "test"}
    return path, {name: splits.count(name) for name in splits}


@pytest.fixture(scope="module")
def run(tmp_path_factory, talks):
    """The folder of a run of eight updates."""
    folder = tmp_path_factory.mktemp("runs") / "talk"
    arguments = ["train", "--task", "conversation", "--conversations", str(talks[0]), "--output_dir", str(folder)]
    assert main([*arguments, "--max_steps", "8", *MODEL, *RUN]) == 0
    return folder


def test_report_counts_the_pairs_of_each_split(run, talks):
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert report["task"] == "conversation"
    assert report["architecture"] == "evolved_transformer"
    assert report["data"]["pairs"] == 3 * talks[1]["train"]
    assert report["validation"]["pairs"] == 3 * talks[1]["validation"]
    assert report["validation"]["perplexity"] == pytest.approx(math.exp(report["validation"]["loss"]))
    assert "bleu" not in report["validation"]


def test_evaluates_what_was_held_out(run, talks, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--conversations", str(talks[0]), "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["split"] == "test"
    assert figures["num_pairs"] == 3 * talks[1]["test"]
    assert main(["evaluate", str(run), "--conversations", str(talks[0]), "--split", "validation", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert figures["loss"] == pytest.approx(report["validation"]["loss"], abs=1e-5)


def test_talks(run, monkeypatch, capsys):
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("I am number 7.\nHow are you?\n/reset\nHello!\n"))
    assert main(["generate", str(run), "--interactive", "--num_samples", "3", "--max_new_tokens", "6"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 4
    assert answers[2] == "Forgotten."


def test_conversations_are_asked_for(tmp_path, capsys):
    capsys.readouterr()
    assert main(["train", "--task", "conversation", "--output_dir", str(tmp_path / "run")]) == 2
    assert "--conversations is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
