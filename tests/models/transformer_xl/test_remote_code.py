"""A checkpoint that carries its own code loads where this package is not installed."""

import json
import re

import pytest
from models.remote_code import run_script

# The classes that one run saves, and the Auto class each is loaded through. Saving with code changes the classes for
# the rest of the process, hence another process.
SAVE = """
import sys
from pathlib import Path

import torch
from models.transformer_xl.small_models import VARIANTS, random_ids, small_model

import hf_efficient
from hf_efficient import TransformerXLConfig

folder = Path(sys.argv[1])
AUTO = {
    "TransformerXLModel": "AutoModel",
    "TransformerXLForCausalLM": "AutoModelForCausalLM",
    "TransformerXLForSequenceClassification": "AutoModelForSequenceClassification",
    "TransformerXLForTokenClassification": "AutoModelForTokenClassification",
}
TransformerXLConfig.register_for_auto_class()
for name, auto in AUTO.items():
    cls = getattr(hf_efficient, name)
    cls.register_for_auto_class(auto)
    for variant in ("plain", "everything"):
        model = small_model(cls, **VARIANTS[variant])
        target = folder / f"{auto}.{variant}"
        model.save_pretrained(target)
        ids = random_ids(1, 6)
        first, second = ids[:, :4], ids[:, 4:]
        with torch.no_grad():
            cache = model.model.create_cache() if hasattr(model, "model") else model.create_cache()
            outputs = [model(part, past_key_values=cache)[0] for part in (first, second)]
        expected = {"first": first, "second": second, "outputs": outputs}
        if auto == "AutoModelForCausalLM":
            expected["generated"] = model.generate(first, max_new_tokens=8, pad_token_id=0)
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
    auto = getattr(transformers, target.name.split(".")[0])
    model, info = auto.from_pretrained(
        target, trust_remote_code=True, output_loading_info=True, dtype=torch.float64
    )
    assert not any(info.values()), (target.name, info)
    expected = torch.load(target / "expected.pt", weights_only=True)
    with torch.no_grad():
        cache = model.create_cache()
        outputs = [model(expected[part], past_key_values=cache)[0] for part in ("first", "second")]
    for one, other in zip(outputs, expected["outputs"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    if "generated" in expected:
        generated = model.generate(expected["first"], max_new_tokens=8, pad_token_id=0)
        assert torch.equal(generated, expected["generated"])
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
        assert {"configuration_transformer_xl.py", "modeling_transformer_xl.py", "cache_transformer_xl.py"} <= files
        assert not any(name.endswith("_reference.py") or name == "__init__.py" for name in files)
        auto_map = json.loads((target / "config.json").read_text())["auto_map"]
        assert auto_map["AutoConfig"] == "configuration_transformer_xl.TransformerXLConfig"
        module, _, name = auto_map[target.name.split(".")[0]].partition(".")
        assert f"class {name}(" in (target / f"{module}.py").read_text()
        code = "\n".join(path.read_text() for path in target.glob("*.py"))
        assert not re.search(r"^\s*(from|import) hf_efficient", code, re.MULTILINE)


def test_every_class_loads_with_its_own_code_where_the_package_is_not_importable(saved, tmp_path):
    """Bits, memory, generation and the names on disk are those of the package."""
    modules = json.loads(run_script(LOAD, str(saved), tmp_path=tmp_path))
    assert len(modules) == 8
    assert all(module.startswith("transformers_modules.") for module in modules.values())
