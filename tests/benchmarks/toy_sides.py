"""Sides that need no library, for the tests of the harness."""

import os
from pathlib import Path


class Writer:
    """Each run adds its letter to a file; with `fail_after` runs it raises."""

    def __init__(self, path: str, letter: str, units: int = 1, fail_after: int | None = None):
        self.path, self.letter, self.units, self.fail_after = Path(path), letter, units, fail_after
        print("what a library prints")

    def run(self) -> None:
        """One letter."""
        print("and again")
        with self.path.open("a") as file:
            file.write(self.letter)
        if self.fail_after is not None and len(self.path.read_text()) > self.fail_after:
            raise ValueError("no more letters")

    def threads(self) -> str:
        """The environment's number of threads."""
        return os.environ["OMP_NUM_THREADS"]

    def exit(self, code: int) -> None:
        """End the process without an answer."""
        os._exit(code)


class Hoarder:
    """Takes memory in its first run and gives it back."""

    def __init__(self, megabytes: int):
        self.megabytes = megabytes

    def run(self) -> None:
        """Touch every page once."""
        bytearray(self.megabytes * 2**20)[:: 2**12] = b"x" * (self.megabytes * 2**8)
