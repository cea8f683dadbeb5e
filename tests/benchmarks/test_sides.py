"""The sides that run under this Python, at toy size: they do what the benchmarks think they do."""

import importlib
import os

import pytest
import torch
import xl_eval_window
import xl_legacy_check
from golden_utils import golden_cases
from harness import CheckFailed, Settings, Side
from ptb_sides import TrainOnPtb, text_file
from safetensors.torch import load_file
from transformer_windows import CachedWindow, RecomputeWindow
from transformer_xl_ours import Decode, EvaluateSegments, TrainStep

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "mem_len": 12,
}
WINDOW = {"vocab_size": 50, "width": 16, "num_heads": 2, "inner": 32, "num_layers": 2, "window": 12}
ONE_THREAD = Settings(threads=1)


def test_decode_step_goes_on_with_a_full_memory(tmp_path):
    side = Decode(SMALL, batch_size=2, prompt_len=20)
    assert side.memory.memory_length == 12
    side.run()
    assert side.memory.get_seq_length() == 21
    side.save_log_probs(str(tmp_path / "out.safetensors"), steps=3)
    log_probs = load_file(tmp_path / "out.safetensors")["log_probs"]
    assert log_probs.shape == (6, 50)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(6))


@pytest.mark.parametrize("autocast", [False, True])
def test_training_step_changes_weights_and_keeps_the_memory_full(autocast):
    side = TrainStep(SMALL, batch_size=2, segment_len=8, autocast=autocast)
    before = side.model.lm_head.weight.detach().clone()
    side.run()
    side.run()
    assert side.memory.memory_length == 12
    assert not torch.equal(side.model.lm_head.weight, before)
    assert all(parameter.grad is None for parameter in side.model.parameters())


def test_gradients_are_saved_under_the_names_of_files(tmp_path):
    side = TrainStep(SMALL | {"dropout": 0.0}, batch_size=2, segment_len=8)
    losses = side.save_gradients(str(tmp_path), segments=2)
    assert len(losses) == 2
    gradients = load_file(tmp_path / "model.safetensors")
    assert gradients["transformer.layers.1.dec_attn.qkv_net.weight"].shape == (48, 16)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_evaluated_segment_equals_single_tokens():
    side = EvaluateSegments(SMALL | {"same_length": True}, segment_len=8)
    assert side.memory.memory_length == 12
    assert side.run().shape == (1, 8)
    assert side.compare_with_single_tokens(count=8) < 1e-5


def test_recomputed_window_keeps_the_last_position():
    side = RecomputeWindow(**WINDOW)
    assert side.run().shape == (1, 50)
    assert side.check(length=10) < 1e-5


def test_cached_window_holds_no_more_than_the_window():
    side = CachedWindow(**WINDOW, segment_len=4)
    assert side.run().shape == (4,)
    assert side.memory.layers[0].keys.shape[2] == 11  # and the token itself


def test_both_evaluations_have_layers_of_one_size():
    sizes = [
        EvaluateSegments(SMALL, segment_len=8).count_parameters(),
        RecomputeWindow(**WINDOW).count_parameters(),
        CachedWindow(**WINDOW, segment_len=4).count_parameters(),
    ]
    assert max(sizes) / min(sizes) < 1.3


# --- checks ----------------------------------------------------------------------------------------------------------


class SameProcess:
    """A `Worker` without a process, which would spend its time on imports."""

    def __init__(self, side, threads):
        self.side = getattr(importlib.import_module(side.module), side.name)(**side.options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, method, **arguments):
        return getattr(self.side, method)(**arguments)


@pytest.fixture
def legacy_is_ours(monkeypatch):
    """Lets our side stand in for the legacy one, with the weights of a legacy checkpoint."""
    folder = next(case for case in golden_cases("hf_transfoxl") if (case / "model.safetensors").exists())

    def sides(name, options, settings):
        return Side("transformer_xl_ours", name, options), Side("transformer_xl_ours", name, options)

    monkeypatch.setattr(xl_legacy_check, "Worker", SameProcess)
    monkeypatch.setattr(xl_legacy_check, "sides", sides)
    monkeypatch.setattr(xl_legacy_check, "save_checkpoint", lambda model, target, settings: str(folder))
    return {"vocab_size": 30}


def test_check_of_decoding(legacy_is_ours, monkeypatch):
    arguments = {"batch_size": 2, "prompt_len": 9, "steps": 2, "settings": ONE_THREAD}
    found = xl_legacy_check.check_decode(legacy_is_ours, **arguments)
    assert found == {"largest log-probability difference": 0.0}
    monkeypatch.setattr(xl_legacy_check, "LOG_PROB_TOLERANCE", -1.0)
    with pytest.raises(CheckFailed, match="Log-probabilities of ours and legacy differ"):
        xl_legacy_check.check_decode(legacy_is_ours, **arguments)


def test_check_of_training(legacy_is_ours, monkeypatch):
    arguments = {"batch_size": 2, "segment_len": 6, "settings": ONE_THREAD}
    found = xl_legacy_check.check_training(legacy_is_ours, **arguments)
    assert found["gradients compared"] > 10
    assert found["largest gradient difference, relative"] < 1e-6
    monkeypatch.setattr(xl_legacy_check, "GRADIENT_TOLERANCE", -1.0)
    with pytest.raises(CheckFailed, match="Losses differ by .*, the gradient of"):
        xl_legacy_check.check_training(legacy_is_ours, **arguments)


def check_evaluation(model, monkeypatch, **window):
    monkeypatch.setattr(xl_eval_window, "Worker", SameProcess)
    ours = Side("transformer_xl_ours", "EvaluateSegments", {"model": SMALL | model, "segment_len": 16})
    return xl_eval_window.check(ours, Side("transformer_windows", "RecomputeWindow", WINDOW | window), ONE_THREAD)


def test_check_of_evaluation(monkeypatch):
    monkeypatch.setattr(xl_eval_window, "CHECKED_LEN", 10)
    large = {"hidden_size": 64, "intermediate_size": 256}
    found = check_evaluation(large | {"same_length": True}, monkeypatch, width=64, inner=256)
    assert found["segment against single tokens, largest loss difference"] < 1e-5
    # Without same_length the tokens of a segment see more than the memory, and single tokens do not.
    with pytest.raises(CheckFailed, match="Losses of a segment and of its tokens one by one differ by"):
        check_evaluation(large | {"initializer_range": 0.5}, monkeypatch, width=64, inner=256)
    with pytest.raises(CheckFailed, match="parameters: not the same size"):
        check_evaluation({"same_length": True}, monkeypatch, width=64, inner=256)


# --- Penn Treebank ---------------------------------------------------------------------------------------------------


def test_penn_treebank_run(tmp_path):
    lines = [" ".join(f"word{(i * j) % 23}" for j in range(9)) for i in range(200)]
    for split in ("train", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text("\n".join(lines) + "\n")
    side = TrainOnPtb(
        data=os.fspath(tmp_path),
        model={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        mem_len=8,
        training={"max_steps": 3, "seed": 0, "disable_tqdm": True},
        segment_len=4,
        lanes=5,
        folder=os.fspath(tmp_path / "run"),
    )
    assert side.describe()["train tokens"] == 200 * 10  # nine words and <eos>
    assert set(side.train()) == {"seconds_per_step", "loss"}
    with_memory, without = side.test_perplexity(8), side.test_perplexity(0)
    assert with_memory != without
    assert max(with_memory, without) < 100
    assert side.model.config.mem_len == 8


def test_missing_penn_treebank_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither ptb.train.txt nor ptb.train.txt.gz; give the folder"):
        text_file(os.fspath(tmp_path), "train")
