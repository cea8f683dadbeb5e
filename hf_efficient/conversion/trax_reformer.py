"""Language models of trax (github.com/google/trax, `ReformerLM`) -> settings and state dict of a Reformer.

trax saves a model as the list of its weights in the order of its layers, or, in 2020, as the tree of them that the
list is made of. The list tells every size: weights of a layer norm have one axis, of a dense layer two, of attention
three (head, model, head size). What leaves no trace in weights, such as chunk lengths, comes from the run's
`config.gin` or from a `config.json`; `trax_settings` reads them. The state dict comes out under the names of
transformers.

Two things are different there, and neither is lost: trax shifts the tokens right inside the model, so that a text
begins with the id 0; and its layer norms add 1e-6.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .restricted_pickle import InertRecord, MalformedPickle
from .restricted_reader import read_restricted, unpacked
from .stored_arrays import as_tensor, read_npy
from .trax_settings import NEEDED, longest_text, read_trax_settings

CHECKPOINT, GIN_FILE = "model.pkl.gz", "config.gin"
LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class TraxReformer:
    """A language model of trax in memory.

    Attributes:
        settings: Arguments of its configuration.
        state_dict: Its weights under the names of transformers.
        notes: What is worth knowing about it, a sentence each.
    """

    settings: dict[str, Any]
    state_dict: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def find_trax_checkpoint(source: Path) -> Path | None:
    """The model of a run's folder, or the file itself where it is one that trax wrote; None otherwise.

    Only its form is looked at, a pickle of a dict with weights: `read_trax_reformer` says what is wrong with it.
    """
    if source.is_dir():
        return source / CHECKPOINT if (source / CHECKPOINT).is_file() else None
    return source if source.name.endswith((".pkl", ".pkl.gz")) else None


def read_trax_reformer(path: Path, config: Path | dict[str, Any] | None = None) -> TraxReformer:
    """Read a model that trax saved. Nothing in the file is run.

    Args:
        path: `model.pkl.gz`, or a model of 2020 as a plain pickle.
        config: A gin file, a config.json, or what one holds. None takes the `config.gin` beside the model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; the weights are those of another model; a setting is missing, contradicts the
            weights, or is of a variant that has no counterpart.
    """
    weights = _Weights(path, _read_weights(path))
    if config is None:
        config = path.parent / GIN_FILE
        if not config.is_file():
            raise FileNotFoundError(
                f"{path} holds weights only, and chunk lengths, hashes or the activation cannot be told from them; "
                f"give config: the run's {GIN_FILE}, or a config.json with {', '.join(sum(NEEDED.values(), ()))}."
            )
    state_dict, sizes, is_shared = _name_weights(weights)
    given, notes = read_trax_settings(config, sizes, is_shared)
    begin = "trax shifts the tokens right inside the model: begin every text with the id 0 (bos_token_id)."
    defaults = {"layer_norm_eps": LAYER_NORM_EPS, "bos_token_id": 0, "eos_token_id": None}
    defaults["max_position_embeddings"] = longest_text(sizes)
    return TraxReformer(defaults | given | sizes | {"is_decoder": True}, state_dict, (begin, *notes))


# --- the file ------------------------------------------------------------------------------------------------


def _read_weights(path: Path) -> list[Tensor]:
    """The weights in the order of the layers."""
    root = read_restricted(path).root
    if not isinstance(root, dict) or not root.keys() & {"flat_weights", "weights"}:
        raise ValueError(f"{path} is no model of trax: it has neither flat_weights nor weights. Give a {CHECKPOINT}.")
    content = root.get("flat_weights", root.get("weights"))
    try:
        # Since 2021 the pickle holds the level at which a file beside it is compressed.
        arrays = _read_beside(path) if isinstance(content, int) else list(_flatten(content))
    except MalformedPickle as error:
        raise ValueError(f"{path} cannot be read: {error}. Fetch or save it again.") from None
    return arrays


def _read_beside(path: Path) -> list[Tensor]:
    name = path.name.removesuffix("pkl.gz") + "weights.npy.gz" if path.name.endswith(".pkl.gz") else path.name + ".npy"
    beside = path.with_name(name)
    if not beside.is_file():
        raise FileNotFoundError(f"{path} keeps its weights in {beside}, which is missing; give both files.")
    arrays = []
    with unpacked(beside) as stream:
        while (array := read_npy(stream)) is not None:
            arrays.append(array)
    return arrays


def _flatten(tree: Any) -> Iterator[Tensor]:
    """The arrays of nested tuples, lists and dicts, from left to right. Layers without weights have an empty tuple."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list | tuple | dict):
            waiting += reversed(list(node.values()) if isinstance(node, dict) else node)
        elif (array := as_tensor(node)) is not None:
            if array.is_floating_point():
                yield array
        elif isinstance(node, InertRecord):
            raise MalformedPickle(f"its weights hold a {node.class_name:.80}, which is no array")


# --- the weights ---------------------------------------------------------------------------------------------


class _Weights:
    """Takes weights from the front of the list, each with the number of axes that it must have."""

    def __init__(self, path: Path, arrays: list[Tensor]):
        self.path = path
        self.arrays = arrays
        self.position = 0

    def __len__(self) -> int:
        """How many are left."""
        return len(self.arrays) - self.position

    @property
    def num_axes(self) -> int:
        """Of the next one; 0 at the end."""
        return self.arrays[self.position].dim() if len(self) else 0

    def take(self, what: str, num_axes: int) -> Tensor:
        if self.num_axes != num_axes:
            found = f"shape {list(self.arrays[self.position].shape)}" if len(self) else "nothing"
            raise ValueError(
                f"{self.path} holds no ReformerLM that can be represented: weight {self.position} should be {what}, "
                f"with {num_axes} axes, and is {found}."
            )
        self.position += 1
        return self.arrays[self.position - 1]


