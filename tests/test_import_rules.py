"""Who may import whom, and what may stand where: docs/architecture.md as a test.

The rules are read from the syntax tree, so an import inside a function, a `try` or `if TYPE_CHECKING` counts like any
other: transformers' copier sees those too.
"""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_efficient"

TOP_LEVEL_FILES = {
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"),
    *("setup.py", "pyproject.toml", "constraints.txt", "MANIFEST.in", "Makefile", ".gitignore"),
}
TOP_LEVEL_FOLDERS = {
    "hf_efficient",
    "tests",
    "benchmarks",
    "examples",
    "notebooks",
    "model_cards",
    "docs",
    ".ci",
}
ROOMS = {"models", "ops", "data", "training", "generation", "conversion", "hub", "cli"}
PACKAGE_FILES = {"__init__.py", "plots.py", "py.typed"}

# Third-party packages each room may import, beside the standard library and torch.
LIBRARIES = {
    "": set(),
    "models": {"transformers", "huggingface_hub", "tokenizers"},
    "ops": set(),
    "data": {"datasets", "numpy", "pyarrow", "tokenizers", "transformers"},
    "training": {"accelerate", "numpy", "sacrebleu", "safetensors", "tqdm", "transformers"},
    "generation": {"transformers"},
    "conversion": {"huggingface_hub", "safetensors", "tokenizers", "transformers"},
    "hub": {"huggingface_hub", "safetensors", "transformers"},
    "plots": {"matplotlib", "numpy"},
    "cli": {"accelerate", "datasets", "huggingface_hub", "tokenizers", "tqdm", "transformers", "yaml"},
}
# Packages that are not always there: imported inside `try`, which transformers' check for missing packages leaves out.
OPTIONAL = {"models": {"sacremoses"}}
# Rooms of this package each room may import from, beside itself. The others take public names of everything.
NEIGHBOURS = {
    "": {"models"},
    "data": set(),
    "training": {"data"},
    "generation": {"data"},
    "conversion": {"models"},
    "hub": {"models"},
    "plots": set(),
}
USERS = {"cli", "benchmarks", "examples", "notebooks"}

# What transformers follows when it copies a model's code beside a checkpoint: a regular expression over
# lines, docstrings included (dynamic_module_utils.get_relative_imports).
COPIER = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)")


@dataclass(frozen=True)
class Import:
    """One import: `module` is absolute, `names` empty for `import module`, `level` the number of dots.

    `guarded` says that it stands in a `try` which goes on where the import fails.
    """

    module: str
    names: tuple[str, ...]
    level: int
    line: int
    guarded: bool = False


def read_imports(path: str, tree: ast.AST) -> list[Import]:
    """All imports of a file whose `path` is relative to the repository root, relative ones resolved."""
    package = Path(path).parent.parts
    guarded = guarded_lines(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, (), 0, node.lineno, node.lineno in guarded) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = tuple(alias.name for alias in node.names)
            found.append(Import(module, names, node.level, node.lineno, node.lineno in guarded))
    return found


def guarded_lines(tree: ast.AST) -> set[int]:
    """Lines of the bodies of all `try: … except ImportError`."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(getattr(h.type, "id", "") == "ImportError" for h in node.handlers):
            lines.update(range(node.lineno, node.body[-1].end_lineno + 1))
    return lines


def room_of(path: str) -> str:
    """The room a file stands in: a part of hf_efficient ("" for its __init__) or a top-level folder."""
    parts = Path(path).parts
    if parts[0] != PACKAGE:
        return parts[0]
    if len(parts) == 2:
        return "" if parts[1] == "__init__.py" else Path(parts[1]).stem
    return parts[1]


def check_library(room: str, imported: Import) -> str | None:
    """Why `room` may not import this package from outside, or None."""
    top = imported.module.split(".")[0]
    if top in sys.stdlib_module_names or top == "torch" or room not in LIBRARIES or top in LIBRARIES[room]:
        return None
    if top not in OPTIONAL.get(room, ()):
        return f"{top} is not among the libraries of {room or PACKAGE}"
    return None if imported.guarded else f"{top} is optional: import it inside `try: … except ImportError`"


def check_model_import(path: str, imported: Import) -> str | None:
    """Inside an architecture's folder only `from .sibling import name` survives the way to the Hub."""
    if Path(path).parts[1:] == ("models", "__init__.py"):
        return None if imported.module.startswith(f"{PACKAGE}.models.") else "only architectures belong here"
    folder = ".".join(Path(path).parent.parts)
    inside = imported.module.startswith(folder + ".")
    if imported.level != 1 or not inside or "." in imported.module.removeprefix(folder + "."):
        return "an architecture imports its own files only, as `from .sibling import name`"
    return None


