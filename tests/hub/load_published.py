"""A program for a process of its own: load models from the Hub and compare them with what they computed at home.

    python load_published.py EXPECTED trust|train|installed|push

EXPECTED: a folder with files named OWNER--NAME--AUTOCLASS.safetensors. `installed` imports hf_efficient; `trust` must
not find it, and takes the code from the repository; `train` goes on to train and save with that code, which needs
accelerate. `push` is `installed`, and lets each model push itself too, to NAME-pushed. Prints, as JSON, the module of
each model's class.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers.dynamic_module_utils import get_class_from_dynamic_module

INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


def load_and_compare(path: Path, trains: bool = False, pushes: bool = False, **trust: bool) -> str:
    """Load one repository's model and tokenizer, compare, and return the name of the model's module."""
    owner, name, auto_class = path.stem.split("--")
    repo_id, expected = f"{owner}/{name}", load_file(path)
    model, info = getattr(transformers, auto_class).from_pretrained(repo_id, output_loading_info=True, **trust)
    assert not any(info.values()), (repo_id, info)
    with torch.no_grad():
        output = model(**{name: expected[name] for name in INPUTS if name in expected})[0]
    torch.testing.assert_close(output, expected["output"], rtol=1e-9, atol=1e-10)
    if "generated" in expected:
        generated = model.generate(expected["input_ids"], max_new_tokens=8, pad_token_id=0, eos_token_id=None)
        assert torch.equal(generated, expected["generated"]), repo_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo_id, **trust)
    assert tokenizer("w3 w5").input_ids == [3, 5]
    for reference in model.config.auto_map.values() if trust else ():
        assert get_class_from_dynamic_module(reference, repo_id).__name__ in reference
    if trains:
        check_training(model, expected["input_ids"], Path("trained", name))
    if pushes:
        model.push_to_hub(f"{name}-pushed")
        check_same(type(model).from_pretrained(f"{owner}/{name}-pushed"), model)
    return type(model).__module__


def check_training(model: transformers.PreTrainedModel, ids: torch.Tensor, folder: Path) -> None:
    """The Trainer finds each token's own label where it smooths them; what is saved has its code and loads again."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.3)
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(folder, label_smoothing_factor=0.3, **settings)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    loss = trainer.compute_loss(model.eval(), {"input_ids": ids, "labels": ids.clone()})
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    trainer.train()
    trainer.save_model()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    check_same(again, model)


def check_same(one: transformers.PreTrainedModel, other: transformers.PreTrainedModel) -> None:
    """Class and weights are equal."""
    assert type(one).__name__ == type(other).__name__
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    if sys.argv[2] in ("installed", "push"):
        import hf_efficient  # noqa: F401

        options = {"pushes": sys.argv[2] == "push"}
    else:
        assert importlib.util.find_spec("hf_efficient") is None, "hf_efficient can be imported here"
        options = {"trust_remote_code": True, "trains": sys.argv[2] == "train"}
    print(json.dumps({path.stem: load_and_compare(path, **options) for path in sorted(Path(sys.argv[1]).iterdir())}))
