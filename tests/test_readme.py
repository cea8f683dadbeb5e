"""README tells the truth: its programs run, its commands exist, its paths are there."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from golden_utils import golden_cases

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
LINES = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
TREE = next(text for language, text in BLOCKS if not language and text.startswith("hf_efficient/"))


def lines_with(beginning: str) -> list[str]:
    """Command lines of README that begin so, without their comments; there must be some."""
    found = [shlex.join(shlex.split(line, comments=True)) for line in LINES if line.startswith(beginning)]
    assert found, beginning
    return found


def program_with(words: str) -> str:
    """The one program of README that has these words."""
    (found,) = (program for program in PROGRAMS if words in program)
    return found


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run a command in a folder, in the tests' environment; its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    finished = subprocess.run(
        command, cwd=folder, env=environment | variables, check=False, capture_output=True, text=True, timeout=280
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# Words of the programs that tests below run.
RUN = (
    *("create_cache", "windowed_lsh", "UniversalTransformer", "judge", "PairTrainer(", "# train.py"),
    "transfo-xl-checkpoint",
)


def test_every_program_is_run():
    assert [program for program in PROGRAMS if not any(words in program for words in RUN)] == []


@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_program_parses(index):
    ast.parse(PROGRAMS[index])


def test_first_program_prints_what_its_comment_says(capsys):
    program = program_with("create_cache")
    exec(compile(program, "README.md", "exec"), {})
    promised = re.search(r"# (\d+) tokens read, (\d+) remembered", program).groups()
    assert tuple(capsys.readouterr().out.split()) == promised


def test_reformer_program_prints_what_its_comment_says(capsys):
    program = program_with("windowed_lsh")
    exec(compile(program, "README.md", "exec"), {})
    num_layers, shape = re.search(r"# (\d+) layers, logits of (\(.*\))", program).groups()
    assert capsys.readouterr().out == f"{num_layers} {shape}\n"


def test_universal_transformer_program_prints_what_its_comment_says(capsys):
    program = program_with("UniversalTransformer")
    exec(compile(program, "README.md", "exec"), {})
    num_blocks, shape = re.search(r"# (\d+) block, .* for tokens (\(.*\))", program).groups()
    assert capsys.readouterr().out == f"{num_blocks} {shape}\n"


def test_evolved_transformer_program_prints_what_its_comment_says(capsys):
    program = program_with("judge")
    exec(compile(program, "README.md", "exec"), {})
    num_answers, shape = re.search(r"# (\d+) answers, scores of (\(.*\))", program).groups()
    assert capsys.readouterr().out == f"{num_answers} {shape}\n"


def test_training_program_runs_in_one_process_and_in_two(tmp_path):
    (tmp_path / "train.py").write_text(program_with("# train.py"), "utf-8")
    run([sys.executable, "train.py"], tmp_path)
    assert (tmp_path / "runs" / "mine" / "model.safetensors").is_file()

    shutil.rmtree(tmp_path / "runs")
    words = shlex.split(lines_with("ACCELERATE_USE_CPU")[0])
    variables = dict(word.split("=") for word in words if "=" in word)
    run([word for word in words if "=" not in word], tmp_path, **variables)
    assert (tmp_path / "runs" / "mine" / "model.safetensors").is_file()


def test_translation_program_trains_and_measures(tmp_path, monkeypatch, capsys):
    """Shortened to two updates on a few sentences."""
    for part in ("train", "test"):
        for language, word in (("en", "dog"), ("de", "Hund")):
            lines = (f"{word} {number}\n" for number in range(20))
            (tmp_path / f"{part}.{language}").write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    program = program_with("PairTrainer(").replace("max_steps=2000", "max_steps=2, use_cpu=True, disable_tqdm=True")
    exec(compile(program.replace("vocab_size=8000", "vocab_size=280"), "README.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 100


def test_legacy_checkpoint_loads_as_shown(tmp_path, monkeypatch):
    case = next(case for case in golden_cases("hf_transfoxl") if (case / "model.safetensors").exists())
    shutil.copytree(case, tmp_path / "transfo-xl-checkpoint")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(program_with("transfo-xl-checkpoint"), "README.md", "exec"), names)
    assert names["model"].config.memory_init == "zeros"


@pytest.mark.parametrize("line", lines_with("make "))
def test_make_target_is_there(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("line", lines_with("hf-efficient "))
def test_command_line_is_understood(line, monkeypatch):
    from hf_efficient.cli.arguments import CommandParser

    monkeypatch.chdir(ROOT)
    _, name, *arguments = shlex.split(line)
    CommandParser(import_module(f"hf_efficient.cli.{name}").COMMAND).read(arguments)


def test_tree_is_the_repository_s():
    folders, missing = [], []
    for line in TREE.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        if not (ROOT / "".join(folders)).exists():
            missing.append("".join(folders))
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_tables_are_there(document):
    """A path in backquotes that begins with a folder of ours must exist, from the root or from the package."""
    named = re.findall(
        r"`((?:models|ops|data|training|conversion|hub|cli|tests|docs|benchmarks|examples|notebooks)/[\w./]*)`",
        document.read_text("utf-8"),
    )
    places = (ROOT, ROOT / "hf_efficient")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_paper_index_has_every_recipe():
    recipes = {path.name for path in (ROOT / "examples").glob("*.yaml")}
    index = (ROOT / "docs" / "paper_index.md").read_text("utf-8")
    assert set(re.findall(r"`(\w+\.yaml)`", index)) == recipes
