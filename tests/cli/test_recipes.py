"""YAML recipes: read as people expect, and refused where they cannot be meant."""

import pytest

from hf_efficient.cli.errors import CommandError
from hf_efficient.cli.recipes import parse_value, read_recipe, recipe_to_flags


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("128", 128),
        ("1e-4", 1e-4),
        ("2.5e-4", 2.5e-4),
        ("1e5", 1e5),
        ("-1", -1),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("[]", []),
        ("empty", "empty"),
        ("e5", "e5"),
    ],
)
def test_values_have_the_type_people_expect(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_recipe_becomes_flags_in_file_order():
    settings = {
        "text": ["a.txt", "b.txt"],
        "learning_rate": 1e-4,
        "resume": False,
        "eval_mem_len": None,
        "model": {"mem_len": 32, "clamp_len": -1, "cutoffs": [10, 20], "memory_init": "zeros"},
        "lr_scheduler_kwargs": {"num_cycles": 1},
    }
    assert recipe_to_flags(settings) == [
        *("--text", "a.txt", "b.txt"),
        *("--learning_rate=0.0001", "--resume=false"),
        *("--model.mem_len=32", "--model.clamp_len=-1", "--model.cutoffs=[10, 20]", '--model.memory_init="zeros"'),
        '--lr_scheduler_kwargs={"num_cycles": 1}',
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"max_steps: 1\nmax_steps: 2\n", ["max_steps", "twice", "keep one"]),
        (b"model:\n  mem_len: 1\n  mem_len: 2\n", ["mem_len", "twice"]),
        (b"- max_steps\n", ["no settings", "max_steps: 100"]),
        (b"", ["no settings"]),
        (b"text: [a\n", ["not YAML"]),
        (b"\xff\xfe\x00", ["not YAML"]),
        (b"text: !!python/object/apply:os.system [ls]\n", ["not YAML"]),
    ],
)
def test_bad_recipe_is_explained(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(CommandError) as caught:
        read_recipe(path)
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_missing_recipe_is_explained(tmp_path):
    with pytest.raises(CommandError, match=r"none\.yaml.*give the path"):
        read_recipe(tmp_path / "none.yaml")
