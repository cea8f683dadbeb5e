"""Every mistake: exit code 2, one sentence with argument, value and mend, and nothing written."""

import shutil

import pytest
from cli.conftest import TINY_RUN
from safetensors.torch import load_file, save_file

from hf_efficient.cli.__main__ import main


@pytest.fixture
def place(tmp_path, monkeypatch, text_file, finished_run):
    """The working folder of the tests below, with everything that their command lines name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(text_file, "my.txt")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Too short.", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("Ünïcödé".encode("latin-1"))
    (tmp_path / "recipe.yaml").write_text("text: my.txt\nmax_stps: 3\n", encoding="utf-8")
    (tmp_path / "model.yaml").write_text("text: my.txt\nmodel: {hiden_size: 16}\n", encoding="utf-8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine", encoding="utf-8")
    shutil.copytree(finished_run, "run")
    shutil.copytree(finished_run, "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(finished_run, "no_config")
    (tmp_path / "no_config" / "config.json").unlink()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").touch()
    return tmp_path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TRAIN = ["train", "--text", "my.txt", "--output_dir", "new", "--max_steps", "1", *TINY_RUN]
REFORMER = ["train", "--text", "my.txt", "--output_dir", "new", "--architecture", "reformer", "--max_steps", "1"]
REFORMER += ["--per_device_train_batch_size", "2", "--segment_length", "32", "--model.axial_pos_shape", "[4, 8]"]
EVALUATE = ["evaluate", "run", "--text", "my.txt"]
GENERATE = ["generate", "run", "The"]
RESUME = ["train", "run/recipe.yaml", "--output_dir", "run", "--resume"]

# Command line, and what its message must hold: argument, value, mend.
MISTAKES = [
    # names
    ([*TRAIN, "--max_stps", "3"], ["--max_stps", "--max_steps", "--help"]),
    ([*TRAIN, "--lr", "1e-3"], ["--lr", "--learning_rate"]),
    ([*TRAIN, "--model.hiden_size", "16"], ["hiden_size", "hidden_size"]),
    (["train", "recipe.yaml", "--output_dir", "new"], ["recipe.yaml", "max_stps", "max_steps"]),
    (["train", "model.yaml", "--output_dir", "new"], ["hiden_size", "hidden_size"]),
    (["train", "absent.yaml", "--output_dir", "new"], ["absent.yaml", "path"]),
    ([*GENERATE, "--max_tokens", "3"], ["--max_tokens", "--max_new_tokens"]),
    # values
    ([*TRAIN, "--max_steps", "many"], ["--max_steps", "many", "whole number"]),
    ([*TRAIN, "--max_steps", "0"], ["--max_steps", "0", "at least 1"]),
    ([*TRAIN, "--segment_length", "0"], ["--segment_length", "0", "at least 1"]),
    ([*TRAIN, "--per_device_train_batch_size", "0"], ["--per_device_train_batch_size", "0", "at least 1"]),
    ([*TRAIN, "--gradient_accumulation_steps", "-1"], ["--gradient_accumulation_steps", "-1", "at least 1"]),
    ([*TRAIN, "--learning_rate", "-1"], ["--learning_rate", "-1", "positive"]),
    ([*TRAIN, "--lr_scheduler_type", "cosin"], ["cosin", "cosine"]),
    ([*TRAIN, "--architecture", "lstm"], ["--architecture", "lstm", "transformer_xl", "reformer"]),
    ([*TRAIN, "--tokenizer", "bytes"], ["--tokenizer", "bytes"]),
    ([*TRAIN, "--tokenizer_vocab_size", "10"], ["--tokenizer", "10", "258"]),
    ([*TRAIN, "--document_boundaries", "stop"], ["--text", "stop", "reset"]),
    ([*TRAIN, "--document_separator", "page"], ["--text", "page", "blank_line"]),
    ([*TRAIN, "--train_sampling_strategy", "random"], ["train_sampling_strategy", "random", "sequential"]),
    ([*TRAIN, "--eval_strategy", "steps"], ["--eval_strategy", "steps", "--validation_text"]),
    # settings of the model
    ([*TRAIN, "--model.hidden_size", "15"], ["hidden_size", "15", "even"]),
    ([*TRAIN, "--model.hidden_size", "big"], ["hidden_size", "big", "int"]),
    ([*TRAIN, "--model.mem_len", "-1"], ["mem_len", "-1", "0"]),
    ([*TRAIN, "--model.vocab_size", "10"], ["vocab_size", "10", "258", "leave it out"]),
    ([*TRAIN, "--model.attn_type", "2"], ["attn_type"]),
    ([*TRAIN, "--eval_mem_len", "-1"], ["mem_len", "-1"]),
    ([*REFORMER, "--model.num_hash", "2"], ["num_hash", "num_hashes"]),
    ([*REFORMER, "--model.num_hidden_layers", "2"], ["num_hidden_layers", "attn_layers"]),
    ([*REFORMER, "--model.mem_len", "8"], ["mem_len"]),
    ([*REFORMER, "--model.num_buckets", "7"], ["num_buckets", "7", "even"]),
    ([*REFORMER, "--model.attn_layers", "[local, lhs]"], ["attn_layers", "lhs", "lsh"]),
    ([*REFORMER, "--model.is_decoder", "false"], ["is_decoder", "True"]),
    ([*REFORMER, "--segment_length", "33"], ["--segment_length", "33", "32 positions", "axial_pos_shape"]),
    ([*REFORMER, "--eval_segment_length", "64"], ["--eval_segment_length", "64", "32 positions"]),
    ([*REFORMER, "--eval_mem_len", "8"], ["mem_len", "reformer"]),
    # text
    (["train", "--output_dir", "new"], ["--text", "missing"]),
    (["train", "--text", "absent.txt", "--output_dir", "new"], ["--text", "absent.txt", "path"]),
    (["train", "--text", "empty.txt", "--output_dir", "new"], ["--text", "empty.txt"]),
    (["train", "--text", "latin1.txt", "--output_dir", "new"], ["--text", "latin1.txt", "UTF-8"]),
    (["train", "--text", "short.txt", "--output_dir", "new"], ["--text", "11 tokens", "more text"]),
    ([*TRAIN, "--validation_text", "absent.txt"], ["--validation_text", "absent.txt"]),
    ([*TRAIN, "--validation_text", "short.txt"], ["--validation_text", "11 tokens"]),
    # folders
    (["train", "--text", "my.txt"], ["--output_dir", "missing", "runs/mine"]),
    (["train", "--text", "my.txt", "--output_dir", "my.txt"], ["--output_dir", "my.txt", "folder"]),
    (["train", "--text", "my.txt", "--output_dir", "taken"], ["--output_dir", "taken", "another folder"]),
    (["train", "--text", "my.txt", "--output_dir", "run"], ["--output_dir", "run", "--resume"]),
    (
        [*RESUME, "--resume_from_checkpoint", "run/checkpoint-2"],
        ["--resume_from_checkpoint", "checkpoint-2", "--resume"],
    ),
    ([*RESUME, "--segment_length", "8"], ["--output_dir", "segment_length", "8"]),
    ([*RESUME, "--model.mem_len", "4"], ["--output_dir", "mem_len"]),
    ([*RESUME, "--text", "short.txt", "my.txt"], ["--output_dir", "text"]),
    ([*RESUME, "--seed", "1"], ["--output_dir", "seed"]),
    (["demo", "--output", "taken"], ["--output", "taken", "notes.txt", "another folder"]),
    (["demo", "--output", "my.txt"], ["--output", "my.txt", "folder"]),
    (["demo", "--output", "run"], ["--output", "run", "checkpoint", "another folder"]),
    (["demo", "--steps", "0"], ["--steps", "0", "at least 1"]),
    # saved models
    (["evaluate", "--text", "my.txt"], ["model", "hf-efficient evaluate MODEL"]),
    (["evaluate", "./absent", "--text", "my.txt"], ["--model", "absent", "hf-efficient train"]),
    (["evaluate", "taken", "--text", "my.txt"], ["--model", "taken", "config.json"]),
    (["evaluate", "no_config", "--text", "my.txt"], ["--model", "no_config", "config.json"]),
    ([*EVALUATE, "--batch_size", "9000"], ["--text", "--batch_size lanes", "fewer than", "9000"]),
    (["evaluate", "runs/mien", "--text", "my.txt"], ["--model", "'runs/mien' does not exist", "'runs/mine'"]),
    (["evaluate", "me/absent", "--text", "my.txt"], ["--model", "'me/absent' is no folder here", "Hub"]),
    (["evaluate", "truncated", "--text", "my.txt"], ["--model", "truncated", "cannot be loaded"]),
    ([*EVALUATE, "--no_memory", "--mem_len", "4"], ["--mem_len", "4", "--no_memory"]),
    ([*EVALUATE, "--mem_len", "-4"], ["mem_len", "-4"]),
    ([*EVALUATE, "--mem_len", "0", "--same_length"], ["same_length", "mem_len"]),
    ([*EVALUATE, "--segment_length", "0"], ["--segment_length", "0"]),
    ([*EVALUATE, "--json", "my.txt"], ["--json", "my.txt", "new file"]),
    ([*EVALUATE, "--num_hashes", "4"], ["--num_hashes", "transfo-xl", "leave it out"]),
    ([*EVALUATE, "--device", "abacus"], ["--device", "abacus", "cpu"]),
    (["evaluate", "run"], ["--text", "missing"]),
    (["generate", "run"], ["--prompt", "text to continue"]),
    (["generate", "run", ""], ["--prompt", "text to continue"]),
    (["generate", "absent/model/here", "The"], ["--model", "absent/model/here"]),
    ([*GENERATE, "--temperature", "0"], ["--temperature", "0", "--greedy"]),
    ([*GENERATE, "--top_p", "1.5"], ["--top_p", "1.5", "at most 1"]),
    ([*GENERATE, "--top_k", "-1"], ["--top_k", "-1", "0"]),
    ([*GENERATE, "--max_new_tokens", "0"], ["--max_new_tokens", "0", "at least 1"]),
    ([*GENERATE, "--num_texts", "0"], ["--num_texts", "0", "at least 1"]),
    # checkpoints of earlier releases
    (["convert", "my.txt"], ["output", "hf-efficient convert SOURCE OUTPUT"]),
    (["convert", "absent", "new"], ["absent"]),
    (["convert", "run", "taken"], ["taken", "not empty"]),
    (["convert", "taken", "new"], ["taken", "model.pt"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value)[-60:])
def test_mistake(place, capsys, arguments, words):
    before = contents(place)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    message = captured.err
    assert message.startswith("hf-efficient: ")
    assert message.count("\n") == 1
    assert captured.out == ""
    missing = [word for word in words if word not in message]
    assert missing == [], message
    assert contents(place) == before


def test_incomplete_weights(run_copy, text_file, capsys):
    weights = load_file(run_copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer_norm.weight"))
    save_file(
        {key: value for key, value in weights.items() if key != name}, run_copy / "model.safetensors", {"format": "pt"}
    )
    assert main(["evaluate", str(run_copy), "--text", str(text_file)]) == 2
    message = capsys.readouterr().err
    assert "--model" in message
    assert "lacks 1 of its weights" in message
    assert message.count("\n") == 1
