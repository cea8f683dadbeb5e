"""The documents that a reader may copy from, and the code in them."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES, ROOT / "benchmarks" / "README.md", ROOT / "examples" / "README.md"]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> Iterator[list[str]]:
    """The words of every command in a document's bash blocks: lines joined, comments and variables left out."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"\s&&\s", line):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words


TEXTS = ("my.txt", "other.txt", "held_out.txt")
PAIRS = {"train": 100, "val": 4, "test": 4}


def prepare(folder: Path) -> None:
    """Put there what commands on the pages name: texts, the recipes, a checkpoint of the original release."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for name in TEXTS:
        (folder / name).write_text(text, "utf-8")
    words = re.findall(r"[a-z]+", text)
    sentences = [" ".join(words[start : start + 5]) for start in range(0, 500, 5)]
    for part, number in PAIRS.items():
        (folder / f"{part}.en").write_text("\n".join(sentences[:number]), "utf-8")
        (folder / f"{part}.de").write_text("\n".join(sentence[::-1] for sentence in sentences[:number]), "utf-8")
    talks = [json.dumps({"turns": sentences[start : start + 4]}) for start in range(97)]
    (folder / "talks.jsonl").write_text("\n".join(talks), "utf-8")
    (folder / "examples").symlink_to(ROOT / "examples")
    checkpoint = folder / "LM-TFM-wt103" / "model.pt"
    checkpoint.parent.mkdir()
    shutil.copy(ROOT / "tests" / "fixtures" / "kimiyoung_xl" / "plain" / "model.pt", checkpoint)


def cheap(words: list[str]) -> list[str]:
    """A command of `hf-efficient` with as little work as it can have; flags that come last win."""
    flags = {
        "train": [
            "--max_steps",
            "2",
            "--save_strategy",
            "no",
            "--logging_steps",
            "1",
            "--use_cpu",
            "--disable_tqdm=true",
        ],
        "generate": ["--max_new_tokens", "3", "--device", "cpu"],
        "evaluate": ["--device", "cpu"],
        "publish": ["--dry_run"],
    }
    return [*words, *flags.get(words[0], [])]
