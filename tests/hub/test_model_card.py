"""Cards hold what was measured, in metadata that the Hub accepts."""

import json
from pathlib import Path

import pytest
import yaml
from hub.published_models import REPORT as ANY_REPORT
from huggingface_hub import ModelCard

from hf_efficient.hub import write_model_card
from hf_efficient.hub.model_card import adapt_usage, describe_text

REPORT = {"architecture": "transformer_xl"} | ANY_REPORT


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    write_report(folder, REPORT)
    return folder


def write_report(folder, report):
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def test_metadata_is_what_the_hub_expects(run_folder):
    path = write_model_card(run_folder, license="mit")
    assert path == run_folder / "README.md"
    card = ModelCard.load(path)
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert {"transformer-xl", "arxiv:1901.02860"} <= set(data.tags)
    assert data.model_name == "my-model"
    results = {result.metric_type: result for result in data.eval_results}
    assert results["perplexity"].metric_value == 12.1825
    assert results["bits_per_byte"].metric_value == 1.8034
    assert {result.dataset_name for result in results.values()} == {"held_out.txt"}
    header = yaml.safe_load(path.read_text("utf-8").split("---")[1])
    assert header["model-index"][0]["name"] == "my-model"


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (["python-docs"], None, (["en"], None)),
        (["Salesforce/wikitext"], None, (["en"], ["Salesforce/wikitext"])),
        (["someone/poems", "data/mine.txt"], ["de", "fr"], (["de", "fr"], ["someone/poems"])),
        (["/home/me/my.txt"], "de", ("de", None)),
        (["/home/me/my.txt"], None, (None, None)),
    ],
)
def test_language_and_datasets(run_folder, text, language, expected):
    write_report(run_folder, REPORT | {"data": REPORT["data"] | {"text": text}})
    data = ModelCard.load(write_model_card(run_folder, language=language)).data
    assert (data.language, data.datasets) == expected


def test_text_that_lies_here_is_no_dataset(run_folder, monkeypatch):
    (run_folder / "data" / "poems").mkdir(parents=True)
    monkeypatch.chdir(run_folder)
    write_report(run_folder, REPORT | {"data": REPORT["data"] | {"text": ["data/poems"]}})
    assert ModelCard.load(write_model_card(run_folder)).data.datasets is None


CARD = """\
# old
from_pretrained("old")
## How to use it
```python
import hf_efficient  # registers the architecture with the Auto classes
model = AutoModel.from_pretrained("old")
tokenizer = AutoTokenizer.from_pretrained("old")
other = AutoModel.from_pretrained("another")
```
`hf-efficient generate old --interactive` talks with it.
## More
model = AutoModel.from_pretrained("old")
"""


def test_program_with_the_name_on_the_hub():
    """Only the program of its section changes, and there only the model's own name."""
    before, program, after = CARD.partition("## How to use it")[0], CARD.split("## ")[1], CARD.partition("## More")[2]
    without = adapt_usage(CARD, "me/new", with_code=False)
    assert (
        without
        == before + "## " + program.replace('"old"', '"me/new"').replace(" old ", " me/new ") + "## More" + after
    )
    with_code = adapt_usage(CARD, "me/new", with_code=True)
    assert with_code.count('from_pretrained("me/new", trust_remote_code=True)') == 2
    assert "import hf_efficient" not in with_code
    assert adapt_usage(adapt_usage(CARD, "me/new", False), "me/newer", True) == adapt_usage(CARD, "me/newer", True)
    for card in ("# old\n", CARD.replace("## How", "## Where"), CARD.replace("model = ", "net = ")):
        assert adapt_usage(card, "me/new", with_code=True) == card


def test_text_holds_results_settings_command_and_limits(run_folder):
    text = write_model_card(run_folder).read_text("utf-8")
    for part in (
        "1,234,567 parameters",
        "| Bits per byte | 1.8034 |",
        "| Perplexity per token | 12.18 |",
        "with a memory of 32",
        "| `model.mem_len` | 32 |",
        "A processor, 2 threads",
        REPORT["command"],
        "AutoModelForCausalLM.from_pretrained",
        "## Limits",
    ):
        assert part in text, part
    assert "/home/me" not in text.split("```bash")[0]
    assert ".png" not in text
    assert "{{" not in text
    assert "{%" not in text


def test_pictures_sample_and_memory_results_when_there_are_any(run_folder):
    (run_folder / "loss.png").touch()
    (run_folder / "memory.png").touch()
    write_report(run_folder, REPORT | {"bits_per_byte_without_memory": 2.25, "sample": "The\n```\nend"})
    text = write_model_card(run_folder).read_text("utf-8")
    assert "](loss.png)" in text
    assert "](memory.png)" in text
    assert "| Bits per byte, memory off | 2.2500 |" in text
    assert "````text\nThe\n```\nend\n````" in text


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ([], []),
        ([500], []),
        ([1000, 1000], []),
        ([500, 1000], [500, 1000]),
        (range(10, 260, 10), range(10, 260, 30)),  # 25 of them
    ],
)
def test_course_of_the_validation(run_folder, steps, shown):
    history = [{"step": 5, "loss": 9.0}]
    history += [
        {"step": step, "eval_loss": 2.5, "eval_perplexity": 12.1825, "eval_bits_per_byte": step / 100}
        for step in steps
    ]
    write_report(run_folder, REPORT | {"history": history})
    text = write_model_card(run_folder).read_text("utf-8")
    lines = [f"| {step:,} | 2.5000 | 12.18 | {step / 100:.4f} |" for step in shown]
    assert ("While training" in text) is bool(lines)
    header = "| Updates | Loss (nats per token) | Perplexity per token | Bits per byte |\n|---|---|---|---|\n"
    assert not lines or header + "\n".join(lines) + "\n\n## How to use it" in text


