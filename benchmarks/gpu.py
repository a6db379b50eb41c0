#!/usr/bin/env python3
"""Measure everything that is worth knowing in the first ten minutes on a GPU, by one command.

Each result is printed as a line of JSON as soon as it is there; at the end all follow as tables. A
failure is a result, too ("error"), and the rest goes on. Without a GPU, or with --small, tiny
models stand for the large ones: the numbers mean nothing, but show that the command works.

- stages: `mae-scale pretrain` trains, saves, stops on a signal, goes on, for each stage:
  exit codes, and whether all losses have the bits of a run without a stop
- commands: the other commands on its result, and settings that change what runs on the device
- synchronisations: how often the host waits for the device in a step, by PyTorch's profiler, where
  it does, and the host's time until it has handed a step over, beside plain PyTorch's
- numbers: loss and gradient of the same step on CPU and GPU, in fp32 and in bf16
- attention: the kernel that PyTorch chooses for the shapes of encoder and decoder
- deterministic: whether two runs have the same bits, with and without, and what it costs
- loader: images/s of the data workers; upload: GB/s from pinned memory
- step: img/s, MFU and peak memory, beside the official design and the memory that `plan` predicts
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_commands import SMALL_STAGES, STAGES, Result, commands, shards, stages
from machine import header
from torch.nn.parallel import DistributedDataParallel
from train_step import Way, measure, our_step, synchronize

from mae_scale.config.deepspeed import fit_to_model, load_deepspeed_config
from mae_scale.config.sections import OptimConfig
from mae_scale.data.loader import TrainLoader
from mae_scale.data.shards import open_shards
from mae_scale.data.transforms import normalize
from mae_scale.launch.distributed import start
from mae_scale.models import MaskedAutoencoderViT, build_mae
from mae_scale.planning.activations import activations
from mae_scale.planning.memory import model_states, trained_by
from mae_scale.tasks.pretrain import trial_loss
from mae_scale.train.determinism import deterministic
from mae_scale.world import World, data_workers

ON_GPU = torch.cuda.is_available()
PLAIN = "plain PyTorch"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense")
MODELS = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
SMALL = ("mae_vit_tiny_patch16",)

# Processes for single results are forked from one that has imported everything and run nothing.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["mae_scale.train.step", "mae_scale.train.engine"])


def waits(stage: str, name: str, batch: int, sizes_: Result, precision: str) -> Result:
    """Count the waits of the host for the device, and the operators, in one step of a stage."""
    world = World()
    start(world)
    model = build_mae(name, **sizes_)
    if stage == PLAIN:
        step = plain_step(model.to(world.device))
    else:
        step = our_step(model, Way(name, False, precision, "none", False), batch, stage)
    images = _images(batch, model.patch_embed.img_size[0], world.device)
    for _ in range(4):
        step(images)
    synchronize(world.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ON_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    steps = 3
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step(images)
    counts = Counter({event.key: event.count for event in profile.key_averages()})
    operators = sum(count for key, count in counts.items() if key.startswith("aten::"))
    return {
        "stage": stage,
        **{key.removeprefix("aten::"): round(counts[key] / steps, 2) for key in WAITS},
        "operators": round(operators / steps),
        "lines_that_wait": waiting_lines(lambda: step(images)),
        "host_ms": round(1000 * host_seconds(step, images, 20 if ON_GPU else 2), 1),
    }


def plain_step(model: MaskedAutoencoderViT) -> Callable[[torch.Tensor], None]:
    """Make a function that takes a step of PyTorch alone.

    It has DistributedDataParallel, autocast to bf16, and fused AdamW.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    wrapped = DistributedDataParallel(model)

    def step(images: torch.Tensor) -> None:
        noise = torch.rand(len(images), model.num_patches, device=images.device)
        with torch.autocast(images.device.type, torch.bfloat16):
            loss, _, _ = wrapped(normalize(images), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def waiting_lines(step: Callable[[], None]) -> list[str]:
    """List the lines of Python at which PyTorch makes the host wait for the GPU."""
    if not ON_GPU:
        return []
    found: Counter[str] = Counter()

    def note(*_: Any, **__: Any) -> None:
        frames = [f for f in traceback.extract_stack()[:-1] if "warnings.py" not in f.filename]
        names = (f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:])
        found[" > ".join(names)] += 1

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        step()
    torch.cuda.set_sync_debug_mode("default")
    return [f"{count} x {lines}" for lines, count in found.most_common(8)]


