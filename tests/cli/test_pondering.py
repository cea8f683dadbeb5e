"""Models that choose how long they think, on the command line: trained, measured, and made to write."""

import json

import pytest
import torch
from cli.conftest import TINY_RUN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_efficient.cli.__main__ import main
from hf_efficient.data import load_documents, segment_lanes, tokenize_documents

SEGMENT_LENGTH = 24
SMALL = {
    "universal_transformer": (
        *("--model.hidden_size", "16", "--model.num_attention_heads", "2", "--model.intermediate_size", "32"),
        *("--model.max_steps", "5", "--model.step_signal", "sinusoid", "--model.dropout", "0.0"),
        *("--model.max_position_embeddings", "16"),  # a limit for learned positions alone
    ),
    "act_rnn": ("--model.hidden_size", "16", "--model.halting", "act", "--model.max_steps", "4"),
}


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def train(folder, text_file, architecture, *flags):
    arguments = ["train", "--text", str(text_file), "--validation_text", str(text_file), "--output_dir", str(folder)]
    tiny = TINY_RUN[TINY_RUN.index("--segment_length") :]
    length = ("--segment_length", str(SEGMENT_LENGTH))
    assert main([*arguments, "--architecture", architecture, *SMALL[architecture], *tiny, *length, *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def universal_run(tmp_path_factory, text_file):
    """The folder of a Universal Transformer after two updates, evaluated after each."""
    folder = tmp_path_factory.mktemp("runs") / "universal"
    flags = ["--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--logging_steps", "1"]
    return train(folder, text_file, "universal_transformer", *flags)


@pytest.fixture(scope="module", params=SMALL)
def run_folder(request, tmp_path_factory, text_file):
    """The folder of a finished run."""
    if request.param == "universal_transformer":
        return request.getfixturevalue("universal_run")
    return train(tmp_path_factory.mktemp("runs") / "run", text_file, request.param, "--max_steps", "2")


def ponder_times(folder, text_file, **depth):
    """Steps of every token of the text, read segment by segment without a Trainer."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = tokenize_documents(load_documents(text_file), AutoTokenizer.from_pretrained(folder))
    is_recurrent = hasattr(model, "create_cache")
    states = [{"past_key_values": model.create_cache()} if is_recurrent else {} for _ in range(2)]  # of each lane
    times = []
    for number, item in enumerate(segment_lanes(tokens, 2, SEGMENT_LENGTH)):
        real = item["attention_mask"].bool()
        if real.any():
            with torch.no_grad():
                output = model(item["input_ids"][real][None], **depth, **states[number % 2])
            times.append(output.ponder_times[0])
    return torch.cat(times).double()


def test_recurrent_state_is_carried_along(tmp_path, text_file, capsys):
    """Training goes on from the state that the last segment left, and so does measuring, unless told otherwise."""
    folder = train(tmp_path / "rnn", text_file, "act_rnn", "--max_steps", "2", "--model.dropout", "0.0")
    memory = load_file(folder / "checkpoint-2" / "memory_0_of_1.safetensors")
    assert int(memory["seq_length"]) == 2 * SEGMENT_LENGTH
    carried, alone = evaluate(folder, text_file, capsys), evaluate(folder, text_file, capsys, "--no_memory")
    assert (carried["memory"], alone["memory"]) == (True, False)
    assert carried["loss"] == pytest.approx(report_of(folder)["validation"]["loss"], rel=1e-6)
    assert carried["loss"] != pytest.approx(alone["loss"], rel=1e-6)


def test_report_and_card_have_the_steps_per_token(run_folder, text_file):
    report, times = report_of(run_folder), ponder_times(run_folder, text_file)
    assert report["validation"]["ponder_time"] == pytest.approx(times.mean().item(), rel=1e-6)
    assert report["validation"]["ponder_time_std"] == pytest.approx(times.std(correction=0).item(), rel=1e-4, abs=1e-4)
    assert all(entry["ponder_time"] >= 1 for entry in report["history"] if "loss" in entry)
    card = (run_folder / "README.md").read_text("utf-8")
    assert f"| Steps per token | {times.mean():.2f} ± " in card
    assert {"universal_transformer": "Dehghani", "act_rnn": "Graves"}[report["architecture"]] in card


def test_evaluations_during_and_after_training_report_them_alike(universal_run, text_file):
    report = report_of(universal_run)
    measured = [entry["eval_ponder_time"] for entry in report["history"] if "eval_loss" in entry]
    assert len(measured) == 3
    assert measured[-1] == measured[-2] == report["validation"]["ponder_time"]


def evaluate(folder, text_file, capsys, *flags):
    capsys.readouterr()
    length = ["--segment_length", str(SEGMENT_LENGTH), "--batch_size", "2"]
    assert main(["evaluate", str(folder), "--text", str(text_file), *length, *flags, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_agrees_with_the_trainer(run_folder, text_file, capsys):
    figures, validation = evaluate(run_folder, text_file, capsys), report_of(run_folder)["validation"]
    for name in ("loss", "bits_per_byte", "ponder_time", "ponder_time_std"):
        assert figures[name] == pytest.approx(validation[name], rel=1e-5), name


def test_evaluate_at_another_depth(universal_run, text_file, capsys):
    shallow = evaluate(universal_run, text_file, capsys, "--num_steps", "1")
    assert (shallow["ponder_time"], shallow["ponder_time_std"], shallow["num_steps"]) == (1, 0, 1)
    eager = evaluate(universal_run, text_file, capsys, "--num_steps", "9", "--exit_threshold", "0.7")
    expected = ponder_times(universal_run, text_file, num_steps=9, exit_threshold=0.7).mean().item()
    assert eager["ponder_time"] == pytest.approx(expected)
    assert len({shallow["loss"], eager["loss"], evaluate(universal_run, text_file, capsys)["loss"]}) == 3


def test_generate_at_another_depth(universal_run, capsys):
    def write(*flags):
        capsys.readouterr()
        assert main(["generate", str(universal_run), "The quick", "--max_new_tokens", "20", "--greedy", *flags]) == 0
        return capsys.readouterr().out

    model, tokenizer = (auto.from_pretrained(universal_run) for auto in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer("The quick", return_tensors="pt", return_token_type_ids=False)
    expected = model.eval().generate(**inputs, max_new_tokens=20, do_sample=False, num_steps=1, use_cache=False)
    assert write("--num_steps", "1").strip() == tokenizer.decode(expected[0], skip_special_tokens=True).strip()
    assert write("--num_steps", "1") != write("--num_steps", "8")


@pytest.mark.parametrize("command", [["evaluate", "--text", "TEXT"], ["generate", "The"]])
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--num_steps", "0"], ["num_steps=0"]),
        (["--exit_threshold", "1.5"], ["exit_threshold=1.5"]),
    ],
)
def test_impossible_depths_are_refused(universal_run, text_file, capsys, command, flags, parts):
    name, *rest = [str(text_file) if word == "TEXT" else word for word in command]
    assert main([name, str(universal_run), *rest, *flags]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts)
    assert message.count("\n") == 1


@pytest.mark.parametrize("command", [["evaluate", "--text", "TEXT"], ["generate", "The"]])
def test_depth_means_nothing_to_other_models(finished_run, text_file, capsys, command):
    name, *rest = [str(text_file) if word == "TEXT" else word for word in command]
    assert main([name, str(finished_run), *rest, "--num_steps", "2"]) == 2
    assert "--num_steps means nothing to a transfo-xl model; leave it out." in capsys.readouterr().err


def test_without_halting_there_are_no_steps_to_report(text_file, tmp_path, capsys):
    folder = train(tmp_path / "run", text_file, "universal_transformer", "--max_steps", "1", "--model.halting", "none")
    assert "ponder_time" not in report_of(folder)["validation"]
    assert "Steps per token" not in (folder / "README.md").read_text("utf-8")
    assert "ponder_time" not in evaluate(folder, text_file, capsys, "--num_steps", "3")


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(text_file, tmp_path):
    schedule = ("--lr_scheduler_type", "constant", "--warmup_steps", "0")
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    train(parts, text_file, "universal_transformer", "--max_steps", "2", *schedule)
    train(parts, text_file, "universal_transformer", "--max_steps", "4", *schedule, "--resume")
    train(whole, text_file, "universal_transformer", "--max_steps", "4", *schedule)
    losses = [
        [entry["loss"] for entry in report_of(folder)["history"] if "loss" in entry] for folder in (parts, whole)
    ]
    assert losses[0] == losses[1]
    assert report_of(parts)["validation"] == report_of(whole)["validation"]


def test_starter_settings_train(text_file, tmp_path):
    """With nothing given but the text and how long."""
    for architecture in SMALL:
        arguments = ["train", "--architecture", architecture, "--text", str(text_file), "--max_steps", "1"]
        folder = tmp_path / architecture
        flags = ["--output_dir", str(folder), "--use_cpu", "--logging_steps", "1", "--disable_tqdm", "true"]
        assert main([*arguments, *flags, "--per_device_train_batch_size", "1", "--segment_length", "16"]) == 0
        assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 256