def test_program_loads_the_folder_from_where_it_was_trained(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder.parents[1])
    path = write_model_card(Path(run_folder.parent.name, run_folder.name))
    text = path.read_text("utf-8")
    assert text.count(f'from_pretrained("{run_folder.parent.name}/my-model")') == 2
    assert ModelCard.load(path).data.model_name == "my-model"
    published = adapt_usage(text, "me/new", with_code=True)
    assert published.count('from_pretrained("me/new", trust_remote_code=True)') == 2
    assert run_folder.parent.name not in published


@pytest.mark.parametrize(("architecture", "expected"), [("reformer", True), ("act_rnn", False)])
def test_tag_of_architectures_for_long_texts(run_folder, architecture, expected):
    write_report(run_folder, REPORT | {"architecture": architecture})
    assert ("long-context" in ModelCard.load(write_model_card(run_folder)).data.tags) is expected


@pytest.mark.parametrize(
    ("pretrained", "words", "base"),
    [("me/whale", "me/whale", "me/whale"), ("/home/me/runs/first", "first", None)],
)
def test_run_that_began_with_weights(run_folder, pretrained, words, base):
    settings = REPORT["settings"] | {"pretrained": pretrained}
    write_report(run_folder, REPORT | {"pretrained": pretrained, "resumed_at": 1500, "settings": settings})
    card = ModelCard.load(write_model_card(run_folder))
    assert card.data.base_model == base
    assert f"trained further from the weights of {words} on " in card.text
    assert " s since update 1,500, " in card.text
    assert "/home/me" not in card.text.split("```bash")[0]
    assert "from scratch" not in card.text


def test_course_of_the_steps(run_folder):
    history = [{"step": step, "eval_loss": 2.5, "eval_ponder_time": step / 4} for step in (5, 10)]
    write_report(run_folder, REPORT | {"history": history})
    text = write_model_card(run_folder).read_text("utf-8")
    assert "| Updates | Loss (nats per token) | Steps per token |" in text
    assert "| 10 | 2.5000 | 2.50 |" in text


def test_reformer_card_names_its_paper_and_the_leak_of_its_layers(run_folder):
    validation = {name: value for name, value in REPORT["validation"].items() if name != "mem_len"}
    write_report(run_folder, REPORT | {"architecture": "reformer", "validation": validation})
    for layers, leaks in ((["local", "windowed_lsh"], False), (["local", "lsh"], True)):
        (run_folder / "config.json").write_text(json.dumps({"attn_layers": layers}), encoding="utf-8")
        text = write_model_card(run_folder).read_text("utf-8")
        assert ("not quite causal" in text) is leaks
        assert "2001.04451" in text
        assert " memory of " not in text.split("## Results")[1].split("##")[0]


@pytest.mark.parametrize(
    ("architecture", "words"),
    [("evolved_transformer", "An Evolved Transformer language model"), ("act_rnn", "A recurrent language model")],
)
def test_first_sentence(run_folder, architecture, words):
    write_report(run_folder, REPORT | {"architecture": architecture})
    assert f"\n{words} (" in write_model_card(run_folder).read_text("utf-8")


def test_run_without_validation(run_folder):
    write_report(run_folder, {name: value for name, value in REPORT.items() if name != "validation"})
    path = write_model_card(run_folder)
    assert "no validation text" in path.read_text("utf-8")
    assert ModelCard.load(path).data.eval_results is None


def test_settings_that_would_break_the_table(run_folder):
    write_report(run_folder, REPORT | {"settings": {"text": ["a|b.txt"], "lr_scheduler_kwargs": {"a": 1}}})
    assert "a\\|b.txt" in write_model_card(run_folder).read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FileNotFoundError, "holds no report.json"),
        ("{", ValueError, "is no JSON"),
        ('{"architecture": "transformer_xl"}', ValueError, "did not finish"),
        (json.dumps(REPORT | {"architecture": "lstm"}), ValueError, "lstm"),
    ],
)
def test_unfinished_or_damaged_run(tmp_path, content, error, words):
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(error, match=words):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (["python-docs"], "python-docs"),
        (["/home/me/books/a.txt", "b/c.txt"], "a.txt, c.txt"),
        (["Salesforce/wikitext"], "Salesforce/wikitext"),
        (["data/novel/train.txt"], "novel/train.txt"),
        (["/home/me/train.txt", "train.txt"], "train.txt, train.txt"),
    ],
)
def test_describe_text(source, name):
    assert describe_text(source) == name
