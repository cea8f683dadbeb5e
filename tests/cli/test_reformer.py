"""A model without segment memory on the command line: trained, resumed, measured, and made to write."""

import json

import pytest
import torch
from cli.conftest import TINY_RUN
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_efficient.cli.__main__ import main
from hf_efficient.data import load_documents, segment_lanes, tokenize_documents

SEGMENT_LENGTH = 48
REFORMER_RUN = (
    *("--architecture", "reformer", "--model.hidden_size", "16", "--model.num_attention_heads", "2"),
    *("--model.attention_head_size", "8", "--model.feed_forward_size", "32", "--model.num_buckets", "4"),
    *("--model.attn_layers", "[local, windowed_lsh]", "--model.lsh_attn_chunk_length", "4"),
    *("--model.local_attn_chunk_length", "8", "--model.axial_pos_shape", "[8, 16]"),
    *("--model.axial_pos_embds_dim", "[8, 8]", "--model.hidden_dropout_prob", "0.1"),
    *TINY_RUN[TINY_RUN.index("--segment_length") :],
    *("--segment_length", str(SEGMENT_LENGTH)),
)


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def losses(folder):
    return [entry["loss"] for entry in report_of(folder)["history"] if "loss" in entry]


@pytest.fixture(scope="module")
def train_reformer(text_file):
    """Trains a tiny Reformer: `train_reformer(folder, *flags)`."""

    def train(folder, *flags):
        text = ["--text", str(text_file), "--validation_text", str(text_file)]
        assert main(["train", *text, "--output_dir", str(folder), *REFORMER_RUN, *flags]) == 0
        return folder

    return train


@pytest.fixture(scope="module")
def reformer_run(train_reformer, tmp_path_factory):
    """The folder of a run of four updates."""
    return train_reformer(tmp_path_factory.mktemp("runs") / "reformer", "--max_steps", "4")


def test_run_folder_is_complete(reformer_run, text_file):
    report, size = report_of(reformer_run), text_file.stat().st_size
    assert (report["architecture"], report["steps"], report["train_tokens"]) == ("reformer", 4, 4 * 2 * SEGMENT_LENGTH)
    assert report["peak_memory_mb"] > 0
    assert report["tokens_per_second"] > 0
    assert len(losses(reformer_run)) == 2
    assert report["validation"]["segment_length"] == SEGMENT_LENGTH
    assert report["validation"]["bytes"] == size
    assert "mem_len" not in report["validation"]
    card = (reformer_run / "README.md").read_text("utf-8")
    assert "Kitaev et al. 2020" in card
    assert "tokens at a time." in card
    for name in ("recipe.yaml", "loss.png", "model.safetensors", "tokenizer.json"):
        assert (reformer_run / name).is_file(), name


def test_validation_is_the_mean_over_segments_read_alone(reformer_run, text_file):
    model = AutoModelForCausalLM.from_pretrained(reformer_run).eval()
    assert type(model).__name__ == "ReformerForCausalLM"
    tokens = tokenize_documents(load_documents(text_file), AutoTokenizer.from_pretrained(reformer_run))
    lanes, nats = segment_lanes(tokens, 2, SEGMENT_LENGTH), 0.0
    for item in lanes:
        scored = item["shift_labels"] != -100
        with torch.no_grad():
            logits = model(item["input_ids"][None], attention_mask=item["attention_mask"][None]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits[scored], item["shift_labels"][scored], reduction="sum")
    assert report_of(reformer_run)["validation"]["loss"] == pytest.approx(
        nats.item() / lanes.num_predictions, rel=1e-5
    )


def test_evaluate_agrees_with_the_trainer_and_takes_other_rounds(reformer_run, text_file, capsys):
    def figures(*flags):
        capsys.readouterr()
        length = ["--segment_length", str(SEGMENT_LENGTH), "--batch_size", "2"]
        assert main(["evaluate", str(reformer_run), "--text", str(text_file), *length, *flags, "--json", "-"]) == 0
        return json.loads(capsys.readouterr().out)

    as_trained, more_rounds = figures(), figures("--num_hashes", "8")
    validation = report_of(reformer_run)["validation"]
    assert as_trained["loss"] == pytest.approx(validation["loss"], rel=1e-6)
    assert as_trained["bits_per_byte"] == pytest.approx(validation["bits_per_byte"], rel=1e-6)
    assert (as_trained["memory"], as_trained["num_hashes"], more_rounds["num_hashes"]) == (False, 2, 8)
    assert more_rounds["loss"] != as_trained["loss"]


def test_evaluate_reads_as_much_at_a_time_as_there_are_positions(reformer_run, text_file, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(reformer_run), "--text", str(text_file), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["segment_length"] == 8 * 16
    assert main(["evaluate", str(reformer_run), "--text", str(text_file)]) == 0
    assert "memory" not in capsys.readouterr().out  # it has none that could be carried along
    assert main(["evaluate", str(reformer_run), "--text", str(text_file), "--segment_length", "129"]) == 2
    assert "--segment_length 129 is more than the 128 positions" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate", "--text", "TEXT"], ["generate", "The quick"]])
def test_memory_settings_mean_nothing(reformer_run, text_file, capsys, command):
    name, *rest = [str(text_file) if word == "TEXT" else word for word in command]
    assert main([name, str(reformer_run), *rest, "--mem_len", "4"]) == 2
    assert "--mem_len means nothing to a reformer model" in capsys.readouterr().err


def test_generate_goes_on_from_the_prompt_and_repeats_with_the_seed(reformer_run, capsys):
    def write(*flags):
        capsys.readouterr()
        assert main(["generate", str(reformer_run), "The quick brown", "--max_new_tokens", "12", *flags]) == 0
        return capsys.readouterr().out

    assert write("--seed", "1").startswith("The quick brown")
    assert write("--seed", "1") == write("--seed", "1") != write("--seed", "2")


def test_generate_beyond_the_positions_says_so(reformer_run, capsys):
    assert main(["generate", str(reformer_run), "The", "--max_new_tokens", "200", "--greedy"]) == 2
    message = capsys.readouterr().err
    assert "128" in message
    assert message.count("\n") == 1


def test_resumed_run_equals_an_uninterrupted_one(train_reformer, tmp_path):
    schedule = ("--lr_scheduler_type", "constant", "--warmup_steps", "0")
    parts = train_reformer(tmp_path / "parts", "--max_steps", "2", *schedule)
    train_reformer(parts, "--max_steps", "4", *schedule, "--resume")
    whole = train_reformer(tmp_path / "whole", "--max_steps", "4", *schedule)
    assert losses(parts) == losses(whole)
    assert report_of(parts)["validation"] == report_of(whole)["validation"]


def test_starter_settings_train(text_file, tmp_path):
    """With nothing given but the text, its length and how long."""
    flags = ["--segment_length", "256", "--per_device_train_batch_size", "1", "--max_steps", "1", "--use_cpu"]
    folder = tmp_path / "run"
    arguments = ["train", "--architecture", "reformer", "--text", str(text_file), "--output_dir", str(folder)]
    assert main([*arguments, *flags, "--logging_steps", "1", "--disable_tqdm", "true"]) == 0
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.is_decoder is True
    assert "lsh" not in config.attn_layers
