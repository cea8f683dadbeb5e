"""Checkpoints of the original PyTorch release (github.com/kimiyoung/transformer-xl) -> config and state dict.

The release saves the whole module, `torch.save(model)`, so its hyper-parameters are attributes of the module and of
its parts. The state dict comes out under the names of transformers 4, which are those on disk here too. They differ
from the release's by the prefix `transformer.` of the body, and by the order of the clusters: the release puts tail
bin i into column -i of the head's cluster logits, transformers 4 into column i - 1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..models.transformer_xl import TransformerXLConfig
from .restricted_pickle import InertRecord
from .restricted_reader import RestrictedFile, StoredTensor, is_state_dict, read_restricted

MODULE_NAME = "MemTransformerLM"

# Attributes of the module, by field of the configuration.
HYPERPARAMETERS = {
    "vocab_size": "n_token",
    "hidden_size": "d_model",
    "embedding_size": "d_embed",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "head_dim": "d_head",
    "mem_len": "mem_len",
    "clamp_len": "clamp_len",
    "attn_type": "attn_type",
    "sample_softmax": "sample_softmax",
}


@dataclass(frozen=True)
class OriginalCheckpoint:
    """What a checkpoint of the original release holds.

    Attributes:
        config: The configuration.
        state_dict: The weights under their names on disk; tied ones are the same tensor.
        notes: What the checkpoint says and the model does not represent, a sentence each.
    """

    config: TransformerXLConfig
    state_dict: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_original_checkpoint(path: str | Path, config: TransformerXLConfig | None = None) -> OriginalCheckpoint:
    """Read `model.pt`, or a bare state dict for which the configuration is given. Nothing in the file is run.

    Args:
        path: The file, in either of torch's containers.
        config: Configuration for a file that holds weights only. `memory_init` should be `"empty"`, and `untie_r` must
            be False.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or was changed; is no checkpoint of this release; has an attention other
            than `attn_type` 0, or a sampled softmax; is a bare state dict, and no configuration is given.
    """
    file = read_restricted(path)
    root = file.root
    if isinstance(root, InertRecord) and root.class_name.rpartition(".")[2] == MODULE_NAME:
        if config is not None:
            raise ValueError(f"{path} holds its own hyper-parameters; leave config out.")
        return _read_module(file)
    if is_state_dict(root):
        if config is None:
            raise ValueError(
                f"{path} holds weights only, and mem_len, clamp_len or the number of heads cannot be told from them; "
                "convert the model.pt beside it, or give config, a TransformerXLConfig or the path of its config.json."
            )
        if config.untie_r:
            raise ValueError("untie_r=True, but the original release shares u and v; set untie_r=False in config.")
        return OriginalCheckpoint(config, _state_dict(file, root))
    kind = root.class_name if isinstance(root, InertRecord) else type(root).__name__
    raise ValueError(f"{path} holds a {kind}, not a {MODULE_NAME}; give the model.pt of a Transformer-XL run.")


def _read_module(file: RestrictedFile) -> OriginalCheckpoint:
    modules, tensors = _walk(file)
    # Built before anything is read, so that an attention of another kind is refused by its name.
    try:
        config = TransformerXLConfig(**_hyperparameters(file.path, modules, tensors))
    except StrictDataclassError as error:
        raise _unusable(file.path, str(error)) from None
    notes = []
    ext_len = modules[""].get("ext_len")
    if isinstance(ext_len, int) and ext_len > 0:
        notes.append(
            f"The release fed the last ext_len={ext_len} tokens of each segment again in front of the next. That is a "
            "matter of what is fed, not of the model: all weights are converted, and segments fed without such "
            "overlap simply have no extended context."
        )
    return OriginalCheckpoint(config, _state_dict(file, tensors), tuple(notes))


def _walk(file: RestrictedFile) -> tuple[dict[str, dict[str, Any]], dict[str, StoredTensor]]:
    """Attributes of each module, and each tensor, by dotted name as in `state_dict()`."""
    modules: dict[str, dict[str, Any]] = {}
    tensors: dict[str, StoredTensor] = {}
    waiting, seen = [("", file.root)], set()
    while waiting:
        name, record = waiting.pop()
        parts = [record.fields.get(kind) for kind in ("_modules", "_parameters", "_buffers")]
        if id(record) in seen or not all(isinstance(part, dict) for part in parts):
            raise _unusable(file.path, f"module {name!r} is no module, or contains itself")
        seen.add(id(record))
        modules[name] = record.fields
        prefix = f"{name}." if name else ""
        children, *held = parts
        waiting += [(f"{prefix}{key}", child) for key, child in children.items() if isinstance(child, InertRecord)]
        for part in held:
            tensors |= {f"{prefix}{key}": value for key, value in part.items() if isinstance(value, StoredTensor)}
    return modules, tensors


def _hyperparameters(
    path: Path, modules: dict[str, dict[str, Any]], tensors: dict[str, StoredTensor]
) -> dict[str, Any]:
    """Arguments of the configuration."""

    def read(module: str, name: str, *kinds: type) -> Any:
        value = modules.get(module, {}).get(name)
        if type(value) not in kinds:
            raise _unusable(path, f"attribute {name!r} of module {module!r} is missing or of another type")
        return value

    values = {field: read("", name, int) for field, name in HYPERPARAMETERS.items()}
    if values["attn_type"] != 0:
        # The other kinds have other parts; the configuration refuses them by name.
        return {"attn_type": values["attn_type"]}
    up_projection = tensors.get("layers.0.pos_ff.CoreNet.0.weight")
    if up_projection is None:
        raise _unusable(path, "it has no feed-forward layers")
    return {
        **values,
        "same_length": read("", "same_length", bool),
        "intermediate_size": up_projection.shape[0],
        "pre_norm": read("layers.0.dec_attn", "pre_lnorm", bool),
        "layer_norm_epsilon": read("layers.0.dec_attn.layer_norm", "eps", float),
        "dropout": read("drop", "p", float, int),
        "attention_dropout": read("layers.0.dec_attn.dropatt", "p", float, int),
        "cutoffs": read("word_emb", "cutoffs", list)[:-1],
        "div_val": read("word_emb", "div_val", int),
        "untie_r": False,
        "memory_init": "empty",
        **_ties(path, tensors, num_bins=len(read("word_emb", "cutoffs", list))),
    }


def _ties(path: Path, tensors: dict[str, StoredTensor], num_bins: int) -> dict[str, Any]:
    """Which weights of the softmax are those of the embedding: the ones that share their memory."""
    tables = [f"emb_layers.{i}.weight" for i in range(num_bins) if f"word_emb.emb_layers.{i}.weight" in tensors]
    tied = {tensors[f"word_emb.{name}"] == tensors.get(f"crit.out_{name[4:]}") for name in tables}
    if len(tied) != 1:
        raise _unusable(path, "some tables of its softmax are tied to the embedding and some are not")
    projections = [tensors.get(f"crit.out_projs.{i}") for i in range(num_bins)]
    # With div_val 1 the embedding has one projection, number 0, for all bins.
    sources = [tensors.get(f"word_emb.emb_projs.{i if len(tables) > 1 else 0}") for i in range(num_bins)]
    return {
        "tie_word_embeddings": tied.pop(),
        "tie_projs": [one is not None and one == other for one, other in zip(projections, sources, strict=True)],
    }


def _state_dict(file: RestrictedFile, tensors: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """The weights under their names on disk, clusters in the order of transformers 4."""
    loaded: dict[StoredTensor, Tensor] = {}
    state_dict = {}
    for name, stored in tensors.items():
        if name == "pos_emb.inv_freq":  # a table that is computed where it is needed
            continue
        if stored not in loaded:
            loaded[stored] = file.tensor(stored)
        weight = loaded[stored]
        if name in ("crit.cluster_weight", "crit.cluster_bias"):
            weight = weight.flip(0)
        state_dict[name if name.startswith("crit.") else f"transformer.{name}"] = weight
    return state_dict


def _unusable(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is no {MODULE_NAME} of the original release: {reason}. Give the unchanged model.pt of a run."
    )
