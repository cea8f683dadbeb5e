"""Learning to execute: strings of digits to keep, and small programs to run, character by character.

Zaremba and Sutskever 2014 (arXiv 1410.4615), in the form of DeepMind's generator (`learn_to_execute.py` in Sonnet),
whose tasks and settings Dehghani et al. 2019 name: memorisation (copy, double, reverse) and programs (addition,
control, program). Programs nest: the result of one operation is the first operand of the next.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .generated_task import NUM_RESERVED_IDS, GeneratedTask, check_at_least, sequence_pair

CHARACTERS = "0123456789+-*()<>=[]xifelsor"
CHARACTER_IDS = {character: index for index, character in enumerate(CHARACTERS, NUM_RESERVED_IDS)}


class Expression(NamedTuple):
    """A piece of program text and its value."""

    text: str
    value: int


Operation = Callable[[Expression, Callable[[], Expression], np.random.Generator], Expression]


# --- operations: the first operand may be a nested program, `literal` draws the others -------------------------------


def add(first: Expression, literal: Callable[[], Expression], generator: np.random.Generator) -> Expression:
    """`a+b`"""
    second = literal()
    return Expression(f"({first.text}+{second.text})", first.value + second.value)


def subtract(first: Expression, literal: Callable[[], Expression], generator: np.random.Generator) -> Expression:
    """`a-b`"""
    second = literal()
    return Expression(f"({first.text}-{second.text})", first.value - second.value)


def multiply(first: Expression, literal: Callable[[], Expression], generator: np.random.Generator) -> Expression:
    """`a*b`"""
    second = literal()
    return Expression(f"({first.text}*{second.text})", first.value * second.value)


def choose(first: Expression, literal: Callable[[], Expression], generator: np.random.Generator) -> Expression:
    """`a if b<c else d`, written without spaces; `>` as often."""
    left, right, otherwise = literal(), literal(), literal()
    sign = "<>"[generator.integers(2)]
    holds = left.value < right.value if sign == "<" else left.value > right.value
    text = f"({first.text}if{left.text}{sign}{right.text}else{otherwise.text})"
    return Expression(text, (first if holds else otherwise).value)


def repeat(first: Expression, literal: Callable[[], Expression], generator: np.random.Generator) -> Expression:
    """`x=a for[n] x+=b`, written without spaces: n times b more than a, n from 1 to 9."""
    second, times = literal(), int(generator.integers(1, 10))
    text = f"(x={first.text}for[{times}]x+={second.text})"
    return Expression(text, first.value + times * second.value)


PROGRAMS: dict[str, tuple[Operation, ...]] = {
    "addition": (add,),
    "control": (choose, repeat),
    "program": (add, subtract, multiply, choose, repeat),
}
MEMORISATION: dict[str, Callable[[str], str]] = {
    "copy": lambda digits: digits,
    "double": lambda digits: digits + digits,
    "reverse": lambda digits: digits[::-1],
}


# --- the data set ----------------------------------------------------------------------------------------------------


class LearningToExecuteTask(GeneratedTask):
    """Strings and what becomes of them: the ids of their characters in the form of `sequence_pair`.

    From Zaremba and Sutskever 2014, arXiv 1410.4615.

    task: "copy", "double" or "reverse" of a number, or "addition", "control" or "program", whose target is the value
        of the program, modulo 10 ** (length + 1).
    max_length: most digits of a literal (the paper: 5, and 55 for memorisation).
    max_nesting: most operations of a program (the paper: 2); memorisation has none.
    min_length, min_nesting: the least. Both are drawn uniformly for each example, which is the "mix" strategy, without
        a curriculum; a test at full difficulty sets least to most.

    Models need `vocab_size` ids; batch with `PaddingCollator`.
    Raises ValueError for an unknown task or an illegal count.
    """

    vocab_size = NUM_RESERVED_IDS + len(CHARACTER_IDS)

    def __init__(
        self,
        num_examples: int,
        task: str = "copy",
        max_length: int = 5,
        max_nesting: int = 2,
        min_length: int = 1,
        min_nesting: int = 1,
        decoder_only: bool = False,
        seed: int = 0,
    ):
        super().__init__(num_examples, seed)
        if task not in (*MEMORISATION, *PROGRAMS):
            raise ValueError(f"task={task!r} is none of {', '.join(map(repr, (*MEMORISATION, *PROGRAMS)))}.")
        check_at_least(min_length=(min_length, 1), max_length=(max_length, min_length))
        check_at_least(min_nesting=(min_nesting, 1), max_nesting=(max_nesting, min_nesting))
        self.task = task
        self.lengths = min_length, max_length
        self.nestings = min_nesting, max_nesting
        self.decoder_only = decoder_only

    def make_example(self, generator: np.random.Generator) -> dict[str, Tensor]:
        """Ids of the characters."""
        source, target = self.make_pair(generator)
        return sequence_pair(encode_characters(source), encode_characters(target), self.decoder_only)

    def make_pair(self, generator: np.random.Generator) -> tuple[str, str]:
        """The string that is read and the one that is to be written."""
        length = int(generator.integers(self.lengths[0], self.lengths[1] + 1))
        if self.task in MEMORISATION:
            digits = random_number(length, generator)
            return digits, MEMORISATION[self.task](digits)
        nesting = int(generator.integers(self.nestings[0], self.nestings[1] + 1))
        program = random_program(PROGRAMS[self.task], length, nesting, generator)
        return program.text, str(program.value % 10 ** (length + 1))


def random_program(
    operations: tuple[Operation, ...], length: int, nesting: int, generator: np.random.Generator
) -> Expression:
    """So many operations, one inside the other, on literals of so many digits."""

    def literal() -> Expression:
        digits = random_number(length, generator)
        return Expression(digits, int(digits))

    program = literal()
    for _ in range(nesting):
        program = operations[generator.integers(len(operations))](program, literal, generator)
    return Expression(program.text[1:-1], program.value)  # the outermost brackets say nothing


def random_number(length: int, generator: np.random.Generator) -> str:
    """Digits, the first of them not 0."""
    first, rest = generator.integers(1, 10), generator.integers(10, size=length - 1)
    return "".join(map(str, [first, *rest]))


def encode_characters(text: str) -> list[int]:
    """The ids of characters. Raises ValueError for one that no string of these tasks has."""
    unknown = set(text) - set(CHARACTER_IDS)
    if unknown:
        raise ValueError(f"text={text!r} has the unknown character {unknown.pop()!r}.")
    return [CHARACTER_IDS[character] for character in text]
