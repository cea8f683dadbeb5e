"""Whether a card is fit for the Hub, found out before anything is sent."""

import math
import re
from pathlib import Path
from posixpath import isabs, normpath
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import EvalResult, ModelCard

CARD = "README.md"
HEADER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)
FENCED = re.compile(r"^(```+|~~~+).*?^\1", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img[^>]+src=[\"']([^\"']+)")
HOME = re.compile(r"(?:/home/|/Users/|[A-Z]:\\Users\\)[\w.-]+")
# What templates leave to be written.
BLANK = re.compile(r"more information needed|\[\]\(https://huggingface\.co/[^)]*\)", re.IGNORECASE)
# What the Hub sorts models by, with an example to write.
NEEDED = {"license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation"}
LISTS = {"language": "en", "datasets": "Salesforce/wikitext", "tags": "long-context"}


def read_card(folder: Path) -> ModelCard:
    """The model card in a folder, its metadata checked as far as that can be done without the Hub.

    Raises FileNotFoundError if there is none; ValueError, naming the key, if the metadata is missing or invalid:
    licence, library and task are needed, language, datasets and tags are words, results are finite numbers.
    """
    path = folder / CARD
    if not path.is_file():
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no card, {CARD}; write one that says what the model is, how it was trained "
            "and how good it is: hf_efficient.hub.write_model_card makes one from a run of `hf-efficient train`, "
            "write_trainer_card from one of transformers' Trainer."
        )
    if not HEADER.search(path.read_text("utf-8-sig", errors="replace")):
        raise ValueError(f"{path} begins with no metadata; put `license: apache-2.0` and the like between two ---.")
    try:
        card = ModelCard.load(path)
    except Exception as error:  # the readers of YAML and of results raise what they like
        raise ValueError(f"{path} has invalid metadata: {' '.join(str(error).split())}; mend it.") from error
    metadata = card.data.to_dict()
    check_needed(path, metadata)
    for key, example in LISTS.items():
        values = metadata.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            check_word(path, key, value, example)
    for result in card.data.eval_results or []:
        check_result(path, result)
    return card


def check_needed(path: Path, metadata: dict[str, Any]) -> None:
    """Raises ValueError if the metadata has no word for what the Hub sorts models by; all that is missing is named."""
    missing = {key: example for key, example in NEEDED.items() if metadata.get(key) is None}
    if missing:
        examples = ", ".join(f"`{key}: {example}`" for key, example in missing.items())
        made_by_trainer = "generated_from_trainer" in (metadata.get("tags") or [])
        whole = "; hf_efficient.hub.write_trainer_card writes a whole card" if made_by_trainer else ""
        raise ValueError(f"{path} has no {' and no '.join(missing)} in its metadata; add such as {examples}{whole}.")
    for key, example in NEEDED.items():
        check_word(path, key, metadata[key], example)


def check_word(path: Path, key: str, value: Any, example: str) -> None:
    """Raises ValueError if a value of the metadata is no word."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{path} has {key}: {value!r} in its metadata; write a word, such as `{key}: {example}`, in quotes if "
            "YAML takes it for something else (no, on, 1.0)."
        )


def check_result(path: Path, result: EvalResult) -> None:
    """Raises ValueError if a measured result is no finite number."""
    value = result.metric_value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"{path} has {result.metric_type}: {value!r} among the results of its model-index; write the measured "
            "number, or leave the result out."
        )


def card_hints(card: ModelCard) -> tuple[str, ...]:
    """What the author may want to add to a valid card, or to take out of it."""
    metadata, hints = card.data.to_dict(), []
    if metadata["license"] == "unknown":
        hints.append("license: unknown, so nobody may use the model; choose one, such as `license: apache-2.0`")
    if "language" not in metadata:
        hints.append("no language; add the text's, such as `language: en`")
    if "model-index" not in metadata:
        hints.append("no measured results; train with a validation text, or add a model-index")
    if blank := BLANK.search(card.content):
        hints.append(f"it still says {blank[0]!r}; fill that in, or take it out")
    hints += [f"{path} names a person or a machine" for path in sorted(set(HOME.findall(card.content)))]
    return tuple(hints)


def shown_pictures(card: ModelCard, folder: Path) -> list[str]:
    """Names of the pictures in the folder that the card shows.

    Raises FileNotFoundError if it shows one that is not there, ValueError if that lies outside the folder.
    """
    targets = [first or second for first, second in PICTURE.findall(FENCED.sub("", card.text))]
    local = [
        urlsplit(target).path for target in targets if not urlsplit(target).scheme and not target.startswith("//")
    ]
    names = {normpath(unquote(path)) for path in local}
    for name in sorted(names):
        if isabs(name) or name.startswith(".."):
            raise ValueError(f"{folder / CARD} shows the picture {name!r} from outside the folder; copy it there.")
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / CARD} shows the picture {name!r}, which is missing; take it out of the card."
            )
    return sorted(names)