def _name_weights(weights: _Weights) -> tuple[dict[str, Tensor], dict[str, Any], list[bool]]:
    """The state dict, the sizes in it, and for each layer whether queries and keys share a projection."""
    table = weights.take("the embedding", 2)
    state_dict = {"reformer.embeddings.word_embeddings.weight": table}
    sizes = {"vocab_size": table.shape[0], "hidden_size": table.shape[1]}
    positions, position_sizes = _take_positions(weights, table.shape[1])
    state_dict |= {f"reformer.embeddings.position_embeddings.{name}": value for name, value in positions.items()}
    is_shared: list[bool] = []
    while len(weights) > 4:  # the last layer norm and the head follow
        layer, layer_sizes, shared = _take_layer(weights, f"layer {len(is_shared)}")
        state_dict |= {f"reformer.encoder.layers.{len(is_shared)}.{name}": value for name, value in layer.items()}
        if is_shared and any(sizes[name] != size for name, size in layer_sizes.items()):
            raise ValueError(f"{weights.path} has layers of different sizes, which cannot be represented.")
        sizes |= layer_sizes
        is_shared.append(shared)
    state_dict |= _take_norm(weights, "reformer.encoder.layer_norm", "the last layer norm")
    state_dict["lm_head.decoder.weight"] = weights.take("the head", 2).t().contiguous()
    state_dict["lm_head.bias"] = weights.take("the head's bias", 1)
    return state_dict, sizes | position_sizes | {"num_hidden_layers": len(is_shared)}, is_shared


def _take_positions(weights: _Weights, hidden_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tables of axial positions `(1, 1, n, 1, d)`, or one table `(1, n, D)`, in 2021 `(n, D)`."""
    tables = []
    while weights.num_axes > 1:
        tables.append(weights.take("a position table", weights.num_axes))
    if not tables:
        raise ValueError(
            f"{weights.path} has no position embeddings; sinusoids (pos_type) have no counterpart in this model."
        )
    if len(tables) == 1 and tables[0].dim() < 4:
        table = tables[0].reshape(-1, tables[0].shape[-1])
        sizes = {"axial_pos_embds": False, "max_position_embeddings": table.shape[0]}
        return {"embedding.weight": table}, sizes
    if any(table.dim() != len(tables) + 2 or table.shape[0] != 1 for table in tables):
        raise ValueError(f"{weights.path} has position tables of unknown shapes {[list(t.shape) for t in tables]}.")
    shape = [table.shape[axis + 1] for axis, table in enumerate(tables)]
    widths = [table.shape[-1] for table in tables]
    if sum(widths) != hidden_size or any(
        table[0, ..., 0].numel() != n for table, n in zip(tables, shape, strict=True)
    ):
        raise ValueError(f"{weights.path} has position tables that do not fit together: {shape} of {widths}.")
    named = {f"weights.{axis}": table[0].contiguous() for axis, table in enumerate(tables)}
    return named, {"axial_pos_embds": True, "axial_pos_shape": shape, "axial_pos_embds_dim": widths}


def _take_layer(weights: _Weights, name: str) -> tuple[dict[str, Tensor], dict[str, int], bool]:
    """Layer norm, attention, layer norm, feed-forward; sizes; whether queries and keys share a projection."""
    layer = _take_norm(weights, "attention.layer_norm", f"the layer norm of {name}")
    projections = []
    while weights.num_axes == 3:
        projections.append(weights.take(f"the attention of {name}", 3))
    kinds = {3: ("query_key", "value"), 4: ("query", "key", "value")}.get(len(projections))
    if kinds is None:
        raise ValueError(
            f"{weights.path} holds no ReformerLM that can be represented: the attention of {name} has "
            f"{len(projections)} matrices, and only 3 (shared queries and keys) or 4 are known."
        )
    *inputs, output = projections
    num_heads, hidden_size, head_size = inputs[0].shape
    if any(matrix.shape != inputs[0].shape for matrix in inputs) or output.shape != (
        num_heads,
        head_size,
        hidden_size,
    ):
        raise ValueError(f"{weights.path}: the attention of {name} has keys and values of different sizes.")
    for kind, matrix in zip(kinds, inputs, strict=True):
        # (H, D, K) -> (H * K, D)
        layer[f"attention.self_attention.{kind}.weight"] = matrix.transpose(1, 2).reshape(-1, hidden_size)
    layer["attention.output.dense.weight"] = output.reshape(-1, hidden_size).t().contiguous()
    layer |= _take_norm(weights, "feed_forward.layer_norm", f"the feed-forward layer norm of {name}")
    for part in ("dense.dense", "output.dense"):
        layer[f"feed_forward.{part}.weight"] = weights.take(f"the feed-forward of {name}", 2).t().contiguous()
        layer[f"feed_forward.{part}.bias"] = weights.take(f"the feed-forward of {name}", 1)
    feed_forward_size = layer["feed_forward.dense.dense.bias"].shape[0]
    sizes = {
        "num_attention_heads": num_heads,
        "attention_head_size": head_size,
        "feed_forward_size": feed_forward_size,
    }
    return layer, sizes, len(kinds) == 2


def _take_norm(weights: _Weights, name: str, what: str) -> dict[str, Tensor]:
    return {f"{name}.weight": weights.take(what, 1), f"{name}.bias": weights.take(what, 1)}
