"""Weights, outputs and gradients of tensor2tensor's Evolved Transformer: every case under the golden folder agrees.

A case is one file; everything comes from its content. Files of other models have another `kind` and are left to their
own tests. Blocks that normalise after the sum are not built, and must be refused with the documented error.
"""

import pytest
import torch
from conversion.tensor2tensor_cases import (
    OUTPUT_ATOL,
    assert_all_gradients,
    assert_close,
    files,
    load,
    read,
    real,
    run_embedded,
    under,
)
from torch.nn import functional as F

from hf_efficient.conversion.tensor2tensor import read_settings

FOUND = {path: read(path)[0] for path in files() if (read(path)[0] or {}).get("kind", "").startswith("et_")}

CASES = {path: settings for path, settings in FOUND.items() if (settings["pre"], settings["post"]) == ("n", "da")}


def of_kinds(*kinds: str) -> list:
    return [pytest.param(path, id=path.stem) for path, settings in CASES.items() if settings["kind"] in kinds]


BARE = of_kinds("et_encoder", "et_decoder")
DECODERS = of_kinds("et_decoder")
# Whatever else there is has embeddings, or must be refused by the converter.
WHOLE = [pytest.param(path, id=path.stem) for path in CASES if path not in [case.values[0] for case in BARE]]

both_implementations = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
both_dtypes = pytest.mark.parametrize("dtype", OUTPUT_ATOL, ids=str)


def test_cases_are_found():
    """An empty golden folder would make every test below pass."""
    assert FOUND


@both_implementations
@both_dtypes
@pytest.mark.parametrize("path", BARE)
def test_outputs_and_gradients(path, dtype, attn_implementation):
    """States; gradients of the inputs, the encoder's output and every weight."""
    _, arrays = read(path)
    model = load(path, dtype, attn_implementation)
    inputs = under(arrays, "in/", dtype)
    sources = {name: inputs[name].requires_grad_() for name in ("x", "enc") if name in inputs}
    states = run_embedded(model, inputs).last_hidden_state
    assert_close(real(states, inputs), real(arrays["out/y"], inputs))
    (arrays["cotangent/y"].to(dtype) * states).sum().backward()
    assert_all_gradients(path, model, sources)


@pytest.mark.parametrize("chunk", [1, 5])
@both_implementations
@both_dtypes
@pytest.mark.parametrize("path", DECODERS)
@torch.no_grad()
def test_decoding(path, dtype, attn_implementation, chunk):
    """Through the cache token by token, as the reference did in `out/y_cached`, and in chunks."""
    _, arrays = read(path)
    model = load(path, dtype, attn_implementation)
    inputs = under(arrays, "in/", dtype)
    cache, states = None, []
    for x in inputs["x"].split(chunk, dim=1):
        num_read = x.shape[1] + (cache.get_seq_length() if cache else 0)
        so_far = {"x": x} | ({"mask": inputs["mask"][:, :num_read]} if "mask" in inputs else {})
        output = run_embedded(model, inputs | so_far, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        states.append(output.last_hidden_state)
    assert cache.get_seq_length() == inputs["x"].shape[1]
    for name in ("out/y_cached", "out/y"):
        if name in arrays:
            assert_close(real(torch.cat(states, dim=1), inputs), real(arrays[name], inputs))


def whole_inputs(settings: dict, arrays: dict) -> dict:
    """What the model is called with, but for the decoded text: a translation's source."""
    if settings["kind"] != "et_full":
        return {}
    ids = arrays["in/inputs"]
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@both_implementations
@both_dtypes
@pytest.mark.parametrize("path", WHOLE)
@torch.no_grad()
def test_whole_models(path, dtype, attn_implementation):
    """Logits, the loss, and logits token by token. tensor2tensor begins a text with a zero vector: its pad's."""
    settings, arrays = read(path)
    model = load(path, dtype, attn_implementation)
    expected, targets = under(arrays, "out/"), arrays["in/targets"]
    labels = targets.masked_fill(targets == 0, -100)
    shifted = F.pad(targets[:, :-1], (1, 0))
    source = whole_inputs(settings, arrays)
    decoded = "decoder_input_ids" if source else "input_ids"
    output = model(**source, **{decoded: shifted}, labels=labels, **({} if source else {"shift_labels": labels}))
    assert_close(output.logits, expected["logits"])
    assert_close(output.loss, expected["loss_training"])
    cache, logits = None, []
    for ids in shifted.split(1, dim=1):
        output = model(**source, **{decoded: ids}, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), expected["logits"])


def test_other_orders_of_norm_and_sum_are_refused():
    for settings in (settings for path, settings in FOUND.items() if path not in CASES):
        with pytest.raises(ValueError, match="pre and post = .* have no counterpart"):
            read_settings(settings)
