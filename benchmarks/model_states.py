#!/usr/bin/env python3
"""Measure the bytes of model states per rank under ZeRO 0 to 3, beside the formula.

It counts the tensors that rank 0 holds after the first and after the second of two backward passes,
whichever is larger, each storage once: weights (those of the module), optimiser states (fp32 master
weights and AdamW's two moments), and the rest: gradients and buffers for sending them.

The formula is that of `mae_scale/planning/memory.py`. Its last column has the gradients,
which are summed in fp32, and the bucket that stages 1 and 3 keep for sending them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from machine import header

from mae_scale.config.deepspeed import load_deepspeed_config
from mae_scale.config.sections import OptimConfig, TrainConfig
from mae_scale.launch.distributed import World, process_group
from mae_scale.launch.logs import set_up_logging
from mae_scale.models import build_mae
from mae_scale.planning.memory import ParameterStates, model_states, trained_by
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.engine import build_engine, fill_in


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Give the bytes of each distinct storage by its address."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "meta" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def live_tensors() -> Iterator[torch.Tensor]:
    """Yield the tensors that are alive, with their gradients."""
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad


def measure(model_name: str, stage: int, precision: str) -> dict[str, float]:
    """Measure the bytes of this rank, by kind."""
    world = World.from_environment()
    set_up_logging(world)
    train = TrainConfig(global_batch_size=2 * world.size, micro_batch_size=1)
    config = fill_deepspeed_config(f"zero{stage}", train, world, precision)
    with process_group(world, 600):
        with torch.device("meta"):
            model = build_mae(model_name)
        model.set_activation_checkpointing("full")
        fill_in(model, 0, config)
        engine = build_engine(model, OptimConfig(), config)
        side = model.patch_size * model.patch_embed.grid_size[0]
        images = torch.rand(1, 3, side, side, device=engine.device)
        noise = torch.rand(1, model.num_patches, device=engine.device)
        moments = []
        for micro in range(4):  # two steps of two micro-batches
            loss, _, _ = engine(images, noise)
            engine.backward(loss)
            del loss
            if micro >= 2:
                moments.append(storages(live_tensors()))
            engine.step()
        run = trained_by(OptimConfig(), engine.module, precision)
        parameters = list(engine.module.parameters())
        weights = storages(parameters)
        weights |= storages(getattr(p, "ds_tensor", None) for p in parameters)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        masters = [p for group in inner.param_groups for p in group["params"]]
        masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # stage 3
        state = [value for values in inner.state.values() for value in values.values()]
        optimizer = storages([*masters, *(v for v in state if torch.is_tensor(v))])
    known = {**weights, **optimizer}
    return {
        "parameters": run.parameters,
        "trained": run.trained,
        "weights": sum(weights.values()),
        "optimizer": sum(size for place, size in optimizer.items() if place not in weights),
        "others": max(
            sum(size for place, size in moment.items() if place not in known) for moment in moments
        ),
    }


def formula(found: dict[str, float], stage: int, ranks: int, precision: str) -> dict[str, float]:
    """Compute the bytes of a rank, by kind."""
    zero = load_deepspeed_config(f"zero{stage}")["zero_optimization"]
    run = ParameterStates(int(found["parameters"]), int(found["trained"]), precision)
    states = model_states(run, zero, ranks)
    return {
        "weights": states.weights,
        "optimizer": states.optimizer,
        "others": states.gradients + states.bucket,
    }


def in_processes(model: str, stage: int, precision: str, ranks: int) -> dict[str, float]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(ranks), __file__),
        *("--one", json.dumps([model, stage, precision])),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = measure(*args.one)
        if World.from_environment().rank == 0:
            print(json.dumps(found))
        return
    print(f"{header('deepspeed')}\n{args.model}, MB per rank, measured / by formula")
    kinds = {"weights": "weights", "optimizer": "optimiser states", "others": "gradients, buffers"}
    print(f"{'':10}{'stage':>6}{'ranks':>6}" + "".join(f"{k:>20}" for k in kinds.values())
          + f"{'all':>20}{'ratio':>8}")  # fmt: skip
    for precision, stage, ranks in itertools.product(args.precision, args.stages, args.ranks):
        found = in_processes(args.model, stage, precision, ranks)
        expected = formula(found, stage, ranks, precision)
        pairs = [(found[kind], expected[kind]) for kind in kinds]
        pairs.append((sum(a for a, _ in pairs), sum(b for _, b in pairs)))
        columns = "".join(f"{f'{a / 1e6:,.0f} / {b / 1e6:,.0f}':>20}" for a, b in pairs)
        print(f"{precision:10}{stage:6}{ranks:6}{columns}{pairs[-1][0] / pairs[-1][1]:8.2f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
