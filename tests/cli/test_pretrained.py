"""Fine-tuning from the command line: a training that begins with a saved model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_efficient.cli.__main__ import main
from hf_efficient.cli.pretrained import pretrained_config, pretrained_model

QUICK = ("--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--use_cpu")


def tune(source, text_file, folder, *flags):
    return main(
        ["train", "--pretrained", str(source), "--text", str(text_file), "--output_dir", str(folder), *QUICK, *flags]
    )


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def test_training_goes_on_from_the_saved_weights(finished_run, text_file, tmp_path):
    folder = tmp_path / "tuned"
    assert tune(finished_run, text_file, folder, "--learning_rate", "1e-9", "--save_steps", "2") == 0
    before, after = load_file(finished_run / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)
    texts = [AutoTokenizer.from_pretrained(path)("The brown fox")["input_ids"] for path in (finished_run, folder)]
    assert texts[0] == texts[1]
    report = report_of(folder)
    assert (report["architecture"], report["pretrained"]) == ("transformer_xl", str(finished_run))
    assert report["settings"]["pretrained"] == str(finished_run)
    assert [str(report["settings"][name]) for name in ("save_steps", "max_steps")] == ["2", "1"]  # as they were typed
    card = (folder / "README.md").read_text("utf-8")
    assert "trained further from the weights of tiny on words.txt" in card
    assert str(finished_run) not in card.partition("To repeat it:")[0]


def test_settings_that_no_weight_depends_on_may_change(finished_run, text_file, tmp_path):
    folder = tmp_path / "tuned"
    assert tune(finished_run, text_file, folder, "--model.mem_len", "24", "--model.dropout", "0.0") == 0
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["mem_len"], config["dropout"], config["hidden_size"]) == (24, 0.0, 16)


def test_tuned_run_is_resumed(finished_run, text_file, tmp_path, capsys):
    flags = ["--segment_length", "16", "--save_steps", "1", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
    assert tune(finished_run, text_file, tmp_path / "tuned", *flags) == 0
    assert tune(finished_run, text_file, tmp_path / "tuned", *flags, "--max_steps", "3", "--resume") == 0
    assert tune(finished_run, text_file, tmp_path / "whole", *flags, "--max_steps", "3") == 0
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    said = capsys.readouterr()
    assert "for 3 updates; those since update 1 took" in said.out
    assert "missing keys" not in said.out + said.err  # a tied head stands in no checkpoint
    assert report_of(tmp_path / "tuned")["resumed_at"] == 1
    assert "since update 1," in (tmp_path / "tuned" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokenizer", "bpe"], ["--tokenizer 'bpe'", "has its own"]),
        (["--architecture", "reformer"], ["--architecture reformer", "transformer_xl"]),
        (["--model.mem_lenn", "3"], ["mem_lenn", "mem_len"]),
        (["--model.hidden_size", "32"], ["--pretrained", "--model.hidden_size"]),
        (["--model.num_hidden_layers", "3"], ["--pretrained", "lacks"]),
        (["--model.mem_len", "-3"], ["mem_len"]),
        (["--task", "translation", "--source_text", "a", "--target_text", "b"], ["--text"]),
    ],
)
def test_what_contradicts_the_saved_model(flags, words, finished_run, text_file, tmp_path, capsys):
    assert tune(finished_run, text_file, tmp_path / "tuned", *flags) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("source", "words"), [("nowhere", ["--pretrained 'nowhere'", "does not exist"]), (".", ["no config.json"])]
)
def test_no_model_there(source, words, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tune(source, text_file, "tuned") == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_model_of_another_kind(tmp_path, text_file, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), "utf-8")
    assert tune(tmp_path, text_file, tmp_path / "tuned") == 2
    assert "is a gpt2 model; it must be one of transformer_xl" in capsys.readouterr().err


def test_half_precision_is_trained_in_single(finished_run, tmp_path):
    config = pretrained_config(str(finished_run), "transformer_xl", {})
    pretrained_model(str(finished_run), config, []).to(torch.bfloat16).save_pretrained(tmp_path)
    config = pretrained_config(str(tmp_path), "transformer_xl", {})
    assert pretrained_model(str(tmp_path), config, []).dtype == torch.float32


def test_translation_goes_on(tmp_path, capsys):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("\n".join(f"one two {n}\teins zwei {n}" for n in range(30)) + "\n", encoding="utf-8")
    start, tuned = tmp_path / "start", tmp_path / "tuned"
    arguments = ["train", "--task", "translation", "--pairs", str(pairs), *QUICK]
    sizes = ["--model.hidden_size", "16", "--model.num_attention_heads", "2", "--tokenizer_vocab_size", "300"]
    sizes += ["--model.num_encoder_layers", "1", "--model.num_decoder_layers", "1"]
    assert main([*arguments, "--output_dir", str(start), *sizes]) == 0
    assert main([*arguments, "--output_dir", str(tuned), "--pretrained", str(start), "--learning_rate", "1e-9"]) == 0
    before, after = load_file(start / "model.safetensors"), load_file(tuned / "model.safetensors")
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)
    assert "trained further from the weights of start on pairs.tsv" in (tuned / "README.md").read_text("utf-8")
    capsys.readouterr()
    assert main(["train", "--text", str(pairs), "--pretrained", str(start), "--output_dir", str(tmp_path / "x")]) == 2
    assert "is a model for a task on pairs" in capsys.readouterr().err