def check_own_import(path: str, imported: Import) -> str | None:
    """Why the file may not import this module of hf_efficient, or None."""
    room, parts = room_of(path), imported.module.split(".")
    target = parts[1] if len(parts) > 1 else ""
    if any(part.endswith("_reference") for part in (*parts, *imported.names)):
        return "reference implementations are for tests only"
    if room == "models":
        return check_model_import(path, imported)
    if target == room:
        return None
    if room == "ops":
        stem = parts[-1]
        operation = target == "models" and len(parts) == 4
        if not operation or stem.startswith(("modeling_", "configuration_", "cache_", "tokenization_")):
            return "ops re-exports operation files of models/<architecture>/"
        return None
    if room in USERS:
        private = any(name.startswith("_") and not name.startswith("__") for name in imported.names)
        return "only public names may be used here" if private or len(parts) > 2 or not imported.names else None
    return None if target in NEIGHBOURS[room] else f"{room or PACKAGE} may not import {imported.module}"


def check_text(path: str, source: str, imports: list[Import]) -> list[str]:
    """Rules about lines rather than about imports."""
    problems, name = [], Path(path).name
    if room_of(path) == "models":
        real = {imported.line for imported in imports if imported.level}
        for number, line in enumerate(source.splitlines(), start=1):
            if COPIER.match(line) and number not in real:
                problems.append(f"{path}:{number}: transformers' copier takes this line for an import")
    if name.startswith("configuration_") and any(i.module == "__future__" for i in imports):
        problems.append(f"{path}: `from __future__ import annotations` switches @strict's type checks off")
    return problems


def violations(path: str, source: str) -> list[str]:
    """Every breach of the import rules in one file; `path` is relative to the repository root."""
    imports = read_imports(path, ast.parse(source))
    problems = check_text(path, source, imports)
    for imported in imports:
        top = imported.module.split(".")[0]
        reason = check_own_import(path, imported) if top == PACKAGE else check_library(room_of(path), imported)
        if reason:
            problems.append(f"{path}:{imported.line}: import of {imported.module}: {reason}")
    return problems


