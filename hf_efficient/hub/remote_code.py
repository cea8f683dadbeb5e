"""The code of an architecture, for repositories whose models load where hf_efficient is not installed.

transformers loads a class from a file of the repository that `auto_map` in its config.json names, and the files that
this one imports with `from .sibling import name`. docs/adding_a_model.md says what keeps an architecture's folder so.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import version
from inspect import getfile
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from .model_card import PAPERS

MODELS = f"{__package__.rpartition('.')[0]}.models"
# The licence of the code, which need not be that of the model beside it.
CODE_LICENSE = "LICENSE.hf_efficient"
Class = TypeVar("Class")


def architectures() -> Iterator[ModuleType]:
    """The package of each architecture, such as `hf_efficient.models.reformer`."""
    for name in PAPERS:
        yield import_module(f"{MODELS}.{name}")


def public_classes(module: ModuleType, base: type[Class]) -> list[type[Class]]:
    """Those classes of an architecture that are a `base`."""
    values = [getattr(module, name) for name in dir(module)]
    return [value for value in values if isinstance(value, type) and issubclass(value, base) and value is not base]


def architecture_classes(model_type: str | None) -> dict[str, type]:
    """For every Auto class that knows an architecture, the class that it gives: what `auto_map` has to name.

    model_type: as in config.json, for example "transfo-xl".
    Raises ValueError if the type is not one of this package's, or is left to transformers' own class.
    """
    types: dict[str, Any] = {}
    for module in architectures():
        types |= {config.model_type: config for config in public_classes(module, PreTrainedConfig)}
    if model_type not in types:
        raise ValueError(
            f"with_code=True needs an architecture of hf_efficient, but config.json has model_type={model_type!r}; "
            f"known are {', '.join(sorted(types))}. Publish without code."
        )
    found = {"AutoConfig": types[model_type]}
    for name in sorted(name for name in dir(transformers) if name.startswith("AutoModel")):
        model_class = getattr(transformers, name)._model_mapping.get(types[model_type], None)
        if isinstance(model_class, type) and model_class.__module__.startswith(MODELS):
            found[name] = model_class
    if len(found) == 1:
        raise ValueError(
            f"with_code=True finds no Auto class with our model_type={model_type!r}; unset "
            "HF_EFFICIENT_KEEP_UPSTREAM_REFORMER and start Python again."
        )
    return found


def tokenizer_class(name: str | None) -> type | None:
    """The tokenizer's class of that name, if it is one of this package's; others load without code of ours."""
    for module in architectures():
        for found in public_classes(module, PreTrainedTokenizerBase):
            if name in (found.__name__, f"{found.__name__}Fast"):
                return found
    return None


def reference_to(cls: type) -> str:
    """`file.Class`, as `auto_map` has it."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def code_files(classes: Iterable[type]) -> dict[str, bytes]:
    """Name and content of every file that classes are defined in, and of all that these import from their folder.

    Each says on top where it comes from, and its licence, whose text goes along. No classes need no files.
    """
    modules = {getfile(cls) for cls in classes}
    sources = modules | {source for module in modules for source in get_relative_import_files(module)}
    note = f"# Part of hf_efficient {version('hf_efficient')}. SPDX-License-Identifier: Apache-2.0\n".encode()
    files = {Path(source).name: note + Path(source).read_bytes() for source in sorted(sources)}
    return files | ({CODE_LICENSE: Path(__file__).with_name("code_license.txt").read_bytes()} if files else {})
