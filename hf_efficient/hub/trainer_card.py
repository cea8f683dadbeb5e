"""A model card from what transformers' own `Trainer` left in its folder."""

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .card_checks import CARD
from .contents import CONFIG, Upload, check_folder, read_json
from .model_card import LEAKY_LAYER, PAPERS, PICTURES, is_dataset, read_layer_types
from .remote_code import architecture_classes
from .weight_files import WEIGHTS_INDEX, weight_files

STATE = "trainer_state.json"
# How fast an evaluation was is no result of it.
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
GENERATE = """\
inputs = tokenizer("{text}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))"""
PIPELINE = 'print(pipeline("{task}", model=model, tokenizer=tokenizer)("{text}"))'
# By the end of the class's name: what the Hub calls the task, and a program that uses the model.
TASKS = {
    "ForCausalLM": ("text-generation", GENERATE.format(text="The ")),
    "ForConditionalGeneration": (None, GENERATE.format(text="A text to read.")),
    "ForMaskedLM": (
        "fill-mask",
        'print(pipeline("fill-mask", model=model, tokenizer=tokenizer)(tokenizer.mask_token))',
    ),
    "ForSequenceClassification": (
        "text-classification",
        PIPELINE.format(task="text-classification", text="A text to judge."),
    ),
    "ForTokenClassification": (
        "token-classification",
        PIPELINE.format(task="token-classification", text="A text to judge."),
    ),
    "ForQuestionAnswering": (
        "question-answering",
        'outputs = model(**tokenizer("Who?", "She did.", return_tensors="pt"))\n'
        "print(outputs.start_logits.argmax(), outputs.end_logits.argmax())",
    ),
    "Model": ("feature-extraction", PIPELINE.format(task="feature-extraction", text="A text.")),
}


def write_trainer_card(
    folder: str | Path,
    data: str,
    *,
    evaluated_on: str | None = None,
    base_model: str | None = None,
    license: str = "unknown",
    language: str | list[str] | None = None,
    pipeline_tag: str | None = None,
) -> Path:
    """Write README.md, the model card, into a folder of transformers' `Trainer` and return its path.

    The figures come from trainer_state.json, which the Trainer writes into each checkpoint, and into its own folder by
    `trainer.save_state()`. A picture loss.png is shown, such as `hf_efficient.plots.plot_loss` draws from
    `trainer.state.log_history`. Hardware and settings are for you to add. What a run of `hf-efficient train` left gets
    a fuller card by `write_model_card`.

    folder: where `trainer.save_model()` wrote the model, or a checkpoint.
    data: what the model was trained on: a name on the Hub, such as "Salesforce/wikitext", or words.
    evaluated_on: what the Trainer evaluated on, likewise; with it the results stand in the metadata too.
    base_model: the model on the Hub that it was fine-tuned from.
    license: identifier of the Hub's list, such as "apache-2.0".
    language: of the data, as a code such as "en", or several.
    pipeline_tag: what the Hub calls the task; None takes it from the model's class, where that tells.

    Raises FileNotFoundError if the folder holds no model or no state of a Trainer; ValueError if the model is none of
    this package's, or its class has several tasks.
    """
    folder = Path(folder)
    check_folder(folder)
    config = read_json(Upload(CONFIG, folder / CONFIG))
    classes = architecture_classes(config.get("model_type"))
    class_name, auto_class = saved_classes(config, classes)
    task, usage = next(task for end, task in TASKS.items() if class_name.endswith(end))
    task = pipeline_tag or task
    if task is None:
        raise ValueError(f'pipeline_tag is needed for a {class_name}: write "translation" or "summarization".')
    state = read_state(folder)
    architecture = classes["AutoConfig"].__module__.split(".")[-2]
    step, results = last_evaluation(state["log_history"], config, class_name)
    metadata = ModelCardData(
        license=license,
        language=language,
        datasets=[data] if is_dataset(data) else None,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag=task,
        tags=["hf_efficient", architecture.replace("_", "-"), f"arxiv:{PAPERS[architecture].arxiv}"],
        model_name=folder.resolve().name,
        eval_results=index_entries(results, task, evaluated_on) if evaluated_on else None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("trainer_card_template.md")),
        paper=PAPERS[architecture],
        parameters=count_parameters(folder),
        model_name=folder.resolve().name,
        base_model=base_model,
        data=data,
        evaluated_on=evaluated_on,
        evaluated_step=step,
        results=[(label, f"{value:.4f}") for label, value in results.items()],
        best=describe_best(state, step),
        pictures={file: text for file, text in PICTURES.items() if (folder / file).is_file()},
        auto_class=auto_class,
        usage=usage,
        training=training_rows(state, config),
        leaks=LEAKY_LAYER in read_layer_types(folder),
    )
    card.save(folder / CARD)
    return folder / CARD


