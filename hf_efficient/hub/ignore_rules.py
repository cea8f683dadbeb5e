"""Rules that keep files from the Hub: of `.gitignore` and `.hubignore`, read as git does, and of the card."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card_checks import CARD

IGNORE_FILES = (".gitignore", ".hubignore")
# What is more than itself in a pattern of git's.
GLOB = re.compile(r"(\\.|\*\*/|\*\*|\*|\?|\[[^]]+\])")


@dataclass(frozen=True)
class Rule:
    """One line of an ignore file. origin: where it stands, for people. keeps: it began with `!`."""

    pattern: str
    origin: str
    keeps: bool

    def matches(self, name: str) -> bool:
        """Whether it speaks of the file `name`, or of a folder that the file lies in."""
        parts = name.split("/")
        paths = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        if self.pattern.endswith("/"):
            paths = paths[:-1]
        return any(self.expression.fullmatch(path) for path in paths)

    @property
    def expression(self) -> re.Pattern:
        """The pattern as a regular expression. Raises ValueError if it is none of git's."""
        pattern = self.pattern.rstrip("/")
        anywhere = "" if "/" in pattern else "(?:.*/)?"
        try:
            return re.compile(anywhere + "".join(map(as_expression, GLOB.split(pattern.lstrip("/")))))
        except re.error as error:
            raise ValueError(f"{self.origin} has the pattern {self.pattern!r} ({error}); mend it.") from error


def as_expression(part: str) -> str:
    """A regular expression for a part of a pattern of git's."""
    if part.startswith("\\"):
        return re.escape(part[1:])
    if part.startswith("[") and part.endswith("]"):
        return part.replace("[!", "[^", 1)
    return {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))


def ignore_rules(folder: Path) -> list[Rule]:
    """The rules of `.gitignore` and `.hubignore`, as git reads them, in the order in which the last one wins."""
    rules = []
    for name in IGNORE_FILES:
        path = folder / name
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.startswith("#"):
                keeps = line.startswith("!")
                rules.append(Rule(line.strip().removeprefix("!"), f"{name}, line {number}", keeps))
    return rules


def card_rules(exclude: Any, folder: Path) -> list[Rule]:
    """The rules of the card's metadata, a list of patterns under `exclude`."""
    patterns = [exclude] if isinstance(exclude, str) else exclude or []
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{folder / CARD} has exclude: {exclude!r} in its metadata; write a list of patterns.")
    return [Rule(pattern.removeprefix("!"), "the card", pattern.startswith("!")) for pattern in patterns]