def repository_files() -> list[str]:
    """Paths of all files that are, or with the next `git add` would be, part of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(path for path in listed if (ROOT / path).exists())


FILES = repository_files()
SOURCES = [path for path in FILES if path.endswith(".py") and Path(path).parts[0] in (PACKAGE, *USERS)]


@pytest.mark.parametrize("path", SOURCES)
def test_file_keeps_the_rules(path):
    assert violations(path, (ROOT / path).read_text("utf-8")) == []


def test_rules_see_the_package():
    assert f"{PACKAGE}/__init__.py" in SOURCES


def test_only_known_entries_at_the_top():
    files = {path for path in FILES if len(Path(path).parts) == 1}
    folders = {Path(path).parts[0] for path in FILES} - files
    assert files - TOP_LEVEL_FILES == set()
    assert folders - TOP_LEVEL_FOLDERS == set()


def test_only_known_rooms_in_the_package():
    inside = {Path(path).parts[1] for path in FILES if path.startswith(f"{PACKAGE}/")}
    assert inside - ROOMS - PACKAGE_FILES == set()


def test_every_package_folder_has_an_init():
    folders = {Path(path).parent for path in SOURCES if Path(path).parts[0] == PACKAGE}
    assert {str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()} == set()


def test_tests_mirror_the_package():
    folders = {Path(path).parent.relative_to("tests") for path in FILES if path.startswith("tests/")}
    own = {
        folder for folder in folders if folder.parts and folder.parts[0] not in ("contract", "fixtures", "upstream")
    }
    beside = {"benchmarks", "docs", "examples", "notebooks"}
    strangers = {f for f in own if not (ROOT / PACKAGE / f).is_dir() and f.parts[0] not in beside}
    assert strangers == set()


XL = f"{PACKAGE}/models/transformer_xl"
BROKEN = [
    (f"{XL}/modeling_transformer_xl.py", "import einops", "einops is not among the libraries"),
    (f"{XL}/modeling_transformer_xl.py", "def f():\n    import numpy", "numpy is not among the libraries"),
    (f"{XL}/tokenization_transformer_xl.py", "import sacremoses", "sacremoses is optional"),
    (f"{XL}/modeling_transformer_xl.py", "from . import cache", "own files only"),
    (f"{XL}/modeling_transformer_xl.py", "from ..reformer.lsh_attention import f", "own files only"),
    (f"{XL}/modeling_transformer_xl.py", "from .sub.deep import f", "own files only"),
    (f"{XL}/modeling_transformer_xl.py", "from hf_efficient.ops import f", "own files only"),
    (f"{XL}/modeling_transformer_xl.py", f"import {PACKAGE}", "own files only"),
    (f"{XL}/modeling_transformer_xl.py", "from .attention_reference import f", "for tests only"),
    (f"{XL}/modeling_transformer_xl.py", '"""\nfrom .x import y\n"""', "copier takes this line"),
    (f"{XL}/configuration_transformer_xl.py", "from __future__ import annotations", "@strict"),
    (
        f"{PACKAGE}/ops/__init__.py",
        "from ..models.transformer_xl.modeling_transformer_xl import f",
        "operation",
    ),
    (f"{PACKAGE}/ops/__init__.py", "from ..models.transformer_xl import f", "operation"),
    (f"{PACKAGE}/data/lanes.py", "from ..training import f", "may not import"),
    (f"{PACKAGE}/data/lanes.py", "import accelerate", "accelerate is not among"),
    (f"{PACKAGE}/training/trainer.py", "from ..models.transformer_xl import f", "may not import"),
    (f"{PACKAGE}/training/trainer.py", f"from {PACKAGE} import TransformerXLModel", "may not import"),
    (f"{PACKAGE}/generation/talk.py", "from ..models.reformer import f", "may not import"),
    (f"{PACKAGE}/conversion/legacy.py", "from ..data import f", "may not import"),
    (f"{PACKAGE}/hub/card.py", "from ..training import f", "may not import"),
    (f"{PACKAGE}/cli/train.py", "from ..training import _private", "only public names"),
    (f"{PACKAGE}/cli/train.py", "from ..training.trainer import f", "only public names"),
    ("examples/enwik8.py", f"from {PACKAGE}.training.trainer import f", "only public names"),
    ("benchmarks/run.py", f"from {PACKAGE}.models.transformer_xl import f", "only public names"),
    (f"{PACKAGE}/__init__.py", "from .training import f", "may not import"),
    (f"{PACKAGE}/__init__.py", "import datasets", "datasets is not among"),
]


@pytest.mark.parametrize(("path", "source", "message"), BROKEN)
def test_breach_is_found(path, source, message):
    problems = violations(path, source)
    assert len(problems) == 1
    assert message in problems[0]


ALLOWED = [
    (f"{XL}/modeling_transformer_xl.py", "import math\nimport torch\nfrom .cache_transformer_xl import C"),
    (
        f"{XL}/tokenization_transformer_xl.py",
        "try:\n    import sacremoses\nexcept ImportError:\n    sacremoses = None",
    ),
    (f"{XL}/__init__.py", "from transformers import AutoModel\nfrom .modeling_transformer_xl import M"),
    (f"{PACKAGE}/__init__.py", "from .models.transformer_xl import TransformerXLModel"),
    (f"{PACKAGE}/ops/__init__.py", "from ..models.transformer_xl.relative_attention import f"),
    (f"{PACKAGE}/training/trainer.py", "from ..data import f\nfrom .arguments import g"),
    (f"{PACKAGE}/cli/train.py", f"from ..training import f\nfrom .errors import g\nfrom {PACKAGE} import h"),
    ("examples/enwik8.py", f"from {PACKAGE}.training import SegmentTrainer\nimport whatever"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_lawful_import_is_no_breach(path, source):
    assert violations(path, source) == []
