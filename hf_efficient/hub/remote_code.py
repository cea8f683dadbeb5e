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

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from .model_card import PAPERS

MODELS = f"{__package__.rpartition('.')[0]}.models"


def architectures() -> Iterator[ModuleType]:
    """The package of each architecture, such as `hf_efficient.models.reformer`."""
    for name in PAPERS:
        yield import_module(f"{MODELS}.{name}")


def public_classes(module: ModuleType, base: type) -> list[type]:
    """Those classes of an architecture that are a `base`."""
    values = [getattr(module, name) for name in dir(module)]
    return [value for value in values if isinstance(value, type) and issubclass(value, base) and value is not base]


def architecture_code(model_type: str | None) -> dict[str, str]:
    """The `auto_map` of an architecture: for every Auto class that knows it, where its class is defined.

    model_type: as in config.json, for example "transfo-xl".
    Returns for example {"AutoConfig": "configuration_transformer_xl.TransformerXLConfig", ...}.
    Raises ValueError if the type is not one of this package's, or is left to transformers' own class.
    """
    types = {}
    for module in architectures():
        types |= {config.model_type: config for config in public_classes(module, PreTrainedConfig)}
    if model_type not in types:
        raise ValueError(
            f"with_code=True needs an architecture of hf_efficient, but config.json has model_type={model_type!r}; "
            f"known are {', '.join(sorted(types))}. Publish without code."
        )
    config_class = types[model_type]
    found = {"AutoConfig": reference_to(config_class)}
    for name in sorted(name for name in dir(transformers) if name.startswith("AutoModel")):
        model_class = getattr(transformers, name)._model_mapping.get(config_class, None)
        if isinstance(model_class, type) and model_class.__module__.startswith(MODELS):
            found[name] = reference_to(model_class)
    if len(found) == 1:
        raise ValueError(
            f"with_code=True finds no Auto class with our model_type={model_type!r}; unset "
            "HF_EFFICIENT_KEEP_UPSTREAM_REFORMER and start Python again."
        )
    return found


def tokenizer_code(class_name: str | None) -> str | None:
    """Where a tokenizer's class is defined, if it is one of this package's; others load without code of ours."""
    for module in architectures():
        for tokenizer_class in public_classes(module, PreTrainedTokenizerBase):
            if class_name in (tokenizer_class.__name__, f"{tokenizer_class.__name__}Fast"):
                return reference_to(tokenizer_class)
    return None


def reference_to(cls: type) -> str:
    """`file.Class`, as `auto_map` has it."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def code_files(references: Iterable[str]) -> dict[str, bytes]:
    """Name and content of every file that the classes named in an `auto_map` need, each with its licence on top."""
    sources = {Path(source).name: Path(source) for module in references for source in needed_files(module)}
    note = f"# Part of hf_efficient {version('hf_efficient')}. SPDX-License-Identifier: Apache-2.0\n"
    return {name: note.encode() + source.read_bytes() for name, source in sorted(sources.items())}


def needed_files(reference: str) -> list[str]:
    """The file that a reference names, and all that it imports from its folder."""
    file_name = f"{reference.partition('.')[0]}.py"
    folders = [Path(getfile(module)).parent for module in architectures()]
    (source,) = (folder / file_name for folder in folders if (folder / file_name).is_file())
    return [str(source), *get_relative_import_files(source)]
