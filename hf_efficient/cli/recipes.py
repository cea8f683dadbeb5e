"""YAML recipes: a command line written down, one `key: value` for each flag."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import CommandError

RECIPE_SUFFIXES = (".yaml", ".yml")


class RecipeLoader(yaml.SafeLoader):
    """YAML as people expect it: `1e-4` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise CommandError(f"the key '{twice.pop()}' stands twice; keep one of the two lines.")
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 wants a dot in a number with an exponent, so that its `1e-4` would be a string.
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """The value that `text` would have in a recipe: `128` an integer, `true` a boolean, `[1, 2]` a list.

    Raises CommandError if it is not YAML.
    """
    try:
        return yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        raise CommandError(f"cannot read the value '{text}': {error}") from error


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of one recipe, in file order.

    Raises CommandError if the file is missing, is not UTF-8 YAML or holds no mapping.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
    except OSError as error:
        raise CommandError(
            f"cannot read the recipe '{path}': {error.strerror}; give the path of a YAML file."
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"the recipe '{path}' is not YAML: {' '.join(str(error).split())}") from error
    except CommandError as error:
        raise CommandError(f"recipe '{path}': {error}") from error
    if not isinstance(settings, dict):
        raise CommandError(f"the recipe '{path}' holds no settings; write lines such as `max_steps: 100`.")
    return settings


def recipe_to_flags(settings: dict[str, Any]) -> list[str]:
    """The same settings as flags, so that one parser checks both. A key without a value keeps its default.

    Example:

        >>> recipe_to_flags({"max_steps": 10, "text": ["a.txt", "b.txt"], "model": {"mem_len": 32}})
        ['--max_steps=10', '--text', 'a.txt', 'b.txt', '--model.mem_len=32']
    """
    flags = []
    for key, value in settings.items():
        if key == "model" and isinstance(value, dict):
            flags += [f"--model.{name}={json.dumps(setting)}" for name, setting in value.items()]
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool):
            flags.append(f"--{key}={str(value).lower()}")
        elif isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value)}")
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def write_recipe(folder: Path, report: dict[str, Any]) -> None:
    """Write a run's settings as `recipe.yaml`, which the command line reads back."""
    header = f"# A run of {report['date']}. To repeat it: hf-efficient train recipe.yaml --output_dir FOLDER\n"
    settings = yaml.safe_dump(report["settings"], sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(header + settings, encoding="utf-8")
