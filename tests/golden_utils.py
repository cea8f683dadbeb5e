"""Where the golden cases lie: outputs of the reference programs, one folder per case."""

import os
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"


def golden_family(family: str) -> Path:
    """Folder of a family of cases, under `$HF_EFFICIENT_GOLDEN` when that is set, else under `tests/fixtures`."""
    return Path(os.environ.get("HF_EFFICIENT_GOLDEN") or FIXTURES) / family


def golden_cases(family: str) -> list[Path]:
    """The case folders of a family, sorted by name; empty where the folder holds none."""
    folder = golden_family(family)
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
