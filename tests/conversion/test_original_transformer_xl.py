"""What a checkpoint of the original release says becomes a configuration; what cannot be represented is refused."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from golden_utils import FIXTURES

from hf_efficient import TransformerXLConfig
from hf_efficient.conversion import original_transformer_xl
from hf_efficient.conversion.original_transformer_xl import read_original_checkpoint
from hf_efficient.conversion.restricted_pickle import InertRecord
from hf_efficient.conversion.restricted_reader import read_restricted

CASES = FIXTURES / "kimiyoung_xl"
PLAIN = CASES / "plain" / "model.pt"
ADAPTIVE = CASES / "adaptive3_div2_tied" / "model.pt"


def child(record: InertRecord, name: str) -> InertRecord:
    for part in name.split("."):
        record = record.fields["_modules"][part]
    return record


@pytest.fixture
def edited(monkeypatch) -> Callable:
    """A function that reads a checkpoint as if its module had been edited before it was saved.

    Storages whose key begins with "own" hold zeros.
    """

    def read(path, edit: Callable[[InertRecord], None]):
        saved = read_restricted(path)
        edit(saved.root)
        file = replace(
            saved,
            read_storage=lambda storage: (
                bytes(storage.num_bytes) if storage.key.startswith("own") else saved.read_storage(storage)
            ),
        )
        monkeypatch.setattr(original_transformer_xl, "read_restricted", lambda _: file)
        return read_original_checkpoint(path)

    return read


def test_weights_under_their_names_on_disk():
    reference = torch.load(ADAPTIVE.with_name("state_dict.pt"), weights_only=True)
    state_dict = read_original_checkpoint(ADAPTIVE).state_dict
    assert torch.equal(state_dict["crit.cluster_weight"], reference.pop("crit.cluster_weight").flip(0))
    assert torch.equal(state_dict["crit.cluster_bias"], reference.pop("crit.cluster_bias").flip(0))
    assert state_dict["crit.out_layers.1.weight"] is state_dict["transformer.word_emb.emb_layers.1.weight"]
    reference.pop("pos_emb.inv_freq")
    assert len(state_dict) == len(reference) + 2
    for name, tensor in reference.items():
        assert torch.equal(state_dict[name if name.startswith("crit.") else f"transformer.{name}"], tensor)


def test_settings_that_reset_length_changed(edited):
    def edit(root):
        root.fields.update(mem_len=640, clamp_len=400, same_length=True, dropout=0.3)
        child(root, "drop").fields["p"] = 0.1
        child(root, "layers.0.dec_attn.dropatt").fields["p"] = 0.2

    config = edited(PLAIN, edit).config
    assert (config.mem_len, config.clamp_len, config.same_length) == (640, 400, True)
    assert (config.dropout, config.attention_dropout) == (0.1, 0.2)
    assert (config.memory_init, config.untie_r) == ("empty", False)


def untie(record: InertRecord, name: str) -> None:
    """Give a parameter memory of its own."""
    parameters = record.fields["_parameters"]
    storage = replace(parameters[name].storage, key=f"own {id(record)} {name}")
    parameters[name] = replace(parameters[name], storage=storage)


def test_ties_are_told_by_shared_memory(edited):
    def edit(root):
        for index in range(4):
            untie(child(root, f"crit.out_layers.{index}"), "weight")
        untie(child(root, "crit.out_projs"), "2")

    tied, untied = read_original_checkpoint(ADAPTIVE), edited(ADAPTIVE, edit)
    assert tied.config.tie_projs == [False, True, True, True]
    assert tied.config.tie_word_embeddings
    assert untied.config.tie_projs == [False, True, False, True]
    assert not untied.config.tie_word_embeddings
    assert not untied.state_dict["crit.out_layers.1.weight"].any()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda root: root.fields.pop("n_head"), "attribute 'n_head' of module '' is missing or of another type"),
        (lambda root: root.fields.update(mem_len=True), "attribute 'mem_len' of module ''"),
        (lambda root: root.fields.update(same_length=1), "attribute 'same_length' of module ''"),
        (lambda root: root.fields.update(d_model="16"), "attribute 'd_model' of module ''"),
        (lambda root: root.fields["_modules"].pop("drop"), "attribute 'p' of module 'drop'"),
        (lambda root: root.fields.pop("_buffers"), "module '' is no module"),
        (lambda root: root.fields["_modules"].update(self=root), "module 'self' is no module, or contains itself"),
        (
            lambda root: child(root, "layers.0.pos_ff").fields["_modules"].pop("CoreNet"),
            "no feed-forward layers",
        ),
        (
            lambda root: untie(child(root, "crit.out_layers.2"), "weight"),
            "some tables of its softmax are tied",
        ),
        (
            lambda root: child(root, "word_emb").fields.update(cutoffs=["a", 24, 45, 70]),
            "is no MemTransformerLM of the original release.*cutoffs",
        ),
        (lambda root: root.fields.update(sample_softmax=100), "sample_softmax=100 is not supported"),
        (lambda root: root.fields.update(attn_type=1), r"attn_type=1 \(Shaw"),
        (lambda root: root.fields.update(n_layer=0), "num_hidden_layers=0 is not positive"),
    ],
)
def test_modules_that_cannot_be_represented(edited, edit, reason):
    with pytest.raises(ValueError, match=reason):
        edited(ADAPTIVE, edit)


# --- bare state dicts ---------------------------------------------------------------------------------------


def test_bare_state_dict_needs_a_configuration():
    path = PLAIN.with_name("state_dict.pt")
    with pytest.raises(ValueError, match="holds weights only.*give config"):
        read_original_checkpoint(path)
    whole = read_original_checkpoint(PLAIN)
    found = read_original_checkpoint(path, whole.config)
    assert found.config is whole.config
    assert found.state_dict.keys() == whole.state_dict.keys()
    assert all(torch.equal(tensor, whole.state_dict[name]) for name, tensor in found.state_dict.items())


def test_bare_state_dict_has_shared_biases():
    with pytest.raises(ValueError, match="set untie_r=False"):
        read_original_checkpoint(PLAIN.with_name("state_dict.pt"), TransformerXLConfig(untie_r=True))


def test_module_needs_no_configuration():
    with pytest.raises(ValueError, match="leave config out"):
        read_original_checkpoint(PLAIN, TransformerXLConfig())


@pytest.mark.parametrize(
    ("content", "kind"), [(torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"), ([1], "list"), ({}, "dict")]
)
def test_other_files(tmp_path, content, kind):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} holds a {kind}, not a MemTransformerLM")):
        read_original_checkpoint(path)
