"""Logical inference: how two formulas of propositional logic relate, one of seven relations.

Bowman, Manning and Potts 2015 (arXiv 1506.04834); Tran, Bisazza and Monz 2018 (arXiv 1803.03585). Formulas over six
variables are written as those papers print them: `a`, `( not X )`, `( X ( and Y ) )`, `( X ( or Y ) )`. What a formula
means is the set of worlds, of the 64, in which it is true; the label says how the two sets relate. Trained on pairs of
few operators, a model is tested on pairs of more.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .generated_task import GeneratedTask, check_at_least
from .text_sources import lines_of

VARIABLES = ("a", "b", "c", "d", "e", "f")
OPERATORS = ("not", "and", "or")
NUM_WORLDS = 2 ** len(VARIABLES)
ALL_WORLDS = 2**NUM_WORLDS - 1
# A set of worlds is an integer: bit w is world w, in which variable i is true if bit i of w is.
WORLDS_OF_VARIABLE = {
    name: sum(1 << world for world in range(NUM_WORLDS) if world >> i & 1) for i, name in enumerate(VARIABLES)
}

# The label of a pair is the index of its relation.
RELATIONS = ("=", "<", ">", "^", "|", "v", "#")
# The id of a symbol is its index. The separator stands between the formulas where they are one sequence.
FORMULA_SYMBOLS = ("<pad>", "<sep>", "(", ")", *VARIABLES, *OPERATORS)
SYMBOL_IDS = {symbol: index for index, symbol in enumerate(FORMULA_SYMBOLS)}

# Of ten pairs, how many belong to each split; which ones is decided by their text, so that no pair is in two.
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}


class FormulaPair(NamedTuple):
    """Two formulas and the relation of the first to the second."""

    left: str
    right: str
    relation: str

    @property
    def num_operators(self) -> int:
        """Operators of the side that has more of them: the bin of a pair in the papers, of which 12 is 12 or more."""
        return max(count_operators(self.left), count_operators(self.right))


# --- what formulas mean ----------------------------------------------------------------------------------------------


def satisfying_worlds(formula: str) -> int:
    """The worlds in which a formula is true, as the bits of an integer.

    Raises ValueError if it is not written as the papers do.
    """
    groups: list[list] = [[]]
    for token in formula.split():
        if token == "(":
            groups.append([])
        elif token == ")" and len(groups) > 1:
            group = groups.pop()
            groups[-1].append(_meaning(group, formula))
        else:
            groups[-1].append(WORLDS_OF_VARIABLE.get(token, token))
    match groups:
        case [[int(worlds)]]:
            return worlds
    raise _not_a_formula(formula)


def _meaning(group: list, formula: str) -> int | tuple[str, int]:
    """What stands in one pair of brackets: the worlds of a formula, or an operator that waits for its left side."""
    match group:
        case ["not", int(worlds)]:
            return ALL_WORLDS & ~worlds
        case ["and" | "or" as operator, int(worlds)]:
            return operator, worlds
        case [int(left), ("and", right)]:
            return left & right
        case [int(left), ("or", right)]:
            return left | right
    raise _not_a_formula(formula)


def _not_a_formula(formula: str) -> ValueError:
    return ValueError(f"formula={formula!r} is not a formula such as '( ( not a ) ( and b ) )'.")


def relation_between(left: int, right: int) -> str:
    """The relation of two sets of worlds, of which none is empty or everything (Bowman et al. 2015, table 1)."""
    both, either = left & right, left | right
    if left == right:
        return "="
    if both == left:
        return "<"
    if both == right:
        return ">"
    if not both:
        return "^" if either == ALL_WORLDS else "|"
    return "v" if either == ALL_WORLDS else "#"


def count_operators(formula: str) -> int:
    """How often `not`, `and` and `or` stand in a formula."""
    return sum(token in OPERATORS for token in formula.split())


# --- generating them -------------------------------------------------------------------------------------------------


class LogicalInferenceTask(GeneratedTask):
    """Pairs of random formulas with the relation that holds between them (Bowman et al. 2015, arXiv 1506.04834).

    - "input_ids": (length,) int64, the left formula, the separator, the right formula; "labels": (), of `RELATIONS`.
    - With `separate`: "left_input_ids" and "right_input_ids" instead, for the same encoder applied to each side.

    The number of operators of the larger side is drawn uniformly from min_operators to max_operators, that of the
    other from 0 to it. Each pair has four of the six variables; an operator is `not` with probability 1/3, else `and`
    or `or`, and any split of the remaining operators between the two sides is as likely as any other. Formulas that
    are always true or always false are drawn again.

    split: "train", "validation" or "test". A pair's text decides which it belongs to (8 : 1 : 1), so that no pair is
    in two of them, whatever the seeds; within one, the few pairs with 0 or 1 operators repeat. About half of all pairs
    are "#": report that beside any accuracy.

    Raises ValueError for contradictory numbers of operators or an unknown split.
    """

    vocab_size = len(FORMULA_SYMBOLS)
    num_labels = len(RELATIONS)

    def __init__(
        self,
        num_examples: int,
        min_operators: int = 1,
        max_operators: int = 6,
        split: str = "train",
        separate: bool = False,
        seed: int = 0,
    ):
        super().__init__(num_examples, seed)
        check_at_least(min_operators=(min_operators, 0), max_operators=(max_operators, min_operators))
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {', '.join(map(repr, SPLITS))}.")
        self.min_operators = min_operators
        self.max_operators = max_operators
        self.split = split
        self.separate = separate

    def make_example(self, generator: np.random.Generator) -> dict[str, Tensor]:
        """A pair of this split as a model reads it."""
        return pair_features(self.make_pair(generator), self.separate)

    def make_pair(self, generator: np.random.Generator) -> FormulaPair:
        """A pair of this split."""
        num_operators = int(generator.integers(self.min_operators, self.max_operators + 1))
        while True:
            pair = random_pair(num_operators, generator)
            if pair is not None and tenth_of(pair) in SPLITS[self.split]:
                return pair


def random_pair(num_operators: int, generator: np.random.Generator) -> FormulaPair | None:
    """A pair with so many operators on its larger side; None if a side turned out always true or always false."""
    variables = generator.permutation(VARIABLES)[:4].tolist()
    sizes = generator.permutation([num_operators, int(generator.integers(num_operators + 1))])
    left, right = (random_formula(int(size), variables, generator) for size in sizes)
    meanings = satisfying_worlds(left), satisfying_worlds(right)
    if {0, ALL_WORLDS}.intersection(meanings):
        return None
    return FormulaPair(left, right, relation_between(*meanings))


def tenth_of(pair: FormulaPair) -> int:
    """Which tenth of all pairs a pair belongs to, by its text. Each bin has pairs in all that make a split."""
    return hashlib.md5(f"{pair.left}\t{pair.right}".encode(), usedforsecurity=False).digest()[0] % 10


def random_formula(num_operators: int, variables: list[str], generator: np.random.Generator) -> str:
    """A formula with exactly so many operators."""
    if num_operators == 0:
        return variables[generator.integers(len(variables))]
    operator = OPERATORS[generator.integers(len(OPERATORS))]
    if operator == "not":
        return f"( not {random_formula(num_operators - 1, variables, generator)} )"
    left_size = int(generator.integers(num_operators))
    left = random_formula(left_size, variables, generator)
    right = random_formula(num_operators - 1 - left_size, variables, generator)
    return f"( {left} ( {operator} {right} ) )"


# --- reading them ----------------------------------------------------------------------------------------------------


def read_logical_inference(source: str | Path, split: str | None = None) -> Iterator[FormulaPair]:
    """The pairs of tab-separated files, one by one (Bowman et al. 2015, arXiv 1506.04834).

    source: a file, a folder or a .tar.gz archive. Lines are `relation, left, right`, as Bowman et al. 2015 publish
    them (train0 ... train12, test0 ... test12), or `operators, relation, left, right`; files may end with .gz.
    split: of a folder or an archive, read the files whose name begins with it: train.tsv.gz, or train0 to train12.

    Raises ValueError, with file and line, for a line of another form, and if there is no such file.
    """
    name = None if split is None else re.compile(rf"{re.escape(split)}\d*(\.tsv|\.txt)?(\.gz)?")
    for place, line in lines_of(source, name):
        columns = line.split("\t")
        if len(columns) not in (3, 4) or columns[-3] not in RELATIONS:
            raise ValueError(f"{place}: {line!r} is not `relation, left, right` with tabs between them.")
        relation, left, right = columns[-3:]
        yield FormulaPair(left.strip(), right.strip(), relation)


def pair_features(pair: FormulaPair, separate: bool = False) -> dict[str, Tensor]:
    """A pair as a model reads it: see `LogicalInferenceTask`."""
    label = torch.tensor(RELATIONS.index(pair.relation))
    left, right = encode_formula(pair.left), encode_formula(pair.right)
    if separate:
        return {"left_input_ids": torch.tensor(left), "right_input_ids": torch.tensor(right), "labels": label}
    return {"input_ids": torch.tensor([*left, SYMBOL_IDS["<sep>"], *right]), "labels": label}


def encode_formula(formula: str) -> list[int]:
    """The ids of its symbols. Raises ValueError for a symbol that formulas do not have."""
    try:
        return [SYMBOL_IDS[symbol] for symbol in formula.split()]
    except KeyError as error:
        raise ValueError(f"formula={formula!r} has the unknown symbol {error}.") from error
