"""The time of a training step, only from what was measured on GPUs.

`ROWS` are the rows of this project in benchmarks/results/gpu*.txt: pre-training of 224 pixels in
bf16, without recomputing, on one GPU without a network. Two limits follow from them: the host's
time for a block, from the smallest micro-batches, and the share of the peak that the kernels
reach, from all rows. A step takes the longer of the two, and between rows both are interpolated.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from mae_scale.planning.gpus import peak_flops


@dataclass(frozen=True)
class Measured:
    """A row of benchmarks/results/."""

    card: str  # name of the GPU
    model: str  # name of the masked autoencoder
    micro_batch: int  # images of a step
    images_per_second: float  # images of a second on one GPU
    mfu: float  # model FLOPs utilisation
    stage: str = "zero1"  # DeepSpeed config
    compiled: bool = False  # whether the blocks were compiled


_B, _L, _H = "mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"
ROWS = (
    Measured("H200", _B, 64, 1910.49, 0.113),
    Measured("H200", _B, 64, 1714.0, 0.101, compiled=True),
    Measured("H200", _L, 64, 994.41, 0.125),
    Measured("H200", _L, 64, 827.48, 0.104, compiled=True),
    Measured("H200", _H, 64, 765.51, 0.225),
    Measured("H200", _H, 64, 871.41, 0.256, compiled=True),
    Measured("H200", _B, 256, 3937.38, 0.233),
    Measured("H200", _B, 256, 4746.48, 0.28, compiled=True),
    Measured("H200", _L, 256, 2321.75, 0.292),
    Measured("H200", _L, 256, 2688.88, 0.338, compiled=True),
    Measured("H100", _B, 64, 1877.04, 0.111),
    Measured("H100", _B, 64, 1358.54, 0.08, compiled=True),
    Measured("H100", _L, 64, 1133.06, 0.142),
    Measured("H100", _L, 64, 1105.56, 0.139, compiled=True),
)
# Blocks of encoder and decoder, and operations for an image, of the models of the rows.
MODELS = {_B: (20, 58.46e9), _L: (32, 124.23e9), _H: (40, 290.99e9)}
# Host's time of a step under each stage in milliseconds: ViT-B, 64 images, one H100, one process
# (the second table of benchmarks/results/gpu_h100.txt). zero3 was a step of this project's;
# DeepSpeed's, which trains now, takes the host about a quarter longer.
HOST_MS = {"zero0": 43.1, "zero1": 37.0, "zero2": 41.7, "zero3": 112.7}
# Cards by a pattern of the names that PyTorch and people use.
CARDS = {r"(NVIDIA )?H100( 80GB HBM3)?": "H100", r"(NVIDIA )?H200": "H200"}


@dataclass(frozen=True)
class Work:
    """What a setting computes."""

    task: str  # name of the task
    # Blocks of encoder and decoder; a frozen one counts a third, as it has no backward pass.
    blocks: float
    flops: float  # operations for an image, forward and backward
    again: float  # share of `flops` that is computed again
    precision: str  # "bf16" or "fp32"
    stage: str  # DeepSpeed config
    compiled: bool  # whether the blocks are compiled


@dataclass(frozen=True)
class Prediction:
    """Time of a micro-batch on one GPU, or why it is not predicted."""

    seconds: float | None  # seconds; None: it is not predicted
    host: float | None  # seconds that the host takes of it at least
    words: str  # what was measured and what was not, or why there is no prediction


def predict(card: str, work: Work, images: int) -> Prediction:
    """Predict the time of a micro-batch of `images` images on a GPU with the name `card`."""
    name = next((own for pattern, own in CARDS.items() if re.fullmatch(pattern, card)), card)
    alike = [row for row in ROWS if row.compiled == work.compiled]
    own = [row for row in alike if row.card == name]
    # Kernels of cards with the same peak reach the same share of it.
    peak = peak_flops(name)
    same = [row for row in alike if peak and peak_flops(row.card) == peak]
    unknown = {
        f"on {card}": not own,
        f"of {work.task}": work.task in ("detect", "segment"),
        f"in {work.precision}": work.precision != "bf16",
        f"of {work.stage}": work.stage not in HOST_MS,
    }
    missing = next((what for what, is_missing in unknown.items() if is_missing), None)
    if missing or peak is None:
        words = f"no measurement {missing}: time is not predicted; --measure times ten steps here"
        return Prediction(None, None, words)
    least = min(row.micro_batch for row in own)
    hosts = [
        (float(blocks), least / row.images_per_second / blocks)
        for row in own
        if row.micro_batch == least
        for blocks in [MODELS[row.model][0]]
    ]
    host = _between(hosts, work.blocks) * work.blocks
    host *= (1 + work.again) * HOST_MS[work.stage] / HOST_MS["zero1"]
    most = {row.model: max(r.micro_batch for r in same if r.model == row.model) for row in same}
    utilised = [
        (math.log(row.micro_batch * MODELS[row.model][1]), row.mfu)
        for row in same
        if row.micro_batch == most[row.model]
    ]
    flops = images * work.flops
    kernels = flops * (1 + work.again) / (peak * _between(utilised, math.log(flops)))
    return Prediction(max(host, kernels), host, _words(name, work, own, same))


def _between(points: list[tuple[float, float]], x: float) -> float:
    """Interpolate linearly; beyond the points the value of the nearest one holds."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x < x1:
            return y0 if x <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def _words(card: str, work: Work, own: list[Measured], same: list[Measured]) -> str:
    """Say what was measured, and what was not."""
    larger = {row.card for row in same if row.micro_batch > max(r.micro_batch for r in own)}
    words = {
        f"from pre-training measured on one {card}, without a network": True,
        f"large micro-batches on {', '.join(sorted(larger))}, of the same peak": bool(larger),
        f"{work.task} was not measured: its operations count as pre-training's": work.task
        != "pretrain",
        "recomputing was not measured: its operations count like others": work.again > 0,
        f"{work.stage} was measured with ViT-B only": work.stage != "zero1",
    }
    return "; ".join(text for text, is_said in words.items() if is_said)
