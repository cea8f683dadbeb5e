"""A few optimiser steps of small Evolved Transformers, in this process or, run as a script, in several.

    torchrun --nproc_per_node 2 training_run.py RESULTS DDP

RESULTS/rank_<r>.json gets, for each way of that kind to distribute, the losses of all steps (of the whole batch), the
type of the parameters, and each parameter's sum of squares after training.
"""

import contextlib
import gc
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from models.evolved_transformer.small_models import small_config
from models.evolved_transformer.whole_models import STACKS
from models.universal_transformer.training_run import mean_over_processes, outcome, train
from models.universal_transformer.whole_models import enable_checkpointing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from hf_efficient import EvolvedTransformerForCausalLM, EvolvedTransformerForConditionalGeneration

MODELS = {
    "causal": (EvolvedTransformerForCausalLM, STACKS["decoder"]),
    "translation": (EvolvedTransformerForConditionalGeneration, STACKS["both"]),
}


def make_model(name: str) -> nn.Module:
    """In training mode, without dropout. The vocabulary's size is a multiple of the number of processes."""
    torch.manual_seed(0)
    cls, stacks = MODELS[name]
    return cls(small_config(hidden_size=16, vocab_size=18, **stacks)).train()


def run_ddp(name: str, micro_batches: int = 1, **settings) -> dict:
    model = DistributedDataParallel(make_model(name), **settings)

    def without_sync(is_last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if is_last else model.no_sync()

    losses = train(model, dist.get_rank(), dist.get_world_size(), micro_batches, without_sync)
    return outcome(model, mean_over_processes(losses))


def run_checkpointed_ddp(name: str) -> dict:
    """Blocks run again in the backward pass."""
    model = make_model(name)
    enable_checkpointing(model, use_reentrant=False)
    wrapped = DistributedDataParallel(model)
    losses = train(wrapped, dist.get_rank(), dist.get_world_size())
    return outcome(wrapped, mean_over_processes(losses))


def shard_blocks(model: nn.Module) -> nn.Module:
    """Every block by itself, as accelerate does, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(blocks) >= 2
    for unit in [*blocks, model]:
        fully_shard(unit, mesh=mesh)
    return model


def run_fsdp(name: str, micro_batches: int = 1, is_checkpointed: bool = False) -> dict:
    model = make_model(name)
    if is_checkpointed:
        enable_checkpointing(model, use_reentrant=False)
    model = shard_blocks(model)

    def without_sync(is_last: bool) -> contextlib.AbstractContextManager:
        model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    losses = train(model, dist.get_rank(), dist.get_world_size(), micro_batches, without_sync)
    return outcome(model, mean_over_processes(losses))


def run_plan(name: str, folder: Path) -> dict:
    """Sharded by transformers while it loads, by the plan of the configuration."""
    folder = folder / name
    if dist.get_rank() == 0:
        make_model(name).save_pretrained(folder)
    dist.barrier()
    model = MODELS[name][0].from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2)).train()
    assert all(isinstance(block, FSDPModule) for block in model.model.get_decoder().layers)
    losses = train(model, dist.get_rank(), dist.get_world_size())
    return outcome(model, mean_over_processes(losses))


DDP: dict[str, partial] = {
    **{name: partial(run_ddp, name) for name in MODELS},
    "translation, find_unused_parameters": partial(run_ddp, "translation", find_unused_parameters=True),
    "causal, accumulation": partial(run_ddp, "causal", micro_batches=2),
    "translation, checkpointed": partial(run_checkpointed_ddp, "translation"),
}
FSDP: dict[str, partial] = {
    **{f"{name}, sharded": partial(run_fsdp, name) for name in MODELS},
    "causal, sharded, accumulation": partial(run_fsdp, "causal", micro_batches=2),
    "translation, sharded, checkpointed": partial(run_fsdp, "translation", is_checkpointed=True),
    **{f"{name}, by plan": partial(run_plan, name) for name in MODELS},
}
WAYS = {"DDP": DDP, "FSDP": FSDP}


def main(results: Path, ways: str) -> None:
    dist.init_process_group("gloo")
    reports = {}
    for name, run in WAYS[ways].items():
        reports[name] = run(folder=results) if run.func is run_plan else run()
    (results / f"rank_{dist.get_rank()}.json").write_text(json.dumps(reports))
    gc.collect()  # frees the DDP wrappers, which must not outlive the group: see TextTrainer.end
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
