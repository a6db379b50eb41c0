#!/usr/bin/env python3
"""Compare what `mae-scale plan` says about memory and messages with measurements.

- activations: many shapes of masked autoencoders and classifiers, bf16 and fp32, checkpointing and
  offload, frozen blocks: the most that is alive within a forward and backward pass, where each
  weight's gradient is freed at once. On a GPU it is the peak of its allocator. The plan counts the
  same on the meta device, with the operators of a GPU, for 2 images and for 64, and draws a line.
- model states: two processes, each ZeRO stage, in bf16 (model_states.py has fp32, too).
- a step: one and two processes, each ZeRO stage, one and two micro-batches: the most that is alive
  at any time, with all buffers of DeepSpeed's, and the bytes given to collective operations.

The bytes that are alive are counted by the tensors that operations return, so that a CPU gives what
a GPU's allocator would. Memory that is used only within an operation is not seen.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from activation_memory import WAYS
from machine import header
from model_states import formula, in_processes, live_tensors, storages
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_scale.config.sections import OptimConfig, TrainConfig
from mae_scale.launch.distributed import World, process_group
from mae_scale.launch.logs import set_up_logging
from mae_scale.models import build_classifier, build_mae
from mae_scale.models.classifier import keep_statistics_in_fp32
from mae_scale.planning.activations import activations as counted
from mae_scale.planning.flops import blank_images
from mae_scale.planning.memory import model_states, traffic, trained_by
from mae_scale.tasks import finetune, linprobe, pretrain
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.engine import build_engine, fill_in

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STEP = {"depth": 4, "decoder_depth": 2, "img_size": 64, "patch_size": 16}  # and ViT-B's widths
RANKS = 2


class Alive(TorchDispatchMode):
    """Counter of the bytes of storages that operations return, and of those given to
    collectives."""

    def __init__(self, there: Iterable[torch.Tensor], count_them: bool) -> None:
        super().__init__()
        # A storage is one object in Python as long as it lives.
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in there)
        self.now = sum(storages(there).values()) if count_them else 0
        self.peak = self.now
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            given = [t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.sent[func.__name__.split(".")[0]] += max(given, default=0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size


def peak_of(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> int:
    """Measure the most bytes that a forward and backward pass takes beside the weights."""

    def free(parameter: nn.Parameter) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(free)
    if torch.cuda.is_available():
        loss_of().backward()  # cuBLAS takes its workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of().backward()
        return torch.cuda.max_memory_allocated() - before
    with Alive([*model.parameters(), *model.buffers()], count_them=False) as alive:
        loss_of().backward()
    return alive.peak


def shapes(count: int, seed: int) -> list[dict[str, Any]]:
    """Give published models in both precisions, and shapes drawn at random."""
    found = [
        {"name": name, "precision": precision, "way": way, "batch": 2}
        for name, (precision, way) in itertools.product(
            ("mae_vit_base_patch16", "mae_vit_large_patch16"),
            (("fp32", ("none", False)), ("bf16", ("full", False))),
        )
    ]
    rng = random.Random(seed)
    for _ in range(count):
        patch_size = rng.choice([4, 8, 14, 16])
        shape: dict[str, Any] = {
            "name": f"mae_vit_{rng.choice(['tiny', 'small', 'base'])}_patch16",
            "precision": rng.choice(["bf16", "fp32"]),
            "way": rng.choice(WAYS),
            "batch": rng.choice([4, 8, 16]),
            "patch_size": patch_size,
            "img_size": patch_size * rng.choice([3, 7, 10, 14]),
            "depth": rng.choice([1, 3, 6]),
        }
        if rng.random() < 0.5:
            shape |= {
                "decoder_embed_dim": rng.choice([64, 128, 384]),
                "decoder_depth": rng.choice([1, 3]),
                "decoder_num_heads": rng.choice([4, 8]),
                "mask_ratio": rng.choice([0.4, 0.6, 0.75]),
                "norm_pix_loss": rng.random() < 0.5,
            }
        else:
            shape |= {
                "classes": rng.choice([10, 1000]),
                "pool": rng.choice(["mean", "token"]),
                "head": rng.choice(["linear", "mlp", "probe"]),
                "drop_path": rng.choice([0.0, 0.2]),
                "tune": rng.choice([None, None, 0, 0.5, 1]),
            }
        found.append(shape)
    return found


def activations(shape: dict[str, Any]) -> tuple[float, float]:
    """Give the bytes at the peak, and those that are planned."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kwargs = dict(shape)
    name, precision, batch = kwargs.pop("name"), kwargs.pop("precision"), kwargs.pop("batch")
    way, classes, tune = kwargs.pop("way"), kwargs.pop("classes", None), kwargs.pop("tune", None)
    is_probe = kwargs.get("head") == "probe"
    task: Any = pretrain if classes is None else linprobe if is_probe else finetune

    def build() -> Any:
        model: Any
        if classes is None:
            model = build_mae(name, **kwargs)
        else:
            model = build_classifier(name, classes, **kwargs)
            if is_probe or tune is not None:
                model.tune_last(0 if is_probe else tune)
        model.to(DTYPES[precision])
        keep_statistics_in_fp32(model)
        model.set_activation_checkpointing(way[0])
        return model

    with torch.device("meta"):
        plan = counted(build(), task.trial_loss, 64)
    with device:
        model = build()
    model.set_activation_checkpointing(*way)
    images = blank_images(model, batch).random_(256)
    peak = peak_of(model, lambda: task.trial_loss(model, images)) + images.nbytes
    # Where the CPU is the device it is the host as well.
    return peak, plan.peak(batch, way[1] and device.type != "cpu")


