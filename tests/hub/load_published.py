"""A program for a process of its own: load models from the Hub and compare them with what they computed at home.

    python load_published.py EXPECTED trust|installed

EXPECTED: a folder with files named OWNER--NAME--AUTOCLASS.safetensors. `installed` imports hf_efficient; `trust` must
not find it, and takes the code from the repository. Prints, as JSON, the module of each model's class.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


def load_and_compare(path: Path, **trust: bool) -> str:
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
    return type(model).__module__


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    if sys.argv[2] == "installed":
        import hf_efficient  # noqa: F401

        trust = {}
    else:
        assert importlib.util.find_spec("hf_efficient") is None, "hf_efficient can be imported here"
        trust = {"trust_remote_code": True}
    print(json.dumps({path.stem: load_and_compare(path, **trust) for path in sorted(Path(sys.argv[1]).iterdir())}))
