"""The main job in small: everything that `make demo` leaves behind."""

import json

import pytest
from huggingface_hub import ModelCard

from hf_efficient.cli import demo
from hf_efficient.cli.__main__ import main
from hf_efficient.cli.errors import CommandError

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "mem_len": 64}


def test_demo_leaves_everything_and_may_be_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.RECIPE, "model", SMALL)
    monkeypatch.setattr(demo, "MEMORY_LENGTHS", (0, 64))
    folder = tmp_path / "runs" / "demo"
    assert main(["demo", "--output", str(folder), "--steps", "20"]) == 0
    assert {path.name for path in folder.iterdir()} == demo.FILES
    report = json.loads((folder / "report.json").read_text("utf-8"))
    for name in ("bits_per_byte_with_memory", "bits_per_byte_without_memory", "tokens_per_second", "peak_memory_mb"):
        assert report[name] > 0
    assert report["train_tokens"] == 20 * demo.RECIPE["per_device_train_batch_size"] * demo.RECIPE["segment_length"]
    assert report["bits_per_byte_with_memory"] == pytest.approx(report["validation"]["bits_per_byte"], rel=1e-5)
    assert report["sample"].startswith(demo.PROMPT)
    assert report["sample"] in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert "memory.png" in card.text
    demo.clear_earlier_demo(folder)
    assert list(folder.iterdir()) == []


def test_full_recipe_is_a_legal_training(tmp_path):
    from hf_efficient.cli.arguments import CommandParser
    from hf_efficient.cli.recipes import recipe_to_flags
    from hf_efficient.cli.train import COMMAND

    invocation = CommandParser(COMMAND).read([*recipe_to_flags(demo.RECIPE), "--output_dir", str(tmp_path)])
    assert invocation.model_settings == demo.RECIPE["model"]
    assert demo.RECIPE["model"]["mem_len"] in demo.MEMORY_LENGTHS


@pytest.mark.parametrize("names", [["notes.txt"], ["report.json", "notes.txt"], ["README.md"]])
def test_only_an_earlier_demo_is_cleared(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(CommandError, match="not from a demo"):
        demo.clear_earlier_demo(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
