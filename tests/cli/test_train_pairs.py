"""Translation and conversation from files to a finished run folder, and back from it."""

import json

import pytest
import sacrebleu
import torch
import yaml
from cli.test_train import losses, report_of, without_times
from safetensors.torch import load_file
from training.small_pairs import small_pairs
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_efficient.cli.__main__ import main

SIZES = {
    "evolved_transformer": {"num_encoder_layers": 1, "num_decoder_layers": 1},
    "universal_transformer": {"intermediate_size": 32, "max_steps": 2},
    "reformer": {
        "attn_layers": "[local, windowed_lsh]",
        "feed_forward_size": 32,
        "attention_head_size": 8,
        "axial_pos_shape": "[8, 8]",
        "axial_pos_embds_dim": "[8, 8]",
        "max_position_embeddings": 64,
    },
}
RUN = [
    *("--model.hidden_size", "16", "--model.num_attention_heads", "2", "--tokenizer_vocab_size", "280"),
    *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8", "--logging_steps", "2"),
    *("--save_steps", "2", "--disable_tqdm", "true", "--use_cpu", "--learning_rate", "1e-2"),
]


def model_flags(architecture):
    settings = SIZES[architecture].items()
    return [
        "--architecture",
        architecture,
        *(word for name, value in settings for word in (f"--model.{name}", str(value))),
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The small pairs as two files, and five conversations."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = small_pairs()
    for side in ("source", "target"):
        (folder / f"{side}.txt").write_text("".join(text + "\n" for text in pairs[side]), encoding="utf-8")
    talks = [{"turns": [f"Hello {n}.", "Hi!", f"How is number {n}?", "Fine."]} for n in range(5)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
    return folder


def translation(files, folder, *flags, architecture="evolved_transformer"):
    text = ["--source_text", files / "source.txt", "--target_text", files / "target.txt"]
    held_out = ["--validation_source", files / "source.txt", "--validation_target", files / "target.txt"]
    words = ["train", "--task", "translation", *text, *held_out, "--output_dir", folder, *model_flags(architecture)]
    return main([str(word) for word in (*words, *RUN, *flags)])


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The folder of a run that learned something."""
    folder = tmp_path_factory.mktemp("runs") / "translation"
    assert translation(files, folder, "--max_steps", "40", "--model.hidden_size", "32") == 0
    return folder


def test_run_folder_is_complete(finished, files):
    report = report_of(finished)
    pairs, validation = small_pairs(), report["validation"]
    assert (report["task"], report["architecture"], report["steps"]) == ("translation", "evolved_transformer", 40)
    assert report["data"]["text"] == [str(files / "source.txt"), str(files / "target.txt")]
    assert (report["data"]["pairs"], report["data"]["left_out"]) == (len(pairs), 0)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    count = sum(len(tokenizer(text)["input_ids"]) for side in ("source", "target") for text in pairs[side])
    assert report["data"]["tokens"] == validation["tokens"] == count
    assert report["tokens_per_second"] > 0
    assert report["peak_memory_mb"] > 0
    assert (validation["pairs"], validation["num_beams"]) == (len(pairs), 1)
    assert "tok:13a" in validation["bleu_signature"]
    assert any("eval_bleu" in entry for entry in report["history"])
    for name in ("README.md", "recipe.yaml", "loss.png", "model.safetensors", "tokenizer.json", "config.json"):
        assert (finished / name).is_file(), name
    card = (finished / "README.md").read_text("utf-8")
    assert "pipeline_tag: translation" in card
    assert f"| BLEU | {validation['bleu']:.2f} |" in card
    assert str(files) not in card.split("## How it was trained")[0]


def test_saved_model_translates_as_measured(finished):
    model = AutoModelForSeq2SeqLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    pairs = small_pairs()
    answers = [model.generate(**tokenizer(text, return_tensors="pt"))[0] for text in pairs["source"]]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    expected = sacrebleu.corpus_bleu(texts, [pairs["target"][:]]).score
    assert report_of(finished)["validation"]["bleu"] == pytest.approx(expected)
    assert expected > 1


def test_evaluate_gives_the_figures_of_the_report(finished, files, tmp_path, capsys):
    text = ["--source_text", files / "source.txt", "--target_text", files / "target.txt"]
    words = ["evaluate", finished, *text, "--json", "-", "--translations", tmp_path / "out.txt", "--device", "cpu"]
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    figures, validation = json.loads(capsys.readouterr().out), report_of(finished)["validation"]
    for name in ("loss", "perplexity", "bleu", "length_ratio"):
        assert figures[name] == pytest.approx(validation[name], rel=1e-5), name
    lines = (tmp_path / "out.txt").read_text("utf-8").splitlines()
    assert sacrebleu.corpus_bleu(lines, [small_pairs()["target"][:]]).score == pytest.approx(figures["bleu"])


def test_generate_prints_the_translation_alone(finished, capsys):
    source = small_pairs()["source"][0]
    model = AutoModelForSeq2SeqLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    for beams in (1, 3):
        output = model.generate(**tokenizer(source, return_tensors="pt"), num_beams=beams)
        capsys.readouterr()
        assert main(["generate", str(finished), source, "--num_beams", str(beams), "--device", "cpu"]) == 0
        assert capsys.readouterr().out == tokenizer.decode(output[0], skip_special_tokens=True).strip() + "\n"
    drawn = []
    for seed in ("1", "1", "2"):
        flags = ["--temperature", "2.0", "--seed", seed, "--max_new_tokens", "8"]
        assert main(["generate", str(finished), source, *flags]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SIZES if name != "evolved_transformer"]


@pytest.mark.parametrize("architecture", ["evolved_transformer", *SLOW])
def test_resumed_run_equals_an_uninterrupted_one(files, tmp_path, architecture):
    """The same report, but for the clock, and the same weights; the recipe that a run leaves repeats it."""
    flags = ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--generation_max_length", "6"]
    for steps in ("2", "8"):
        code = translation(
            files, tmp_path / "stopped", "--max_steps", steps, "--resume", *flags, architecture=architecture
        )
        assert code == 0
    whole = tmp_path / "whole"
    assert translation(files, whole, "--max_steps", "8", *flags, architecture=architecture) == 0
    again = tmp_path / "again"
    assert main(["train", str(whole / "recipe.yaml"), "--output_dir", str(again)]) == 0
    expected = report_of(whole)
    assert len(losses(expected)) == 4
    for folder in (tmp_path / "stopped", again):
        report = report_of(folder)
        assert losses(report) == losses(expected)
        assert without_times(report["validation"]) == without_times(expected["validation"])
        assert (report["steps"], report["train_tokens"]) == (8, expected["train_tokens"])
        actual, weights = (load_file(place / "model.safetensors") for place in (folder, whole))
        assert all((actual[name] == value).all() for name, value in weights.items())
    assert yaml.safe_load((whole / "recipe.yaml").read_text("utf-8"))["task"] == "translation"


def test_conversation(files, tmp_path, capsys):
    talks, folder = files / "talks.jsonl", tmp_path / "talk"
    words = ["train", "--task", "conversation", "--conversations", talks, "--validation_conversations", talks]
    words += ["--output_dir", folder, *model_flags("evolved_transformer"), *RUN, "--max_steps", "4"]
    assert main([str(word) for word in words]) == 0
    report = report_of(folder)
    assert (report["data"]["pairs"], report["validation"]["pairs"]) == (15, 15)
    assert "bleu" not in report["validation"]
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 128
    assert "pipeline_tag: text-generation" in (folder / "README.md").read_text("utf-8")
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--conversations", str(talks), "--split", "all", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(report["validation"]["loss"], rel=1e-5)
    assert figures["num_pairs"] == 15


def test_schedule_sets_the_paper_s_values(files, tmp_path):
    words = [word for word in RUN if word not in ("--learning_rate", "1e-2")]
    text = ["--source_text", files / "source.txt", "--target_text", files / "target.txt"]
    folder = tmp_path / "run"
    command = ["train", "--task", "translation", *text, "--output_dir", folder, *model_flags("evolved_transformer")]
    command += [*words, "--schedule", "evolved_transformer", "--max_steps", "6", "--warmup_steps", "3"]
    assert main([str(word) for word in command]) == 0
    report = report_of(folder)
    rates = [entry["learning_rate"] for entry in report["history"]]
    peak = 2 * (16 * 3) ** -0.5
    assert rates == pytest.approx([peak / 3, peak, peak / 4], rel=1e-6)
    assert report["settings"]["schedule"] == "evolved_transformer"
    assert "validation" not in report


def test_help_is_of_the_task(capsys):
    assert main(["train", "--task", "translation", "--help"]) == 0
    page = capsys.readouterr().out
    assert "--source_text" in page
    assert "--segment_length" not in page
    assert "Settings of a evolved_transformer model" in page
    assert main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    assert "--source_text" not in page
    assert "--task" in page


TRAIN = ["train", "--task", "translation", "--output_dir", "new", "--max_steps", "1", "--use_cpu"]
TEXT = ["--source_text", "source.txt", "--target_text", "target.txt"]
SMALL = ["--tokenizer_vocab_size", "280", "--model.hidden_size", "16", "--model.num_attention_heads", "2"]
AXES = ["--model.axial_pos_embds_dim", "[8, 8]"]
MISTAKES = [
    (["train", "--task", "translating", "--output_dir", "new"], ["--task", "translating", "conversation"]),
    (["train", *TEXT, "--output_dir", "new"], ["--source_text", "--task translation"]),
    (["train", "--conversations", "talks.jsonl", "--output_dir", "new"], ["--conversations", "--task conversation"]),
    (TRAIN, ["--source_text", "missing", "--pairs"]),
    ([*TRAIN, *TEXT[:2]], ["--target_text", "missing", "source.txt"]),
    ([*TRAIN, *TEXT, "--pairs", "pairs.tsv"], ["--pairs", "pairs.tsv", "leave one out"]),
    ([*TRAIN, "--pairs", "absent.tsv"], ["--pairs", "absent.tsv", "path"]),
    ([*TRAIN, "--source_text", "source.txt", "--target_text", "short.txt"], ["--source_text", "23 lines", "1"]),
    ([*TRAIN, *TEXT, "--validation_source", "source.txt"], ["--validation_target", "missing"]),
    ([*TRAIN, *TEXT, "--eval_strategy", "steps"], ["--eval_strategy", "steps", "--validation_source"]),
    ([*TRAIN, *TEXT, "--architecture", "transformer_xl"], ["--architecture", "transformer_xl", "evolved_transformer"]),
    ([*TRAIN, *TEXT, "--segment_length", "8"], ["--segment_length"]),
    ([*TRAIN, *TEXT, "--tokenizer_vocab_size", "9"], ["--tokenizer", "vocab_size=9", "258"]),
    ([*TRAIN, *TEXT, "--tokenizer", "word"], ["--tokenizer", "'word' is for language models", "bpe"]),
    ([*TRAIN, *TEXT, "--tokenizer", "absent"], ["--tokenizer", "absent"]),
    ([*TRAIN, *TEXT, "--tokenizer", "absent", "--lowercase"], ["--tokenizer", "absent", "--lowercase"]),
    ([*TRAIN, *TEXT, *SMALL, "--max_target_length", "1"], ["max_target_length=1", "allow more"]),
    ([*TRAIN, *TEXT, *SMALL, "--schedule", "evolved_transformer"], ["--schedule", "warmup_steps=8000", "max_steps=1"]),
    (
        [*TRAIN, *TEXT, *SMALL, "--schedule", "transformer", "--learning_rate", "1"],
        ["--learning_rate", "--schedule transformer", "leave one out"],
    ),
    (
        [*TRAIN, *TEXT, *SMALL, "--label_smoothing_factor", "0.1"],
        ["--label_smoothing_factor", "--model.label_smoothing 0.1"],
    ),
    (
        [*TRAIN, *TEXT, *SMALL, "--architecture", "reformer", "--model.axial_pos_shape", "[2, 2]"] + AXES,
        ["--max_source_length", "4 positions", "axial_pos_shape"],
    ),
    (["evaluate", "run"], ["run", "--source_text"]),
    (["evaluate", "run", "--text", "source.txt"], ["run", "--source_text"]),
    (["evaluate", "run", *TEXT, "--text", "source.txt"], ["--text", "--source_text", "one of them"]),
    (["evaluate", "run", *TEXT, "--mem_len", "4"], ["--mem_len", "4", "translation"]),
    (["evaluate", "run", *TEXT, "--translations", "source.txt"], ["--translations", "source.txt", "new file"]),
    (["evaluate", "run", *TEXT, "--num_beams", "0"], ["--num_beams", "0", "at least 1"]),
    (["generate", "run", "The dog", "--greedy", "--top_k", "3"], ["--top_k", "3", "--greedy"]),
    (["evaluate", "run", *TEXT, "--length_penalty", "0.6"], ["--length_penalty", "0.6", "--num_beams"]),
    (["generate", "run", "The dog", "--num_texts", "2"], ["--num_texts", "2", "--temperature"]),
    (["generate", "run", "The dog", "--max_turns", "3"], ["--max_turns", "3", "--interactive"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value)[-60:])
def test_mistake(files, finished, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    for path in files.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "short.txt").write_text("one line\n", encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text("the dog\tder hund\n", encoding="utf-8")
    (tmp_path / "run").symlink_to(finished)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("hf-efficient: ")
    assert message.count("\n") == 1
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "new").exists()


def test_depth_is_a_setting_of_the_call(files, tmp_path, capsys):
    """For a model of two stacks as well: both take as many steps as the flag says."""
    folder = tmp_path / "universal"
    flags = ["--max_steps", "2", "--model.step_signal", "sinusoid"]
    assert translation(files, folder, *flags, architecture="universal_transformer") == 0
    text = ["--source_text", str(files / "source.txt"), "--target_text", str(files / "target.txt")]
    capsys.readouterr()
    assert main(["evaluate", str(folder), *text, "--num_steps", "1", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForSeq2SeqLM, AutoTokenizer))
    assert (figures["ponder_time"], figures["num_steps"]) == (1, 1)

    answer = main(["generate", str(folder), "one two", "--num_steps", "1", "--max_new_tokens", "6"])
    inputs = tokenizer("one two", return_tensors="pt")
    states = model.eval().get_encoder()(**inputs, num_steps=1)
    decoded = torch.full((1, 1), model.config.decoder_start_token_id)
    for _ in range(6):
        logits = model(encoder_outputs=states, decoder_input_ids=decoded, num_steps=1).logits
        decoded = torch.cat([decoded, logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(decoded[0], skip_special_tokens=True).strip()
    assert (answer, capsys.readouterr().out.strip()) == (0, expected)
