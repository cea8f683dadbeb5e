"""`nn.DataParallel`, in which `Trainer` wraps every model where it sees two accelerators and no launcher.

There are no accelerators here, so torch's own code makes the replicas and joins their outputs, with plain copies in
place of what moves tensors between devices.
"""

import inspect
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contract.inputs import labels_of, training_inputs_of
from contract.rows import Row
from models.model_tools import EXACT
from torch import Tensor, nn

NUM_REPLICAS = 2
# The package has functions of the same names.
REPLICATE, GATHER = (sys.modules[f"torch.nn.parallel.{name}"] for name in ("replicate", "scatter_gather"))


def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    """For each device; gradients find the way back."""
    return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]


def replicas(model: nn.Module) -> list[nn.Module]:
    """Copies that have no `parameters()`, only tensors in their places; the model itself is left unusable."""
    with (
        mock.patch.object(REPLICATE, "_broadcast_coalesced_reshape", copies),
        mock.patch.object(REPLICATE, "_get_device_index", lambda device, _: device),
    ):
        made = REPLICATE.replicate(model, range(NUM_REPLICAS))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    return made


class Join:
    """For torch's `Gather`: rows one below the other, numbers one beside the other."""

    @staticmethod
    def apply(device: str, dim: int, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors) if tensors[0].ndim == 0 else torch.cat(tensors, dim)


def joined(outputs: list[Any]) -> Any:
    """The outputs of all replicas as one."""
    with mock.patch.object(GATHER, "Gather", Join):
        return GATHER.gather(outputs, "cpu")


def whole(name: str, tensor: Tensor) -> Tensor:
    """The number of labels as one process is told it."""
    return tensor.squeeze() if name == "num_items_in_batch" else tensor


def number(row: Row, output: Any) -> Tensor:
    """What is trained on: the mean loss of the replicas; of a body the mean of their squares."""
    return output["loss"].mean() if labels_of(row) else output[0].square().mean()


def rows_of(row: Row, model: nn.Module) -> list[dict[str, Tensor]]:
    """A row of the batch for each replica, with the number of labels as `Trainer` hands it round."""
    batch = training_inputs_of(row, num_rows=NUM_REPLICAS)
    if labels_of(row) and "num_items_in_batch" in inspect.signature(model.forward).parameters:
        batch["num_items_in_batch"] = torch.tensor(11).unsqueeze(0).expand(NUM_REPLICAS, -1)
    return [{name: tensor[index : index + 1] for name, tensor in batch.items()} for index in range(NUM_REPLICAS)]


def check_data_parallel(row: Row, folder: Path) -> None:
    """Two replicas with a row each: the outputs of each row alone, and the gradients of their mean loss."""
    for is_training in (False, True):
        alone, model = row.build().train(is_training), row.build().train(is_training)
        halves = rows_of(row, model)
        with torch.set_grad_enabled(is_training), warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = [alone(**{name: whole(name, tensor) for name, tensor in half.items()}) for half in halves]
            output = joined([replica(**half) for replica, half in zip(replicas(model), halves, strict=True)])
        key = "logits" if labels_of(row) and "logits" in expected[0] else next(iter(expected[0]))
        wanted = torch.cat([answer[key].reshape(1, *answer[key].shape[1:]) for answer in expected])
        torch.testing.assert_close(output[key].reshape_as(wanted), wanted, **EXACT)
    torch.stack([number(row, answer) for answer in expected]).mean().backward()
    number(row, output).backward()
    gradients = dict(model.named_parameters())
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(
            gradients[name].grad, parameter.grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )
