"""`report.json`: the record that a run leaves, written at its start and completed at its end."""

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .errors import CommandError

REPORT_NAME = "report.json"


def read_report(folder: Path) -> dict[str, Any]:
    """The record in `folder`, {} if there is none. Raises CommandError if it cannot be read."""
    path = folder / REPORT_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError) as error:
        raise CommandError(f"'{path}' cannot be read ({error}); choose another folder.") from error


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Replace the record in `folder`. A reader sees the old one or the new one, never half of one."""
    unfinished = folder / f".{REPORT_NAME}.new"
    unfinished.write_text(to_json(report) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / REPORT_NAME)


def to_json(content: dict[str, Any]) -> str:
    """Readable JSON; what JSON has no type for is written as its `str`."""
    return json.dumps(content, indent=2, ensure_ascii=False, default=str)


def plain(content: dict[str, Any]) -> dict[str, Any]:
    """`content` as it comes back from JSON: enumerations as values, tuples as lists, other objects as their `str`."""
    return json.loads(to_json(content))


def circumstances() -> dict[str, Any]:
    """Hardware, versions and date of a run, without which its figures say little."""
    packages = ("torch", "transformers", "hf_efficient")
    return {
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "date": date.today().isoformat(),
    }


def hardware() -> str:
    """The accelerator's name, or the processor's with the number of threads in use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    """The processor's name as Linux tells it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
