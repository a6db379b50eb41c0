"""A rank of test_masters.py: masters, averages and checkpoints hold the given weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mae_scale.config.classification import FinetuneOptimConfig, LarsConfig
from mae_scale.config.sections import CheckpointConfig, TrainConfig
from mae_scale.launch.distributed import process_group
from mae_scale.models import build_classifier, build_mae
from mae_scale.train.checkpoint import Commit, Saver, folder_of
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.deepspeed_state import EngineState
from mae_scale.train.engine import build_engine, fill_in
from mae_scale.train.loading import load_averages, load_checkpoint, load_weights
from mae_scale.train.optimizers import EMA, optimizer_order
from mae_scale.world import World

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 20, "num_heads": 2, "depth": 2}
OPTIM = FinetuneOptimConfig(ema_decay=0.9, layer_decay=0.5)


def mae() -> nn.Module:
    model = build_mae("mae_vit_tiny_patch16", **SIZES, decoder_depth=1)
    model.layer_of = lambda name: 0 if name == "cls_token" else 1  # type: ignore
    return model


def partly(blocks: float, **settings: Any) -> nn.Module:
    model = build_classifier("mae_vit_tiny_patch16", num_classes=5, **SIZES, **settings)
    model.tune_last(blocks)
    return model


CASES = [(name, "mae", mae, OPTIM) for name in ("zero0", "zero1", "zero2", "zero3")]
CASES += [(name, "last block", lambda: partly(1), OPTIM) for name in ("zero0", "zero2", "zero3")]
CASES += [("zero3_offload", "half a block", lambda: partly(0.5), OPTIM)]
CASES += [("zero0", "probe", lambda: partly(0, head="probe"), LarsConfig())]  # type: ignore


def check(world: World, scratch: Path, name: str, make: Any, optim: Any, loaded: bool) -> None:
    train = TrainConfig(global_batch_size=2 * world.size, micro_batch_size=2)
    config = fill_deepspeed_config(name, train, world, "bf16")
    with torch.device("meta"):
        model, plain = make(), make()
    fill_in(plain, 3, fill_deepspeed_config("zero0", train, world, "fp32"))
    values = {key: value.detach() for key, value in plain.named_parameters()}
    if loaded:
        values = {key: torch.rand_like(value) for key, value in values.items()}
    given = copy.deepcopy(values) if loaded and world.rank == 0 else None
    fill_in(model, 3, config, given)
    order = optimizer_order(model, optim)
    engine = build_engine(model, optim, config)
    state = EngineState(engine)

    def compare(of: EngineState) -> None:
        for key, parameter in of._engine.module.named_parameters():
            value = values[key]
            if parameter.requires_grad:
                master = of._master(parameter) if name == "zero0" else of.weight(parameter)
                assert torch.equal(master, value), (name, key)
                if optim is OPTIM:
                    assert torch.equal(of.state(parameter, EMA).view_as(value), value), (name, key)
            with gathered(parameter):
                assert torch.equal(parameter, value.bfloat16()), (name, key)

    compare(state)
    scratch.mkdir(exist_ok=True)
    saver = Saver(engine, scratch, world, CheckpointConfig(background_gb=0 if loaded else None))
    commit = Commit(
        step=1, samples=0, world_size=world.size, zero_stage=engine.zero_optimization_stage(),
        precision="bf16", config_hash="", data="", milestone=False, bad_steps=0, files={},
    )  # fmt: skip
    saver.start(commit)
    saver.finish()
    folder = folder_of(scratch, 1)
    weights = load_weights(folder)
    for key, value in values.items():
        exact = key not in order or name.startswith("zero3")
        assert torch.equal(weights[key], value if exact else value.bfloat16().float()), (name, key)
    if optim is OPTIM:
        for key, average in load_averages(folder, order).items():
            assert torch.equal(average, values[key].flatten()), (name, key)
    for other in (name, "zero1" if name == "zero3" else "zero0"):  # as it is, and converted
        with torch.device("meta"):
            model = make()
        config = fill_deepspeed_config(other, train, world, "bf16")
        fill_in(model, 4, config)
        again = build_engine(model, optim, config)
        if optim is OPTIM or other == name:
            load_checkpoint(again, folder, order)
        if other == name:
            compare(EngineState(again))
        for key, value in again.frozen.items():
            whole = values[key].flatten()
            start = len(value.flatten()) * world.rank if other.startswith("zero3") else 0
            mine = whole[start:][: value.numel()]
            assert torch.equal(value.flatten()[: len(mine)], mine), (other, key)


def gathered(parameter: nn.Parameter) -> Any:
    from mae_scale.train.ds import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id"))


if __name__ == "__main__":
    world = World.from_environment()
    with process_group(world, 600):
        for number, (name, what, make, optim) in enumerate(CASES):
            for loaded in (False, True):
                torch.manual_seed(0)
                folder = Path(sys.argv[1]) / f"{number} {loaded}"
                check(world, folder, name, make, optim, loaded)
            print(f"{world.rank} {name} {what}: same bits", flush=True)
