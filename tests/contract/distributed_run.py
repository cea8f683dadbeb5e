"""A few optimiser steps of every row that has a loss, in this process or, run as a script, in two.

    torchrun --nproc_per_node 2 distributed_run.py RESULTS

RESULTS/rank_<r>.json gets, for each row and each of DDP and FSDP2, the losses of all steps (of the whole batch) and
each parameter's sum of squares after training; the error's text if there was one.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from contract.inputs import training_inputs_of
from contract.rows import ROWS, Row
from contract.table import is_distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

NUM_STEPS, BATCH = 3, 4
DISTRIBUTED = {row.name: row for row in ROWS if is_distributed(row)}


def make_model(row: Row) -> nn.Module:
    """In training mode, with weights as initialisation leaves them; the same in every process."""
    torch.manual_seed(0)
    model = row.build()
    torch.manual_seed(0)
    return row.model_class(model.config).double().train()


def train(model: nn.Module, row: Row, rank: int = 0, num_ranks: int = 1) -> list[float]:
    """Losses of this process's share of the rows, all of which have as many labels."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    batch = training_inputs_of(row, num_rows=BATCH)
    share = {name: tensor.chunk(num_ranks)[rank] for name, tensor in batch.items()}
    losses = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = model(**share).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def outcome(model: nn.Module, losses: list[float]) -> dict:
    """What there is to compare."""
    values = {name.removeprefix("module."): value.detach() for name, value in model.named_parameters()}
    values = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}
    return {"losses": losses, "squares": {name: value.square().sum().item() for name, value in values.items()}}


def share_out(model: nn.Module) -> nn.Module:
    """Every block of `_no_split_modules` by itself, as accelerate's FSDP2 does, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(row: Row, wrap: type | object) -> dict:
    """In this process's part of two; what both refuse in the same way is the outcome too."""
    model = wrap(make_model(row))
    try:
        losses = train(model, row, dist.get_rank(), dist.get_world_size())
    except (RuntimeError, ValueError) as error:
        return {"error": str(error)}
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return outcome(model, (total / dist.get_world_size()).tolist())


WAYS = {"ddp": DistributedDataParallel, "fsdp2": share_out}


def main(results: Path) -> None:
    """Run everything and write this process's report."""
    dist.init_process_group("gloo")
    reports = {way: {name: run(row, wrap) for name, row in DISTRIBUTED.items()} for way, wrap in WAYS.items()}
    (results / f"rank_{dist.get_rank()}.json").write_text(json.dumps(reports))
    gc.collect()  # frees the DDP wrappers, which must not outlive the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
