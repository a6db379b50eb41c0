#!/usr/bin/env python3
"""Bytes that the forward pass keeps for the backward pass, and the time of both.

Counted are the tensors that autograd saves on the device, each storage once, weights left out;
with offload the inputs of the recomputed blocks are in host memory instead. Beside it what the
blocks should keep by formula: 16 times tokens x width values for a block that is kept (the inputs
of both norms, of qkv, of the attention (3), of proj, of fc1 and, 4 each, of GELU and fc2), 1 for
one that is recomputed. What is above the formula lies outside the blocks: patch embedding,
decoder_embed, the last norms, prediction and loss, and the statistics of norms and attention.

On a CPU the host is the device: offload copies nothing there, so its time says nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from machine import header

from mae_scale.models import MaskedAutoencoderViT, build_mae
from mae_scale.models.masking import num_kept

MODELS = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
WAYS: tuple[tuple[str | int, bool], ...] = (
    ("none", False), (4, False), (2, False), ("full", False), ("full", True),
)  # fmt: skip


def saved_bytes(model: MaskedAutoencoderViT, images: torch.Tensor, noise: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd saves on the device."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _, _ = model(images, noise)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del loss
    return sum(size for place, size in storages.items() if place not in weights)


def block_bytes(model: MaskedAutoencoderViT, every: str | int, offload: bool, value: int) -> float:
    """What the blocks keep of one image on the device, by formula; `value` bytes each value."""
    k = {"none": 0, "full": 1}.get(every, every) if isinstance(every, str) else every
    visible = 1 + num_kept(model.num_patches, model.mask_ratio)
    total = 0
    for blocks, tokens, width in (
        (model.blocks, visible, model.decoder_embed.in_features),
        (model.decoder_blocks, 1 + model.num_patches, model.decoder_embed.out_features),
    ):
        recomputed = sum(i % k == 0 for i in range(len(blocks))) if k else 0
        kept = 16 * (len(blocks) - recomputed) + (0 if offload else recomputed)
        total += kept * tokens * width * value
    return total


def seconds(
    model: MaskedAutoencoderViT, images: torch.Tensor, noise: torch.Tensor, steps: int
) -> float:
    """Median time of a forward and backward pass."""
    times = []
    for _ in range(steps + 1):
        synchronize()
        began = time.perf_counter()
        model(images, noise)[0].backward()
        synchronize()
        times.append(time.perf_counter() - began)
        model.zero_grad()
    return statistics.median(times[1:])


def synchronize() -> None:
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
        f"{'model':24}{'checkpointing':>15}{'saved MB/image':>16}{'blocks by formula':>19}"
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
            saved = saved_bytes(model, images, noise) / args.batch
            time_s = seconds(model, images, noise, args.steps) / args.batch
            none = (saved, time_s) if every == "none" else none
            formula = block_bytes(model, every, offload, dtype.itemsize)
            label = f"{every if isinstance(every, str) else f'every {every}'}" + (
                ", offload" if offload else ""
            )
            print(
                f"{name:24}{label:>15}{saved / 1e6:16.2f}{formula / 1e6:19.2f}"
                f"{saved / none[0]:9.3f}{time_s * 1e3:10.1f}{time_s / none[1]:8.2f}",
                flush=True,
            )
        del model
        gc.collect()


if __name__ == "__main__":
    main()