def saved_classes(config: dict[str, Any], classes: dict[str, type]) -> tuple[str, str]:
    """The class that was saved, and the Auto class that loads it. Raises ValueError if config.json does not say."""
    name = (config.get("architectures") or [None])[0]
    for auto_class, found in sorted(classes.items()):
        if found.__name__ == name and auto_class != "AutoModelForPreTraining":
            return name, auto_class
    raise ValueError(
        f"config.json has architectures={config.get('architectures')!r}, no class of ours; save it again."
    )


def read_state(folder: Path) -> dict[str, Any]:
    """What the Trainer knew at its end: of the folder, or of the newest checkpoint in it."""
    paths = [folder / STATE, *sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda path: -path.stat().st_mtime)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no {STATE}; write it by trainer.save_state() after the training."
        )
    try:
        state = json.loads(path.read_text("utf-8"))
        return {"log_history": [], **state}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no state of a Trainer ({error}); call trainer.save_state() again.") from error


def last_evaluation(
    history: list[dict[str, Any]], config: dict[str, Any], class_name: str
) -> tuple[int, dict[str, float]]:
    """After how many updates the Trainer evaluated last, and what it measured; (0, {}) if it never did.

    A language model's loss is a perplexity too, unless the cost of pondering is part of it.
    """
    entry = next((entry for entry in reversed(history) if "eval_loss" in entry), None)
    if entry is None:
        return 0, {}
    names = [key.removeprefix("eval_") for key in entry if key.startswith("eval_")]
    found = {
        name.replace("_", " ").capitalize(): float(entry[f"eval_{name}"])
        for name in names
        if name not in SPEED and isinstance(entry[f"eval_{name}"], int | float)
    }
    if class_name.endswith("ForCausalLM") and config.get("halting", "none") == "none":
        found["Perplexity"] = math.exp(min(entry["eval_loss"], 700.0))
    return entry["step"], found


def index_entries(results: dict[str, float], task: str, evaluated_on: str) -> list[EvalResult] | None:
    """The results for the metadata; the loss is left to the table."""
    entries = [
        EvalResult(
            task_type=task,
            dataset_type=evaluated_on,
            dataset_name=evaluated_on,
            metric_type=label.lower().replace(" ", "_"),
            metric_name=label,
            metric_value=round(value, 4),
        )
        for label, value in results.items()
        if label != "Loss"
    ]
    return entries or None


def describe_best(state: dict[str, Any], step: int) -> str | None:
    """A sentence on the best evaluation where that was not the last."""
    best = state.get("best_global_step")
    if best in (None, 0, step) or state.get("best_metric") is None:
        return None
    return f"The best evaluation was after {best:,} updates: {state['best_metric']:.4f}."


def training_rows(state: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str]]:
    """What the Trainer recorded of the training, as label and words."""
    history = state["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    found = {
        "Updates": f"{state['global_step']:,}" if "global_step" in state else None,
        "Epochs": f"{state['epoch']:.4g}" if state.get("epoch") else None,
        "Examples per device and step": state.get("train_batch_size"),
        "Training loss": f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last" if losses else None,
        "Time": f"{seconds:,.0f} s" if seconds else None,
        "Versions": f"transformers {config['transformers_version']}" if "transformers_version" in config else None,
    }
    return [(label, str(value)) for label, value in found.items() if value is not None]


def count_parameters(folder: Path) -> int:
    """Numbers in the weights of a folder; tied ones are stored, and counted, once."""
    total = 0
    for name in weight_files(folder):
        if name != WEIGHTS_INDEX:
            with safe_open(folder / name, "pt") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total