def host_seconds(step: Callable[[torch.Tensor], None], images: torch.Tensor, steps: int) -> float:
    """Measure the median of the seconds in which the host hands a step to an idle device."""
    times = []
    for _ in range(3 + steps):  # the first ones are not counted
        synchronize(images.device)
        began = time.perf_counter()
        step(images)
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def numbers(small: bool) -> Result:
    """Compare a step on this device with the same one in fp32 on the CPU, as relative errors."""
    sizes_ = {"img_size": 32, "patch_size": 8, "depth": 2} if small else {}
    torch.manual_seed(0)
    model = build_mae(SMALL[0] if small else MODELS[0], **sizes_)
    images = normalize(_images(2, model.patch_embed.img_size[0], torch.device("cpu")))
    noise = torch.rand(2, model.num_patches)

    def step(device: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        model.to(device).zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss, _, _ = model(images.to(device), noise.to(device))
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.cat(gradients).cpu()

    loss, gradient = step("cpu", torch.float32)
    result: Result = {}
    device = World().device.type
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found, other = step(device, dtype)
        result[f"loss_{name}"] = abs(found - loss) / loss
        result[f"gradient_{name}"] = float((other - gradient).norm() / gradient.norm())
    return {key: float(f"{value:.2e}") for key, value in result.items()}


def _images(batch: int, size: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    return images.to(device)


def planned_gb(name: str, batch: int, precision: str) -> float:
    """Give what `mae-scale plan` expects one process to hold under ZeRO 1 at the worst moment of a
    step of one micro-batch, in GB."""
    with torch.device("meta"):
        model = build_mae(name)
    run = trained_by(OptimConfig(), model, precision)
    zero = load_deepspeed_config("zero1")["zero_optimization"]
    zero = fit_to_model("zero1", zero, run.trained, 1) if ON_GPU else zero
    states = model_states(run, zero, 1, accumulates=False)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    peak = activations(model, trial_loss, batch).peak(batch)
    return round(states.peak(peak) / 1e9, 2)


def attention(small: bool) -> Iterator[Result]:
    """Name the kernels that scaled_dot_product_attention runs for the shapes of the three
    models."""
    device, dtype = World().device, torch.bfloat16 if ON_GPU else torch.float32
    shapes = {"B encoder": (12, 50, 64), "B decoder": (16, 197, 32)}
    if not small:
        shapes |= {"L encoder": (16, 50, 64), "H encoder": (16, 65, 80)}
        shapes |= {"H decoder": (16, 257, 32), "H classifier": (16, 257, 80)}
    for what, (heads, tokens, width) in shapes.items():
        q = torch.randn(4, heads, tokens, width, device=device, dtype=dtype, requires_grad=True)
        with torch.profiler.profile() as profile:
            torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        names = sorted({e.key for e in profile.key_averages() if "_scaled_dot_product_" in e.key})
        yield {"shape": what, "tokens": tokens, "head_width": width, "operators": names}


def same_bits(name: str, batch: int, sizes_: Result, wanted: bool, steps: int) -> Result:
    """Hash the weights after some steps, and measure the rate of the steps."""
    world = World()
    with deterministic(wanted):
        start(world)
        torch.manual_seed(0)
        model = build_mae(name, **sizes_).to(world.device)
        way = Way(name, False, "bf16" if ON_GPU else "fp32", "none", False)
        step = our_step(model, way, batch)
        images = _images(batch, model.patch_embed.img_size[0], world.device)
        step(images)
        synchronize(world.device)
        began = time.perf_counter()
        for _ in range(steps):
            step(images)
        synchronize(world.device)
        rate = steps * batch / (time.perf_counter() - began)
        digest = hashlib.sha256()
        for value in model.parameters():
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return {"digest": digest.hexdigest()[:16], "images_per_second": round(rate, 1)}


def loader(data: Path, workers: int, batch: int) -> Result:
    """Measure the images per second of the data workers, after the first batches."""
    stream = TrainLoader(
        *(open_shards(str(data)),),
        **{"img_size": 224, "global_batch_size": batch, "workers": workers, "pin_memory": ON_GPU},
        **{"lanes": 4, "window": 16},
    )
    batches = stream.batches(0)
    for _ in range(2 * max(1, workers)):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 5:
        count += len(next(batches)["image"])
    rate = count / (time.perf_counter() - began)
    stream.close()
    return {"workers": workers, "images_per_second": round(rate, 1)}


def upload() -> Result:
    """Measure GB/s from pinned host memory to the GPU."""
    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=ON_GPU)
    target = torch.empty_like(source, device=World().device)
    target.copy_(source)
    synchronize(target.device)
    began = time.perf_counter()
    for _ in range(10):
        target.copy_(source, non_blocking=True)
    synchronize(target.device)
    return {"gb_per_second": round(10 * len(source) / 1e9 / (time.perf_counter() - began), 1)}


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process of its own; an exception becomes a result."""
    with ProcessPoolExecutor(1, FRESH) as pool:
        try:
            return pool.submit(quietly, function, *arguments).result()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            return {"error": f"{type(error).__name__}: {first[:200]}"}


def quietly(function: Callable[..., Result], *arguments: Any) -> Result:
    """Drop what libraries print on stdout, which is for results."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def a_step(way: Way, batch: int, rounds: int, steps: int) -> Result:
    rate, share, memory = measure(way, batch, rounds, steps, 3)
    return {"images_per_second": round(rate, 2), "mfu": share and round(share, 3),
            "peak_gb": round(memory, 2)}  # fmt: skip


def step_results(models: list[str], batches: list[int]) -> Iterator[Result]:
    """Measure the official design, ours, and ours compiled, for each micro-batch and model."""
    half, ours = ("fp16", "bf16") if ON_GPU else ("fp32", "fp32")
    for batch in batches:
        for name in models:
            ways = [Way(name, True, half, "none", False), Way(name, False, ours, "none", False)]
            if ON_GPU:
                ways.append(Way(name, False, ours, "none", True))
            for way in ways:
                found = alone(a_step, way, batch, 3 if ON_GPU else 1, 10 if ON_GPU else 1)
                result = {"model": name, "batch": batch, "way": str(way), **found}
                if not way.official:
                    result["planned_gb"] = planned_gb(name, batch, ours)
                yield result


def determinism(small: bool) -> Iterator[Result]:
    name, batch = (SMALL[0], 4) if small else (MODELS[1], 32)
    sizes_ = {"img_size": 32, "patch_size": 8, "depth": 2} if small else {}
    for wanted in (True,) if small else (False, True):
        runs = [alone(same_bits, name, batch, sizes_, wanted, 3 if small else 20) for _ in "12"]
        same = "digest" in runs[0] and runs[0]["digest"] == runs[1].get("digest")
        result: Result = {"train.deterministic": wanted, "same_bits": same}
        result["images_per_second"] = [run.get("images_per_second") for run in runs]
        if errors := [run["error"] for run in runs if "error" in run]:
            result["error"] = errors[0]
        yield result


def synchronisations(small: bool) -> Iterator[Result]:
    sizes_ = {"img_size": 32, "patch_size": 8, "depth": 2} if small else {}
    name, batch = (SMALL[0], 4) if small else (MODELS[0], 32)
    for stage in (PLAIN, *(SMALL_STAGES if small else STAGES)):
        yield alone(waits, stage, name, batch, sizes_, "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", default=not ON_GPU, help="tiny models")
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="micro-batches")
    parser.add_argument("--models", nargs="+", default=None, help="of the part step")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing new after them")
    parser.add_argument("--only", nargs="+", default=None, help="names of parts")
    args = parser.parse_args()
    batches = args.batch or ([2] if args.small else [64, 256])
    ends, results = time.monotonic() + 60 * args.minutes, []
    print(json.dumps({"part": "machine", "text": header("timm", "deepspeed")}), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data: list[Path] = []

        def images() -> Path:
            if not data:
                data.append(shards(folder, 64 if args.small else 1024))
            return data[0]

        def read() -> Iterator[Result]:
            workers = [0] if args.small else [1, data_workers()]
            for number in workers:
                yield alone(loader, images(), number, 16 if args.small else 128)

        parts: dict[str, Callable[[], Iterator[Result]]] = {
            "stages": lambda: stages(images(), folder, args.small),
            "commands": lambda: commands(images(), folder, args.small),
            "synchronisations": partial(synchronisations, args.small),
            "numbers": lambda: iter([alone(numbers, args.small)]),
            "attention": partial(attention, args.small),
            "deterministic": partial(determinism, args.small),
            "loader": read,
            "upload": lambda: iter([alone(upload)]),
            "step": partial(
                step_results, args.models or [*(SMALL if args.small else MODELS)], batches
            ),
        }
        for part, function in parts.items():
            if args.only and part not in args.only:
                continue
            try:
                for result in function():
                    results.append({"part": part, **result})
                    print(json.dumps(results[-1]), flush=True)
                    if time.monotonic() > ends:
                        break
            except Exception as error:
                results.append({"part": part, "error": f"{type(error).__name__}: {error}"})
                print(json.dumps(results[-1]), flush=True)
            if time.monotonic() > ends:
                left = [
                    name for name in parts if name > "" and name not in {r["part"] for r in results}
                ]
                print(json.dumps({"part": "time", "not_begun": left}), flush=True)
                break
    print(f"\n{header('timm', 'deepspeed')}")
    for part in dict.fromkeys(result["part"] for result in results):
        print(f"\n{part}")
        for result in results:
            if result["part"] == part:
                rest = {key: value for key, value in result.items() if key != "part"}
                print("  " + "  ".join(f"{key} {value}" for key, value in rest.items()))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may still use freed objects (see mae_scale.cli.entry)
