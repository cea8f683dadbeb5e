"""A model card from a finished run: every figure in it comes from the run's own report.json."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

PICTURES = {
    "loss.png": "Loss of training and validation against updates",
    "memory.png": "Bits per byte against memory length",
}
# The section of the card with a program, and the name by which that loads the model.
USAGE = re.compile(r"^## How to use it\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
LOADED_MODEL = re.compile(r'^model = \w+\.from_pretrained\("([^"]*)"', re.MULTILINE)
# What a report must hold for a card to be written; see `hf-efficient train`.
REQUIRED = (
    "architecture",
    "parameters",
    "command",
    "settings",
    "steps",
    "train_tokens",
    "data",
    "hardware",
    "versions",
)


@dataclass(frozen=True)
class Task:
    """What a card says of a task, and the figures of the validation that it shows.

    template: file beside this one. pipeline_tag: the Hub's name of the task. metrics: key in the report, what the Hub
    calls it, label in the card, format.
    """

    name: str
    template: str
    pipeline_tag: str
    tags: tuple[str, ...]
    metrics: tuple[tuple[str, str, str, str], ...]


LOSS = ("loss", "loss", "Loss (nats per token)", "{:.4f}")
PERPLEXITY = ("perplexity", "perplexity", "Perplexity per token", "{:.2f}")
STEPS = ("ponder_time", "ponder_time", "Steps per token", "{:.2f}")
TASKS = {
    "language_modeling": Task(
        "Language modelling",
        "model_card_template.md",
        "text-generation",
        (),
        (LOSS, PERPLEXITY, ("bits_per_byte", "bits_per_byte", "Bits per byte", "{:.4f}")),
    ),
    "translation": Task(
        "Translation",
        "pair_card_template.md",
        "translation",
        (),
        (LOSS, PERPLEXITY, ("bleu", "bleu", "BLEU", "{:.2f}")),
    ),
    "conversation": Task(
        "Conversation", "pair_card_template.md", "text-generation", ("conversational",), (LOSS, PERPLEXITY)
    ),
}


@dataclass(frozen=True)
class Paper:
    """What a card says of an architecture. reading: how it reads a long text; tags: beside the architecture's own."""

    name: str
    authors: str
    arxiv: str
    reading: str
    tags: tuple[str, ...] = ()


PAPERS = {
    "transformer_xl": Paper(
        "Transformer-XL",
        "Dai et al. 2019",
        "1901.02860",
        "It reads text segment by segment and carries a memory of the segments before along.",
        ("long-context",),
    ),
    "reformer": Paper(
        "Reformer",
        "Kitaev et al. 2020",
        "2001.04451",
        "It reads long segments at once: hashing finds the tokens that each token attends to, and reversible layers "
        "keep the memory of training independent of depth.",
        ("long-context",),
    ),
    "universal_transformer": Paper(
        "Universal Transformer",
        "Dehghani et al. 2019",
        "1807.03819",
        "It repeats the same layers on a segment; with halting, every token decides after how many steps it is done.",
    ),
    "evolved_transformer": Paper(
        "Evolved Transformer",
        "So et al. 2019",
        "1901.11117",
        "It reads each segment at once, by blocks that a search found: convolutions beside attention.",
    ),
    "act_rnn": Paper(
        "recurrent",
        "Graves 2016",
        "1603.08983",
        "It reads token by token and carries its state along; with halting, it decides how many steps each takes.",
    ),
}
# The reference form of LSH attention is not quite causal: later tokens move the borders of its chunks.
LEAKY_LAYER = "lsh"
# Settings that name one file.
PAIR_FILES = (
    *("source_text", "target_text", "pairs", "conversations"),
    *("validation_source", "validation_target", "validation_pairs", "validation_conversations"),
)
# Texts whose name says little, and the language of those that are in one.
TEXTS = {"python-docs": "the Python language reference (python-docs)"}
LANGUAGES = {"python-docs": "en", "Salesforce/wikitext": "en"}
DATASET_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+")


