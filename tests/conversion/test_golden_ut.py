"""Weights, outputs and gradients of tensor2tensor's Universal Transformer: every case under the golden folder agrees.

A case is one file; everything comes from its content. Files of other models have another `kind` and are left to their
own tests. A recurrence that is not supported must be refused with the documented error.
Ponder times agree exactly.
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
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.conversion.tensor2tensor import convert_tensor2tensor, read_settings
from hf_efficient.conversion.tensor2tensor_universal import RECURRENCES
from hf_efficient.models.universal_transformer.adaptive_computation import halting_step, initial_halting_state


def find_files() -> dict[str, list]:
    """Files by what is in them: cases to agree with, cases to refuse, traces."""
    found: dict[str, list] = {"agree": [], "refuse": [], "traces": []}
    for path in files():
        settings, arrays = read(path)
        if settings is None:
            cases = sorted({name.split("/")[0] for name in arrays})
            beside = [case for case in cases if path.with_name(f"{case}.npz").is_file()]
            found["traces"] += [pytest.param(path, case, id=f"{path.stem}-{case}") for case in beside]
        elif settings["kind"].startswith("ut_"):
            is_supported = settings["recurrence"] in RECURRENCES
            found["agree" if is_supported else "refuse"].append(pytest.param(path, id=path.stem))
    return found


FILES = find_files()
EMBEDDED = [case for case in FILES["agree"] if read(case.values[0])[0]["kind"] in ("ut_encoder", "ut_decoder")]
WHOLE = [case for case in FILES["agree"] if read(case.values[0])[0]["kind"] in ("ut_full", "ut_full_lm")]


def test_cases_are_found():
    """An empty golden folder would make every test below pass."""
    assert all(FILES.values())
    assert EMBEDDED
    assert WHOLE


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", OUTPUT_ATOL, ids=str)
@pytest.mark.parametrize("path", EMBEDDED)
def test_outputs_and_gradients(path, dtype, attn_implementation):
    """States, ponder times and remainders; gradients of the inputs, the encoder's output and every weight."""
    settings, arrays = read(path)
    model = load(path, dtype, attn_implementation)
    inputs, expected = under(arrays, "in/", dtype), under(arrays, "out/")
    sources = {name: inputs[name].requires_grad_() for name in ("x", "enc") if name in inputs}
    output = run_embedded(model, inputs)
    assert_close(real(output.last_hidden_state, inputs), real(expected["y"], inputs))
    target = (arrays["cotangent/y"].to(dtype) * output.last_hidden_state).sum()
    if settings["recurrence"] == "act":
        ponder_times, remainders = (per_token(expected[name], inputs["x"]) for name in ("ponder", "remainder"))
        assert torch.equal(output.ponder_times, ponder_times.to(output.ponder_times.dtype))
        assert_close(output.remainders, remainders)
        act_loss = model.config.ponder_cost * output.ponder_loss
        assert_close(act_loss, expected["act_loss"])
        target = target + act_loss
    target.backward()
    assert_all_gradients(path, model, sources)


def per_token(array: Tensor, embedded: Tensor) -> Tensor:
    """(B, L) of what may be one number a row."""
    return array if array.dim() == 2 else array[:, None].expand(embedded.shape[:2])


@pytest.mark.parametrize("dtype", OUTPUT_ATOL, ids=str)
@pytest.mark.parametrize(("path", "case"), FILES["traces"])
@torch.no_grad()
def test_traces(path, case, dtype):
    """Halting probabilities, weights and states of every step, and what goes into the last layer norm."""
    traces = under(read(path)[1], f"{case}/")
    case_path = path.with_name(f"{case}.npz")
    inputs = under(read(case_path)[1], "in/", dtype)
    model = load(case_path, dtype)
    before_norm = []
    for name, module in model.named_modules():
        if name.endswith("final_norm"):
            module.register_forward_pre_hook(lambda _, arguments: before_norm.append(arguments[0]))
    output = run_embedded(model, inputs, output_step_hidden_states=True)
    probabilities, states = output.halting_probabilities, output.step_hidden_states[1:]
    steps = halting_steps(probabilities, model.config)
    assert len(probabilities) == len(states) >= len(traces["p"])
    for step, (live, weights) in enumerate(steps[: len(traces["p"])]):
        assert_close(real(states[step], inputs), real(traces["state"][step], inputs))
        # Ours are 0 where a position has halted.
        probability = per_token(traces["p"][step], inputs["x"]) * live
        assert_close(real(probabilities[step], inputs), real(probability, inputs))
        assert_close(real(weights, inputs), real(per_token(traces["weight"][step], inputs["x"]), inputs))
    last = before_norm[-1] if before_norm else output.last_hidden_state
    assert_close(real(last, inputs), real(traces["pre_final_norm"], inputs))


def halting_steps(probabilities: Tensor, config) -> list[tuple[Tensor, Tensor]]:
    """Of every step who takes it, and what its state counts in the output."""
    state = initial_halting_state(torch.ones_like(probabilities[0], dtype=torch.bool), probabilities.dtype)
    steps = []
    for step, probability in enumerate(probabilities):
        live = state.live
        state, weights = halting_step(
            state,
            probability,
            step=step,
            num_steps=config.max_steps,
            threshold=config.halting_threshold,
            force_final_halt=config.force_final_halt,
        )
        steps.append((live, weights))
    return steps


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", OUTPUT_ATOL, ids=str)
@pytest.mark.parametrize("path", WHOLE)
@torch.no_grad()
def test_whole_models(path, dtype, attn_implementation):
    """Logits and both parts of the loss. tensor2tensor begins a decoded text with a zero vector: its pad's."""
    settings, arrays = read(path)
    model = load(path, dtype, attn_implementation)
    expected, targets = under(arrays, "out/"), arrays["in/targets"]
    labels = targets.masked_fill(targets == 0, -100)
    shifted = F.pad(targets[:, :-1], (1, 0))
    if settings["kind"] == "ut_full":
        ids = arrays["in/inputs"]
        output = model(ids, attention_mask=(ids != 0).long(), decoder_input_ids=shifted, labels=labels)
    else:
        output = model(shifted, labels=labels, shift_labels=labels)
    assert_close(output.logits, expected["logits"])
    loss = expected["loss_training"]
    if "loss_act_loss" in expected:
        assert_close(model.config.ponder_cost * output.ponder_loss, expected["loss_act_loss"])
        assert_close(output.task_loss, loss)
        loss = loss + expected["loss_act_loss"]
    assert_close(output.loss, loss)


@pytest.mark.parametrize("path", FILES["refuse"])
def test_other_recurrences_are_refused_by_name(path):
    settings, arrays = read(path)
    with pytest.raises(ValueError, match=f"recurrence={settings['recurrence']!r} is not supported: no table of the"):
        read_settings(settings)
    with pytest.raises(ValueError, match="is not supported"):
        convert_tensor2tensor(settings, under(arrays, "w/"))
