"""Every recipe in examples/ is a legal training of the published size, and every command in it parses."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_efficient.cli.__main__ import main
from hf_efficient.cli.arguments import CommandParser
from hf_efficient.cli.models import build_config
from hf_efficient.cli.recipes import read_recipe
from hf_efficient.cli.report import plain
from hf_efficient.cli.train_pairs import apply_schedule

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))
# Parameters in millions (paper, tables 1, 2, 3 and 5).
PUBLISHED_SIZES = {
    "transformer_xl_enwik8_base": 41,
    "transformer_xl_enwik8_large": 277,
    "transformer_xl_text8_large": 277,
    "transformer_xl_wikitext103_base": 151,
    "transformer_xl_wikitext103_large": 285,  # the paper says 257, but its own script's sizes and vocabulary give 285
    "transformer_xl_ptb": 24,
    # So et al. 2019, table 4, and tensor2tensor's own count
    "evolved_transformer_translation_tiny": 7.3,
    "evolved_transformer_translation_base": 64.3,
    "evolved_transformer_translation_big": 222.2,
}
VOCABULARIES = {"translation": 33_708, "enwik8": 204, "text8": 27, "wikitext103": 267_735, "ptb": 10_000}


class Vocabulary:
    """As much of a tokenizer as a configuration needs."""

    bos_token_id, eos_token_id, pad_token_id = None, 0, 1

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


def parse(arguments):
    command = import_module(f"hf_efficient.cli.{arguments[0]}").COMMAND
    return CommandParser(command).read(arguments[1:])


def commands_in(text):
    """The `hf-efficient` command lines in a recipe's comments or a page's code blocks, line continuations joined."""
    text = re.sub(r"\\\n#?\s*", "", text)
    return [
        shlex.split(line, comments=True)[1:] for line in re.findall(r"^#?\s*(hf-efficient .*)$", text, re.MULTILINE)
    ]


def config_of(path, vocab_size):
    for_pairs = "task" in read_recipe(path)
    text = [] if for_pairs else ["--text", "any.txt"]
    invocation = parse(["train", str(path), *text, "--output_dir", "runs/test"])
    options, _ = invocation.options
    return build_config(options.architecture, invocation.model_settings, Vocabulary(vocab_size), for_pairs)


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} > set(PUBLISHED_SIZES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_a_legal_training(path):
    config = config_of(path, 300_000)
    for name, value in read_recipe(path)["model"].items():
        assert plain({name: getattr(config, name)}) == {name: value}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED_SIZES.items())
def test_recipe_has_the_published_size(name, millions):
    corpus = name.split("_")[2]
    config = config_of(EXAMPLES / f"{name}.yaml", VOCABULARIES[corpus])
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("path", [*RECIPES, EXAMPLES / "README.md"], ids=lambda path: path.name)
def test_commands_in_comments_parse(path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    commands = commands_in(path.read_text("utf-8"))
    assert commands
    for arguments in commands:
        parse(arguments)


def test_values_of_published_recipes_name_their_source():
    for path in RECIPES:
        if not re.search("authors' release|tensor2tensor 1.15.7", path.read_text("utf-8")):
            continue
        settings = re.findall(r"^ *[a-z]\w*: .+$", path.read_text("utf-8"), re.MULTILINE)
        own = ("architecture", "weight_decay", "save_steps", "eval_strategy", "logging_steps")
        own += ("task", "source_text", "target_text", "validation_")
        assert [line for line in settings if "#" not in line and not line.startswith(own)] == []


@pytest.mark.parametrize("size", ["tiny", "base", "big"])
def test_schedules_of_translation_recipes(size):
    """Warm-up to 2 (d w)^-1/2, as tensor2tensor's; the smallest begins at the peak."""
    path = EXAMPLES / f"evolved_transformer_translation_{size}.yaml"
    invocation = parse(["train", str(path), "--output_dir", "runs/test", "--use_cpu"])
    options, args = invocation.options
    config = config_of(path, 33_708)
    apply_schedule(options, args, config.hidden_size, invocation.given)
    assert args.learning_rate == pytest.approx(2 * (config.hidden_size * 8000) ** -0.5)
    assert (args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.997, 1e-9, 0)
    assert args.warmup_steps == (0 if size == "tiny" else 8000)


def test_quick_recipe_runs_on_a_text_of_ones_own(tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("A sentence that a model can learn by heart.\n" * 300, encoding="utf-8")
    small = ["--max_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu"]
    recipe, folder = str(EXAMPLES / "quick_cpu.yaml"), tmp_path / "run"
    assert main(["train", recipe, "--text", str(text), "--output_dir", str(folder), *small]) == 0
    assert (folder / "model.safetensors").is_file()


def run_script(name, folder, *flags):
    """What a script of the examples prints, run in a process of its own in `folder`."""
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *flags],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_duplication_script_trains_and_measures(tmp_path):
    printed = run_script("reformer_duplication.py", tmp_path, "--num_symbols", "15", "--max_steps", "2")
    figures = re.findall(r"(?:rounds|attention) +([\d.]+)%$", printed, re.MULTILINE)
    assert len(figures) == 9
    assert all(0 <= float(figure) < 20 for figure in figures)


def test_classification_script_trains_and_measures(tmp_path):
    documents = [{"text": ("yes " if label else "no ") * (5 + number), "label": label}
                 for number in range(20) for label in (0, 1)]  # fmt: skip
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    flags = ["--data", "documents.jsonl", "--max_length", "100", "--max_steps", "2", "--batch_size", "4"]
    printed = run_script("reformer_long_document_classification.py", tmp_path, *flags)
    assert re.search(r"Accuracy on 4 held-out documents: \d+\.\d\d%", printed)
    assert (tmp_path / "runs/classification/model.safetensors").is_file()
