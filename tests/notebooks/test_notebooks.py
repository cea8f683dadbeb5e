"""Notebooks run, tell what they promise, and hold the outputs of a run."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_efficient.data import generate_phrases

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 590  # two or three minutes where nothing else runs
pytestmark = pytest.mark.timeout(SECONDS + 10)
# Jupyter is not needed to run a notebook's code; of IPython the notebooks use only this.
STUB = """
import sys, types
display = types.ModuleType("IPython.display")
class Image:
    def __init__(self, path, width=None):
        assert open(path, "rb").read(8) == b"\\x89PNG\\r\\n\\x1a\\n"
        print("picture", path)
display.Image = Image
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].version_info = (9, 0)  # matplotlib asks
sys.modules["IPython.display"] = display
"""


def read(path):
    """A notebook's cells."""
    return json.loads(path.read_text("utf-8"))["cells"]


def code_of(path):
    """The sources of the code cells, in order."""
    return ["".join(cell["source"]) for cell in read(path) if cell["cell_type"] == "code"]


def num_pictures(path):
    """How many pictures a notebook shows, of which there are at least two."""
    count = len(re.findall(r"^Image\(", "\n".join(code_of(path)), re.MULTILINE))
    assert count >= 2
    return count


def run(path, folder, updates=None, **environment):
    """Run a notebook's code in a process of its own, training for `updates` steps; what it printed.

    environment: variables that it finds set.
    """
    program = "\n".join([STUB, *code_of(path)])
    if updates is not None:
        program, count = re.subn(r"^UPDATES = \d+$", f"UPDATES = {updates}", program, flags=re.MULTILINE)
        assert count == 1
    (folder / "notebook.py").write_text(program, "utf-8")
    finished = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_with_a_short_training(path, tmp_path):
    printed = run(path, tmp_path, updates=2)
    assert len(re.findall(r"^picture \w+\.png$", printed, re.MULTILINE)) == num_pictures(path)


@pytest.mark.slow
def test_universal_transformer_learns_the_puzzle_and_thinks_longer_about_far_boxes(tmp_path):
    printed = run(FOLDER / "universal_transformer.ipynb", tmp_path)
    rows = re.findall(r"^ +(\d) +\d+ +([\d.]+)% +([\d.]+)$", printed, re.MULTILINE)
    assert [int(distance) for distance, _, _ in rows] == list(range(7))
    assert min(float(accuracy) for _, accuracy, _ in rows) > 90
    steps = [float(number) for _, _, number in rows]
    assert steps[0] + 1 < steps[2] < steps[5]


@pytest.mark.slow
def test_transformer_xl_reads_better_with_a_memory_and_reaches_as_far_as_its_layers_together(tmp_path):
    printed = run(FOLDER / "transformer_xl.ipynb", tmp_path)
    lengths = [int(number) for number in re.search(r"^memory +(\d.*)$", printed, re.MULTILINE)[1].split()]
    values = re.search(r"^perplexity +(.*)$", printed, re.MULTILINE)[1].split()
    perplexity = dict(zip(lengths, map(float, values), strict=True))
    assert perplexity[0] > perplexity[4] > perplexity[32]
    assert perplexity[64] < 0.85 * perplexity[0]
    assert perplexity[64] < 70
    reach = re.findall(r"^memory (\d+): a change is felt up to (\d+) tokens later", printed, re.MULTILINE)
    assert [(int(length), int(far)) for length, far in reach] == [(16, 45), (32, 93), (64, 189)]


@pytest.mark.slow
def test_reformer_solves_the_task_and_finds_more_with_more_rounds(tmp_path):
    printed = run(FOLDER / "reformer.ipynb", tmp_path)
    assert "equal to the formula: True" in printed
    rows = re.findall(r"^(\w+) +(\d) +accuracy +([\d.]+)% +recall +([\d.]+)%$", printed, re.MULTILINE)
    accuracy = {(kind, int(rounds)): float(value) for kind, rounds, value, _ in rows}
    assert min(accuracy["lsh", 4], accuracy["windowed_lsh", 8]) > 97
    for wanted in ("lsh", "windowed_lsh"):
        recall = [float(value) for kind, _, _, value in rows if kind == wanted]
        assert len(recall) == 4
        assert recall == sorted(recall)
    kept = [float(value) for value in re.search(r"^reversible +(.*) MB$", printed, re.MULTILINE)[1].split()]
    assert max(kept) < 1.1 * min(kept)


@pytest.mark.slow
def test_fine_tuning_is_worth_it_and_a_stranger_can_use_what_came_out(tmp_path):
    printed = run(FOLDER / "fine_tuning.ipynb", tmp_path)
    course = [float(loss) for loss in re.findall(r"^update +\d+: loss ([\d.]+)", printed, re.MULTILINE)]
    assert len(course) == 5
    assert course[-1] < course[0] - 1.5
    adapted, scratch = (
        float(re.search(rf"^{name}: loss ([\d.]+)", printed, re.MULTILINE)[1])
        for name in ("LoRA", "from random weights")
    )
    assert course[-1] + 0.1 < adapted < course[0] - 1
    assert course[-1] + 0.1 < scratch
    assert float(re.search(r"differs from model and adapter by (\S+)", printed)[1]) < 1e-4
    card = ModelCard.load(tmp_path / "downloaded" / "README.md")
    assert [result.metric_type for result in card.data.eval_results] == ["perplexity"]
    assert card.data.eval_results[0].metric_value == pytest.approx(math.exp(course[-1]), rel=0.02)
    assert "inputs = tokenizer('def is_empty(self):" in card.text
    assert "checkpoint-220/" in printed.partition("Stays here:")[2]
    assert "TransformerXLForCausalLM from transformers_modules\nhf_efficient was imported: False" in printed


def test_translation_reads_pairs_from_a_folder(tmp_path):
    pairs = generate_phrases(90, seed=7)
    for split, places in {"train": range(60), "val": range(60, 90)}.items():
        for language, side in (("en", "source"), ("de", "target")):
            text = "".join(f"{line}\n" for line in pairs.select(places)[side])
            (tmp_path / f"{split}.{language}").write_text(text, "utf-8")
    printed = run(FOLDER / "translation.ipynb", tmp_path, updates=2, PARALLEL_TEXTS=str(tmp_path))
    assert f"{pairs[60]['source']}\n    {pairs[60]['target']}\n" in printed
    assert "of 30 are those of the corpus" in printed


@pytest.mark.slow
def test_translation_learns_the_grammar(tmp_path):
    printed = run(FOLDER / "translation.ipynb", tmp_path)
    scores = [float(score) for score in re.findall(r"BLEU +([\d.]+)$", printed, re.MULTILINE)]
    assert len(scores) == 5
    assert scores[-1] > 85
    assert "the same without a cache: True" in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_one_run_from_top_to_bottom(path):
    cells = [cell for cell in read(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert set(kinds) <= {"stream", "execute_result"}
    pictures = [output["data"]["image/png"] for cell in cells for output in cell["outputs"] if "data" in output]
    assert len(pictures) == num_pictures(path)
    assert path.stat().st_size < 300_000
    printed = "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])
    paths = re.findall(r"(?<!\w)/\w[\w.-]*/\w+|[A-Z]:\\\w+", re.sub(r"https?://\S+", "", printed))
    assert not paths, "outputs show a path of the machine they were made on"
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_needs_nothing_but_python(path):
    """No magics or shell commands, so that the cells are also a program."""
    for source in code_of(path):
        ast.parse(source)
