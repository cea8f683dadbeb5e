"""What of a folder goes to the Hub: the parts of a model, and nothing that lies beside them by chance."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .card_checks import CARD, card_hints, read_card, shown_pictures
from .ignore_rules import Rule, card_rules, ignore_rules
from .remote_code import CODE_LICENSE, architecture_classes, code_files, reference_to, tokenizer_class
from .weight_files import is_training_state, refuse_pickle, weight_files

CONFIG, TOKENIZER_CONFIG, ADAPTER_CONFIG = "config.json", "tokenizer_config.json", "adapter_config.json"
TOKENIZER = (
    *(TOKENIZER_CONFIG, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
# Everything a model repository is made of, beside weights, card, pictures and code.
PARTS = (CONFIG, "generation_config.json", "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*", *TOKENIZER)
SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})\b"),
    "an AWS access key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{32,}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


@dataclass(frozen=True)
class Upload:
    """One file of the repository to be.

    name: its path there. content: the file it is read from, or its bytes where they differ from the folder's.
    note: what is changed on the way, "" for nothing.
    """

    name: str
    content: Path | bytes
    note: str = ""

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def read(self) -> bytes:
        """Its content."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def text(self) -> str:
        """Its content as text."""
        return self.read().decode("utf-8")


@dataclass
class Contents:
    """files: what goes, by name. left_out: what stays, with the reason. hints: what could be better."""

    files: dict[str, Upload] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    hints: tuple[str, ...] = ()

    def add(self, name: str, content: Path | bytes, note: str = "") -> None:
        """Take a file; a later one of the same name takes its place."""
        self.files[name] = Upload(name, content, note)