def write_model_card(
    run_folder: str | Path, license: str = "unknown", language: str | list[str] | None = None
) -> Path:
    """Write README.md, the model card, into the folder of a finished run and return its path.

    The card holds valid Hub metadata (licence, language, library, task, tags, datasets that have a name on the Hub,
    and the measured results as a model index), the results with what they were measured on, code that loads the
    model, settings, hardware, the command that repeats the run, the curves, and the model's limits.

    run_folder: as a relative path it is also what the card's program loads, until the model has a name on the Hub.
    license: identifier of the Hub's list, such as "apache-2.0"; the licence of a model is its maker's to choose.
    language: of the text, as a code such as "en", or several; None leaves it out unless the text is a known one.

    Raises FileNotFoundError if the folder has no report.json, ValueError if that is damaged or of an unfinished run.
    """
    folder = Path(run_folder)
    report = read_finished_report(folder)
    task = task_of(report)
    text = describe_text(report["data"]["text"])
    card = ModelCard.from_template(
        card_data(folder, report, license, language),
        template_path=str(Path(__file__).parent / task.template),
        report=report,
        task=report.get("task"),
        paper=PAPERS[report["architecture"]],
        leaks=LEAKY_LAYER in read_layer_types(folder),
        model_name=folder.resolve().name,
        place=folder.resolve().name if folder.is_absolute() else folder.as_posix(),
        results=result_rows(report),
        progress=progress_rows(report),
        settings=settings_rows(report["settings"]),
        text=TEXTS.get(text, text),
        origin=describe_origin(report),
        pictures={file: text for file, text in PICTURES.items() if (folder / file).is_file()},
    )
    path = folder / "README.md"
    card.save(path)
    return path


def adapt_usage(card: str, name: str, with_code: bool) -> str:
    """A card whose program under "How to use it" loads the model by another name.

    card: the whole text. name: on the Hub. with_code: the repository holds the code, so that the program needs
    `trust_remote_code=True` and no hf_efficient. A card without such a section is returned as it is.
    """
    section = USAGE.search(card)
    model = LOADED_MODEL.search(section[0]) if section else None
    if section is None or model is None:
        return card
    load = f'from_pretrained("{name}"{", trust_remote_code=True" if with_code else ""})'
    call = re.compile(rf'from_pretrained\("{re.escape(model[1])}"(?:, trust_remote_code=True)?\)')
    program = call.sub(load, section[0]).replace(
        f"hf-efficient generate {model[1]} ", f"hf-efficient generate {name} "
    )
    if with_code:
        program = re.sub(r"^import hf_efficient\b.*\n", "", program, flags=re.MULTILINE)
    return card[: section.start()] + program + card[section.end() :]


def read_finished_report(folder: Path) -> dict[str, Any]:
    """The run's report.json, checked for what a card needs."""
    path = folder / "report.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"run_folder={str(folder)!r} holds no report.json; give a folder of `hf-efficient train`."
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); run the training again.") from error
    missing = [name for name in REQUIRED if name not in report]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: the run did not finish; go on with it by --resume.")
    if report["architecture"] not in PAPERS:
        raise ValueError(
            f"architecture={report['architecture']!r} in {path} is unknown; known are {', '.join(PAPERS)}."
        )
    return report


def task_of(report: dict[str, Any]) -> Task:
    """What the model was trained for. Raises ValueError if the report names an unknown task."""
    name = report.get("task", "language_modeling")
    if name not in TASKS:
        raise ValueError(f"task={name!r} in report.json is unknown; known are {', '.join(TASKS)}.")
    return TASKS[name]


