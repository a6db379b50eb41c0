#!/usr/bin/env python3
"""Measure the bytes that a forward pass keeps for the backward pass, and the time of both.

It counts the tensors that autograd saves on the device, each storage once, without the weights;
with offload the inputs of the recomputed blocks are in host memory instead. `mae-scale plan` counts
the peak of a step on the meta device; `plan_error.py` compares that with what is measured.

On a CPU the host is the device: offload copies nothing there, so its time means nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial

import torch
from machine import header
from torch import nn

from mae_scale.models import MaskedAutoencoderViT, build_mae

MODELS = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
WAYS: tuple[tuple[str | int, bool], ...] = (
    ("none", False), (4, False), (2, False), ("full", False), ("full", True),
)  # fmt: skip


class _Saved:
    """A saved tensor, which is freed with the graph that holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> int:
    """Count the bytes of the distinct storages that autograd has saved once the loss is
    computed."""
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = loss_of()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = [holder.tensor for holder in saved]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    del loss
    return sum(size for place, size in storages.items() if place not in weights)


def loss_of(model: MaskedAutoencoderViT, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return model(images, noise)[0]


def seconds(
    model: MaskedAutoencoderViT, images: torch.Tensor, noise: torch.Tensor, steps: int
) -> float:
    """Measure the median time of a forward and backward pass, in seconds."""
    times = []
    for _ in range(steps + 1):
        synchronize()
        began = time.perf_counter()
        loss_of(model, images, noise).backward()
        synchronize()
        times.append(time.perf_counter() - began)
        model.zero_grad()
    return statistics.median(times[1:])


def synchronize() -> None:
    """Wait until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    print(f"{header('timm')}\n{precision}, batch {args.batch}, on {device.type}")
    print(
        f"{'model':24}{'checkpointing':>15}{'saved MB/image':>16}"
        f"{'of none':>9}{'ms/image':>10}{'x none':>8}"
    )
    for name in args.models:
        torch.manual_seed(0)
        model = build_mae(name).to(device, dtype)
        images = torch.randn(args.batch, 3, 224, 224, device=device)
        noise = torch.rand(args.batch, model.num_patches, device=device)
        none = (0.0, 0.0)
        for every, offload in WAYS:
            model.set_activation_checkpointing(every, offload)
            saved = saved_bytes(model, partial(loss_of, model, images, noise)) / args.batch
            time_s = seconds(model, images, noise, args.steps) / args.batch
            none = (saved, time_s) if every == "none" else none
            label = f"{every if isinstance(every, str) else f'every {every}'}" + (
                ", offload" if offload else ""
            )
            print(
                f"{name:24}{label:>15}{saved / 1e6:16.2f}"
                f"{saved / none[0]:9.3f}{time_s * 1e3:10.1f}{time_s / none[1]:8.2f}",
                flush=True,
            )
        del model
        gc.collect()


if __name__ == "__main__":
    main()