def collect_contents(folder: Path, with_code: bool) -> Contents:
    """Decide for every file of a model's folder whether it goes to the Hub.

    Only what a model repository is made of goes: safetensors weights, configurations, tokenizer, the card and the
    pictures it shows, a licence; with code, the files of the architecture that the weights need. A file that the
    folder's `.gitignore` or `.hubignore` names, or the list `exclude` in the card's metadata, stays in any case. The
    folder itself is not changed.

    Raises FileNotFoundError if configuration, card or weights are missing; ValueError if weights are pickled, broken
    or excluded, the card's metadata is invalid, a file holds what looks like a secret, or, with code, the
    architecture is not one of this package's.
    """
    check_folder(folder)
    card = read_card(folder)
    pictures = shown_pictures(card, folder)
    rules = [*ignore_rules(folder), *card_rules(card.data.to_dict().get("exclude"), folder)]
    contents = Contents(hints=tuple(f"{CARD}: {hint}" for hint in card_hints(card)))
    weights = weight_files(folder)
    for name in [*sorted(path.name for path in folder.iterdir()), *(name for name in pictures if "/" in name)]:
        path = folder / name
        reason = reason_to_stay(path, name, rules, with_code)
        wanted = name in weights or name in pictures or any(fnmatchcase(name, part) for part in PARTS)
        if reason is None and not (wanted or name == CARD):
            reason = "no part of a model"
        if reason is None:
            contents.add(name, path)
        else:
            contents.left_out[name + "/" * path.is_dir()] = reason
    check_parts(contents, [CONFIG, CARD, *weights], folder)
    if TOKENIZER_CONFIG not in contents.files:
        contents.hints += ("no tokenizer, so no pipeline works; save it into the folder too, by its save_pretrained",)
    adapt_configurations(contents, with_code)
    check_secrets(contents)
    return contents


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError if there is no folder, or no model in it."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder={str(folder)!r} is no folder; give the one that training or save_pretrained wrote."
        )
    if not (folder / CONFIG).is_file():
        mend = "give a folder that training or save_pretrained wrote"
        checkpoints = sorted(folder.glob(f"checkpoint-*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
        if checkpoints:
            mend = f"give one of its checkpoints, such as {str(checkpoints[-1].parent)!r}"
        if (folder / ADAPTER_CONFIG).is_file():
            mend = "it is an adapter, so merge it and save the whole model: model.merge_and_unload().save_pretrained"
        raise FileNotFoundError(f"folder={str(folder)!r} holds no {CONFIG}; {mend}.")


def reason_to_stay(path: Path, name: str, rules: list[Rule], with_code: bool) -> str | None:
    """Why a file may not go whatever it is, None if it may."""
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    last = next((rule for rule in reversed(rules) if rule.matches(name + "/" * path.is_dir())), None)
    if last is not None and not last.keeps:
        return f"excluded by {last.origin}"
    if path.is_dir():
        return "checkpoint of the training" if name.startswith("checkpoint-") else "folder"
    if is_training_state(name):
        return "record of the training"
    refuse_pickle(path)
    if path.suffix == ".py":
        return "hf_efficient's own code goes instead" if with_code else "code"
    return None


def check_parts(contents: Contents, needed: list[str], folder: Path) -> None:
    """Raises ValueError if something that a model cannot do without is excluded."""
    for name in needed:
        if name not in contents.files:
            raise ValueError(
                f"folder={str(folder)!r}: {name} is {contents.left_out[name]}, and a model cannot do without it; "
                "take that rule away."
            )


def adapt_configurations(contents: Contents, with_code: bool) -> None:
    """Let the configurations say where the code is: in the repository, or nowhere; and add the code itself."""
    config = read_json(contents.files[CONFIG])
    classes = architecture_classes(config.get("model_type")) if with_code else {}
    write_auto_map(contents, CONFIG, config, {name: reference_to(cls) for name, cls in classes.items()})
    shipped = set(classes.values())
    if TOKENIZER_CONFIG in contents.files:
        tokenizer = read_json(contents.files[TOKENIZER_CONFIG])
        own = tokenizer_class(tokenizer.get("tokenizer_class")) if with_code else None
        write_auto_map(
            contents, TOKENIZER_CONFIG, tokenizer, {"AutoTokenizer": [reference_to(own), None]} if own else {}
        )
        shipped |= set() if own is None else {own}
    for name, source in code_files(shipped).items():
        contents.add(name, source, "licence of the code" if name == CODE_LICENSE else "code of the architecture")


def read_json(upload: Upload) -> dict[str, Any]:
    """A configuration. Raises ValueError if it is no JSON object."""
    try:
        content = json.loads(upload.text())
    except ValueError as error:
        raise ValueError(f"{upload.name} is no JSON ({error}); save the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{upload.name} holds no JSON object; save the model again.")
    return content


def write_auto_map(contents: Contents, name: str, config: dict[str, Any], auto_map: dict[str, Any]) -> None:
    """Put `auto_map` in the place of the one that a configuration has; {} takes it out."""
    if config.get("auto_map", {}) == auto_map:
        return
    changed = {key: value for key, value in config.items() if key != "auto_map"}
    changed |= {"auto_map": auto_map} if auto_map else {}
    text = json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    contents.add(name, text.encode(), "auto_map added" if auto_map else "auto_map removed")


def check_secrets(contents: Contents) -> None:
    """Raises ValueError if a file that is to go, the weights apart, holds what looks like a token or a key."""
    texts = (upload for upload in contents.files.values() if not upload.name.endswith(".safetensors"))
    for upload in texts:
        for kind, line in found_secrets(upload.read().decode("utf-8", errors="replace")):
            raise ValueError(
                f"{upload.name}, line {line}, holds what looks like {kind}; take it out before publishing, and have "
                "it replaced if it was real."
            )


def found_secrets(text: str) -> Iterator[tuple[str, int]]:
    """Kind and line of whatever looks like a token or a key."""
    for kind, pattern in SECRETS.items():
        for match in pattern.finditer(text):
            yield kind, text.count("\n", 0, match.start()) + 1
