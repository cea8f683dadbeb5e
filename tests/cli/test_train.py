"""From text to a finished run folder, and back from it: train, resume, evaluate, generate."""

import json

import pytest
import torch
import yaml
from cli.conftest import TINY_RUN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_efficient.cli.__main__ import main
from hf_efficient.training import bits_per_byte


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def without_times(record):
    """`record` of a report without what depends on the clock."""
    if isinstance(record, list):
        return [without_times(entry) for entry in record]
    if isinstance(record, dict):
        return {name: value for name, value in record.items() if "second" not in name and "runtime" not in name}
    return record


def losses(report):
    return [entry["loss"] for entry in report["history"] if "loss" in entry]


def test_run_folder_is_complete(finished_run, text_file):
    report = report_of(finished_run)
    size = text_file.stat().st_size
    assert report["architecture"] == "transformer_xl"
    assert report["steps"] == 4
    assert report["train_tokens"] == 4 * 2 * 16
    assert report["data"] == {"text": [str(text_file)], "tokens": size + 1, "bytes": size}
    assert report["tokens_per_second"] > 0
    assert report["peak_memory_mb"] > 0
    assert len(losses(report)) == 2
    validation = report["validation"]
    assert (validation["mem_len"], validation["segment_length"]) == (8, 16)
    assert validation["bits_per_byte"] == pytest.approx(bits_per_byte(validation["loss"], size + 1, size))
    for name in ("hardware", "versions", "date", "command", "settings", "parameters"):
        assert report[name]
    for name in ("README.md", "recipe.yaml", "loss.png", "model.safetensors", "tokenizer.json", "config.json"):
        assert (finished_run / name).is_file(), name


def test_saved_model_and_tokenizer_load_through_the_auto_classes(finished_run):
    model = AutoModelForCausalLM.from_pretrained(finished_run)
    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    assert type(model).__name__ == "TransformerXLForCausalLM"
    assert model.config.mem_len == 8
    assert model.config.use_cache is True
    assert model.config.eos_token_id == tokenizer.eos_token_id
    text = "The quick brown fox"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_recipe_of_a_run_repeats_it(finished_run, tmp_path):
    again = tmp_path / "again"
    assert main(["train", str(finished_run / "recipe.yaml"), "--output_dir", str(again)]) == 0
    assert losses(report_of(again)) == losses(report_of(finished_run))
    assert yaml.safe_load((again / "recipe.yaml").read_text()) == report_of(finished_run)["settings"]


def test_resumed_run_equals_an_uninterrupted_one(finished_run, text_file, tmp_path):
    folder = tmp_path / "interrupted"
    arguments = ["train", "--text", str(text_file), "--output_dir", str(folder), "--lr_scheduler_type", "constant"]
    arguments += ["--validation_text", str(text_file), "--warmup_steps", "0", *TINY_RUN]
    assert main([*arguments, "--max_steps", "2", "--resume"]) == 0  # nothing to resume yet
    assert main([*arguments, "--max_steps", "4", "--resume"]) == 0
    resumed = report_of(folder)
    whole = tmp_path / "whole"
    arguments[arguments.index(str(folder))] = str(whole)
    assert main([*arguments, "--max_steps", "4"]) == 0
    assert losses(resumed) == losses(report_of(whole))
    assert resumed["validation"] == report_of(whole)["validation"]
    assert resumed["train_tokens"] == report_of(whole)["train_tokens"]


def test_resuming_a_finished_run_changes_nothing(run_copy, capsys):
    before = (run_copy / "report.json").read_bytes()
    arguments = ["train", str(run_copy / "recipe.yaml"), "--output_dir", str(run_copy), "--resume"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"The run in {run_copy} is finished, and is left as it is" in said
    assert "Trained" in said
    assert (run_copy / "report.json").read_bytes() == before


def test_run_that_was_killed_before_its_report_gets_it(run_copy):
    before = report_of(run_copy)
    weights = load_file(run_copy / "model.safetensors")
    for name in ("report.json", "README.md", "model.safetensors"):
        (run_copy / name).unlink()
    assert main(["train", str(run_copy / "recipe.yaml"), "--output_dir", str(run_copy), "--resume"]) == 0
    after = report_of(run_copy)
    for name in ("steps", "train_tokens", "history", "validation"):
        assert without_times(after[name]) == without_times(before[name])
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in load_file(run_copy / "model.safetensors").items()
    )


def test_validation_settings_differ_from_training(text_file, tmp_path):
    folder = tmp_path / "run"
    arguments = ["train", "--text", str(text_file), "--validation_text", str(text_file), "--output_dir", str(folder)]
    arguments += ["--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", *TINY_RUN]
    protocol = ["--eval_mem_len", "24", "--eval_segment_length", "8", "--eval_clamp_len", "20", "--eval_same_length"]
    assert main([*arguments, *protocol]) == 0
    validation = report_of(folder)["validation"]
    assert {name: validation[name] for name in ("mem_len", "segment_length", "clamp_len", "same_length")} == {
        "mem_len": 24,
        "segment_length": 8,
        "clamp_len": 20,
        "same_length": True,
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["mem_len"], config["clamp_len"], config["same_length"]) == (8, -1, False)


def test_run_without_validation_text(text_file, tmp_path):
    folder = tmp_path / "run"
    arguments = ["train", "--text", str(text_file), "--output_dir", str(folder), "--max_steps", "1", *TINY_RUN]
    assert main([*arguments, "--logging_steps", "1"]) == 0
    assert "validation" not in report_of(folder)
    assert "no validation text" in (folder / "README.md").read_text("utf-8")


@pytest.mark.parametrize("kind", ["char", "bpe", "word"])
def test_other_tokenizers(kind, text_file, tmp_path):
    folder = tmp_path / "run"
    arguments = ["train", "--text", str(text_file), "--output_dir", str(folder), "--max_steps", "1", *TINY_RUN]
    size = ["--tokenizer_vocab_size", "300"] if kind == "bpe" else []
    assert main([*arguments, "--logging_steps", "1", "--tokenizer", kind, *size]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)
    assert (
        main([*arguments[:3], "--output_dir", str(tmp_path / "second"), *arguments[5:], "--tokenizer", str(folder)])
        == 0
    )