def read_layer_types(folder: Path) -> list[str]:
    """The attention of each layer, as far as the model's configuration names it."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("attn_layers", []) if path.is_file() else []


def card_data(
    folder: Path, report: dict[str, Any], license: str, language: str | list[str] | None = None
) -> ModelCardData:
    """The metadata at the head of the card."""
    texts = report["data"]["text"]
    known = sorted({LANGUAGES[text] for text in texts if text in LANGUAGES})
    paper, task = PAPERS[report["architecture"]], task_of(report)
    return ModelCardData(
        license=license,
        language=language or known or None,
        datasets=[text for text in texts if is_dataset(text)] or None,
        library_name="transformers",
        pipeline_tag=task.pipeline_tag,
        base_model=base_model(report),
        tags=[
            *("hf_efficient", report["architecture"].replace("_", "-")),
            *(*paper.tags, *task.tags, f"arxiv:{paper.arxiv}"),
        ],
        model_name=folder.resolve().name,
        eval_results=eval_results(report),
    )


def base_model(report: dict[str, Any]) -> str | None:
    """The name on the Hub of the model that the training began with."""
    source = report.get("pretrained")
    return source if source is not None and is_dataset(source) else None


def describe_origin(report: dict[str, Any]) -> str:
    """What the training began with."""
    source = report.get("pretrained")
    return "from scratch" if source is None else f"further from the weights of {describe_text([source])}"


def is_dataset(text: str) -> bool:
    """Whether a text is named as on the Hub, and is no file or folder here."""
    return DATASET_NAME.fullmatch(text) is not None and not Path(text).suffix and not Path(text).exists()


def eval_results(report: dict[str, Any]) -> list[EvalResult] | None:
    """The validation figures for the model index; None if the run measured none."""
    figures = report.get("validation")
    if figures is None:
        return None
    text, task = describe_text(figures["text"]), task_of(report)
    return [
        EvalResult(
            task_type=task.pipeline_tag,
            task_name=task.name,
            dataset_type=text,
            dataset_name=text,
            dataset_split="validation",
            metric_type=metric,
            metric_name=label.removesuffix(" per token"),
            metric_value=round(figures[key], 4),
        )
        for key, metric, label, _ in task.metrics
        if key in figures and key != "loss"
    ]


def result_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and figure of each result, for the table in the card."""
    figures = report.get("validation")
    if figures is None:
        return []
    rows = [(label, form.format(figures[key])) for key, _, label, form in task_of(report).metrics if key in figures]
    if "ponder_time" in figures:
        rows.append((STEPS[2], f"{figures['ponder_time']:.2f} ± {figures['ponder_time_std']:.2f}"))
    if "bits_per_byte_without_memory" in report:
        rows.append(("Bits per byte, memory off", f"{report['bits_per_byte_without_memory']:.4f}"))
    return rows


def progress_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Updates and figures of each validation while training, under their header; [] if there was one at most.

    Of many validations about ten are shown, evenly spread, the last among them.
    """
    entries = {entry["step"]: entry for entry in report.get("history", []) if "eval_loss" in entry}
    if len(entries) < 2:
        return []
    known = (*task_of(report).metrics, STEPS)
    metrics = [metric for metric in known if all(f"eval_{metric[0]}" in entry for entry in entries.values())]
    rows = [
        (f"{step:,}", *(form.format(entry[f"eval_{key}"]) for key, _, _, form in metrics))
        for step, entry in sorted(entries.items())
    ]
    shown = rows[:: -math.ceil(len(rows) / 10)]
    return [("Updates", *(label for _, _, label, _ in metrics)), *reversed(shown)]


def settings_rows(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each setting, ready for a table; those of the model carry the prefix `model.`."""
    flat = {name: value for name, value in settings.items() if name != "model"}
    flat |= {f"model.{name}": value for name, value in settings.get("model", {}).items()}
    flat |= {name: describe_text(flat[name]) for name in ("text", "validation_text") if name in flat}
    flat |= {name: describe_text([flat[name]]) for name in PAIR_FILES if name in flat}
    flat |= {name: describe_text([flat[name]]) for name in ("pretrained", "tokenizer") if name in flat}
    return [(name, str(value).replace("|", "\\|")) for name, value in flat.items()]


def describe_text(source: list[str]) -> str:
    """The name of a text without the folders it lies in, which mean nothing to the reader of a card.

    A file that is named after its part alone, such as data/novel/train.txt, keeps the folder that says what of.
    """
    return ", ".join(_short_name(Path(name)) for name in source)


def _short_name(path: Path) -> str:
    if path.is_absolute() or path.suffix:
        is_part = path.stem in ("train", "valid", "validation", "test") and not path.is_absolute()
        return f"{path.parent.name}/{path.name}" if is_part and path.parent.name else path.name
    return str(path)
