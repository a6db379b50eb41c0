"""Peaks and memory of GPUs by name, and the share of its peak that a run uses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mae_scale.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

# Dense (not sparse) bf16 tensor-core peaks with fp32 accumulation, in TFLOP/s, by a pattern of the
# device's name; the first pattern that matches counts. A peak is listed only if independent tables
# of the vendors' data sheets agree on it (compared on 2026-11-24); for any other GPU the MFU is
# null.
PEAK_TFLOPS = {
    r"\bMIG\b": None,  # a slice of a GPU; its name does not say how large
    r"\bB200\b": 2250.0,
    r"\bB100\b": 1750.0,
    r"\bH100 NVL\b": 835.5,
    r"\bH100 PCIe\b": 756.5,
    r"\bH200 NVL\b": None,
    r"\b(H100|H200|H800|GH200)\b": 989.4,
    r"\bH20\b": 148.0,
    r"\b(A100|A800)\b": 312.0,
    r"\bA30\b": 165.0,
    r"\bA10\b": 125.0,
    r"\bL40S\b": 362.1,
    r"\bL40\b": 181.0,
    r"\bRTX 4090$": 165.2,
    r"\bMI300X\b": 1307.4,
    r"\bMI250X?\b": 191.5,  # for one of the two devices of a card
}

# Memory of a GPU in GB (1e9 bytes, rounded down), by the name that people use.
GPU_MEMORY_GB = {
    "A10": 24, "A30": 24, "A100-40GB": 40, "A100-80GB": 80, "A800-80GB": 80, "L40": 48, "L40S": 48,
    "H100": 80, "H100-PCIe": 80, "H100-NVL": 94, "H800": 80, "H20": 96, "H200": 141, "GH200": 96,
    "B200": 180, "MI250X": 64, "MI300X": 192, "RTX-4090": 24, "V100-16GB": 16, "V100-32GB": 32,
}  # fmt: skip


# GPUs that compute neither in bf16 nor, with fp32, in TF32.
_BEFORE_AMPERE = r"\b(V100|P100|T4|TITAN V|RTX 20\d\d)\b"


def knows_bf16(name: str) -> bool:
    """Return whether a GPU of this name computes in bf16."""
    return re.search(_BEFORE_AMPERE, name.replace("-", " ")) is None


def peak_flops(name: str) -> float | None:
    """Return a GPU's dense bf16 peak in operations per second, by its name; None if unknown."""
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.search(pattern, name):
            return tflops and tflops * 1e12
    return None


def peak_of(device: torch.device) -> float | None:
    """Return the peak of a device as `peak_flops` does; None for a CPU."""
    import torch

    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def mfu(
    flops_per_image: float, images_per_second_per_gpu: float, device: torch.device
) -> float | None:
    """Compute the model FLOPs utilisation, against the bf16 peak whatever the run's precision is.

    Args:
        flops_per_image: operations of training on an image, as by `planning.flops.count_flops`.
        images_per_second_per_gpu: number of images that each GPU trains on in a second.
        device: device of this rank.

    Returns:
        The utilisation, 0 to 1; None on a CPU and on a GPU whose peak is not known.
    """
    peak = peak_of(device)
    return peak and flops_per_image * images_per_second_per_gpu / peak


def named_gpu(name: str, memory_gb: float | None) -> tuple[str, float]:
    """Return the name of a GPU as `GPU_MEMORY_GB` spells it, and its memory in GB.

    Args:
        name: name as a user writes it.
        memory_gb: memory in GB that the user states; None: that of the GPU of this name.

    Raises:
        UserError: no memory is stated for a GPU that is not known.
    """
    name = {key.lower(): key for key in GPU_MEMORY_GB}.get(name.lower(), name)
    memory = memory_gb or GPU_MEMORY_GB.get(name)
    if memory is None:
        kinds = [known for known in GPU_MEMORY_GB if known.lower().startswith(name.lower())]
        hint = f"did you mean {' or '.join(map(repr, kinds))}?"
        raise UserError(
            f"--gpu {name!r} is not known; {hint if kinds else did_you_mean(name, GPU_MEMORY_GB)} "
            f"Known are {', '.join(GPU_MEMORY_GB)}; for another one give --memory_gb"
        )
    return name, memory
