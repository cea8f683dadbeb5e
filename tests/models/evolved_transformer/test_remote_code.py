"""A checkpoint that carries its own code loads where this package is not installed."""

import json

import pytest
from models.remote_code import run_script

# The classes that one run saves, and the Auto class each is loaded through. Saving with code changes the classes for
# the rest of the process, hence another process.
SAVE = """
import sys
from pathlib import Path

import torch
from models.evolved_transformer.small_models import random_ids, small_model
from models.evolved_transformer.whole_models import STACKS

import hf_efficient
from hf_efficient import EvolvedTransformerConfig

folder = Path(sys.argv[1])
AUTO = {
    "EvolvedTransformerModel": ("AutoModel", "both"),
    "EvolvedTransformerEncoderModel": ("AutoModelForTextEncoding", "encoder"),
    "EvolvedTransformerForCausalLM": ("AutoModelForCausalLM", "decoder"),
    "EvolvedTransformerForConditionalGeneration": ("AutoModelForSeq2SeqLM", "both"),
    "EvolvedTransformerForSequenceClassification": ("AutoModelForSequenceClassification", "encoder"),
}
EvolvedTransformerConfig.register_for_auto_class()
for name, (auto, stacks) in AUTO.items():
    cls = getattr(hf_efficient, name)
    cls.register_for_auto_class(auto)
    model = small_model(cls, **STACKS[stacks])
    target = folder / auto
    model.save_pretrained(target)
    ids = random_ids(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if stacks == "both":
        inputs["decoder_input_ids"] = random_ids(2, 7, seed=2)
    with torch.no_grad():
        expected = {"inputs": inputs, "output": model(**inputs)[0]}
    if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        expected["generated"] = model.generate(ids, max_new_tokens=8, pad_token_id=0)
    torch.save(expected, target / "expected.pt")
"""
LOAD = """
import json
import sys
from pathlib import Path

sys.modules["hf_efficient"] = None  # not importable, as where it was never installed

import torch
import transformers
from safetensors.torch import load_file

result = {}
for target in sorted(Path(sys.argv[1]).iterdir()):
    auto = getattr(transformers, target.name)
    model, info = auto.from_pretrained(
        target, trust_remote_code=True, output_loading_info=True, dtype=torch.float64
    )
    assert not any(info.values()), (target.name, info)
    expected = torch.load(target / "expected.pt", weights_only=True)
    with torch.no_grad():
        output = model(**expected["inputs"])
    torch.testing.assert_close(output[0], expected["output"], rtol=1e-9, atol=1e-10)
    if "generated" in expected:
        generated = model.generate(expected["inputs"]["input_ids"], max_new_tokens=8, pad_token_id=0)
        assert torch.equal(generated, expected["generated"])
    # Gradients, whose code is another than that of outputs.
    model.train()(**expected["inputs"])[0].square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    again = target.parent.parent / "again" / target.name
    model.save_pretrained(again)
    one, other = load_file(target / "model.safetensors"), load_file(again / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    result[target.name] = type(model).__module__
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    run_script(SAVE, str(folder / "saved"), tmp_path=folder)
    return folder / "saved"


def test_saved_folder_holds_the_code_and_says_where(saved):
    for target in saved.iterdir():
        files = {path.name for path in target.iterdir()}
        assert {
            "configuration_evolved_transformer.py",
            "modeling_evolved_transformer.py",
            "layers_evolved_transformer.py",
            "cache_evolved_transformer.py",
            "conv_branches.py",
            "presets.py",
        } <= files
        assert not any(name.endswith("_reference.py") or name == "__init__.py" for name in files)
        auto_map = json.loads((target / "config.json").read_text())["auto_map"]
        assert auto_map["AutoConfig"] == "configuration_evolved_transformer.EvolvedTransformerConfig"
        assert auto_map[target.name].startswith(("modeling", "language_models", "heads"))
        lines = [line for path in target.glob("*.py") for line in path.read_text().splitlines()]
        assert not any("hf_efficient" in line and "# Copied from" not in line for line in lines)


def test_every_class_loads_with_its_own_code_where_the_package_is_not_importable(saved, tmp_path):
    """Outputs, gradients, generation and the names on disk are those of the package."""
    modules = json.loads(run_script(LOAD, str(saved), tmp_path=tmp_path))
    assert len(modules) == 5
    assert all(module.startswith("transformers_modules.") for module in modules.values())