def step(stage: str, precision: str, way: str, micro_batches: int) -> dict[str, float]:
    """Measure one step of this rank: most bytes alive, bytes given to collectives, and the planned
    ones."""
    world, batch = World.from_environment(), 8
    set_up_logging(world)
    train = TrainConfig(
        global_batch_size=batch * world.size * micro_batches, micro_batch_size=batch
    )
    config = fill_deepspeed_config(stage, train, world, precision)
    with process_group(world, 600):
        with torch.device("meta"):
            model = build_mae("mae_vit_base_patch16", **STEP)
        model.set_activation_checkpointing(way)  # type: ignore[arg-type]
        run = trained_by(OptimConfig(), model, precision)
        model.to(DTYPES[precision])
        activations = counted(model, pretrain.trial_loss, batch).peak(batch)
        model.to(torch.float32)
        fill_in(model, 0, config)
        engine = build_engine(model, OptimConfig(), config)
        side = STEP["img_size"]

        def train_step() -> None:
            for _ in range(micro_batches):
                images = torch.rand(batch, 3, side, side)
                loss, _, _ = engine(images, torch.rand(batch, model.num_patches))
                engine.backward(loss)
                del loss
                engine.step()

        train_step()
        gc.collect()
        there = [t for t in live_tensors() if t.device.type != "meta"]
        alive = Alive(there, count_them=True)
        del there
        with alive:
            train_step()
    zero = config["zero_optimization"]
    states = model_states(run, zero, world.size, accumulates=micro_batches > 1)
    messages = traffic(run, zero, world.size, micro_batches)
    # A ring passes on a share of its input: the plan counts the bytes that are passed on.
    share = (world.size - 1) / world.size
    passed = {"allreduce_": 2 * share, "_allgather_base_": share, "_reduce_scatter_base_": share}
    return {
        "peak": alive.peak,
        "planned peak": states.peak(activations) + states.host,
        "sent": sum(passed.get(kind, 0) * given for kind, given in alive.sent.items()),
        "planned sent": messages.gradients + messages.weights,
    }


def step_in_processes(ranks: int, *settings: str | int) -> dict[str, float]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(ranks), __file__, "--one", json.dumps(settings)),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def describe(shape: dict[str, Any]) -> str:
    every, offload = shape["way"]
    parts = [
        shape["name"].removeprefix("mae_vit_").split("_")[0], shape["precision"],
        f"{every if isinstance(every, str) else f'every {every}'}{', offload' * offload}",
        f"{shape['batch']} images",
    ]  # fmt: skip
    if "img_size" in shape:
        parts.append(f"{shape['img_size']}/{shape['patch_size']} px, {shape['depth']} blocks")
    if "mask_ratio" in shape:
        parts.append(
            f"decoder {shape['decoder_embed_dim']} x {shape['decoder_depth']}, "
            f"{shape['mask_ratio']:.0%} masked"
        )
    if "classes" in shape:
        tuned = "" if shape["tune"] is None or shape["head"] == "probe" else f" {shape['tune']:g}"
        parts.append(f"{shape['pool']}, {shape['head']}{tuned and ', tuned' + tuned}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=int, default=40, help="drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="mae_vit_small_patch16", help="of the model states")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = step(*args.one)
        if World.from_environment().rank == 0:
            print(json.dumps(found))
        return
    where = "a GPU" if torch.cuda.is_available() else "a CPU; not measured on a GPU"
    print(f"{header('timm', 'deepspeed')}\non {where}; MB measured, and error of what is planned")
    print(f"\n{'activations':94}{'peak':>9}{'error':>8}")
    worst: dict[str, list[float]] = {"peak": []}
    for shape in shapes(args.shapes, args.seed):
        peak, planned = activations(shape)
        worst["peak"].append(planned / peak - 1)
        print(f"{describe(shape):94}{peak / 1e6:9.2f}{worst['peak'][-1]:+8.1%}", flush=True)
        gc.collect()
    print(f"\n{'model states, 2 processes':34}{'measured':>9}{'error':>8}")
    worst["states"] = []
    precision = "bf16"
    for stage in range(4):
        found = in_processes(args.model, stage, precision, RANKS)
        measured = sum(found[kind] for kind in ("weights", "optimizer", "others"))
        error = sum(formula(found, stage, RANKS, precision).values()) / measured - 1
        worst["states"].append(error)
        print(f"{f'{args.model}, {precision}, zero{stage}':34}{measured / 1e6:9.1f}{error:+8.2%}",
              flush=True)  # fmt: skip
    print(f"\n{'a step':47}{'peak':>9}{'error':>8}{'sent':>9}{'error':>8}")
    worst["step"], worst["sent"] = [], []
    stages = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
    ways = [(stage, "bf16", "none") for stage in stages]
    ways += [("zero1", "fp32", "none"), ("zero2", "fp32", "full"), ("zero3", "fp32", "none")]
    for (name, precision, way), ranks, micro in itertools.product(ways, (1, RANKS), (1, 2)):
        found = step_in_processes(ranks, name, precision, way, micro)
        peak_error = found["planned peak"] / found["peak"] - 1
        worst["step"].append(peak_error)
        text = f"{name}, {precision}, {way}, {ranks} x {micro} micro-batches"
        print(f"{text:47}{found['peak'] / 1e6:9.1f}{peak_error:+8.1%}", end="")
        if found["sent"]:
            worst["sent"].append(found["planned sent"] / found["sent"] - 1)
            print(f"{found['sent'] / 1e6:9.1f}{worst['sent'][-1]:+8.1%}", end="")
        print(flush=True)
    print()
    for what, errors in worst.items():
        mean = sum(map(abs, errors)) / len(errors)
        print(f"{what:8}worst {max(errors, key=abs):+.2%}, mean {mean:.2%} of {len(errors)}")


if __name__ == "__main__":
    main()
