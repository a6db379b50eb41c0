"""Model FLOPs utilisation: the share of a GPU's peak that goes into the model's own operations."""

from __future__ import annotations

import re

import torch

# Dense (not sparse) bf16 tensor-core peaks with fp32 accumulation, in TFLOP/s, written down from
# memory and still to be checked against the vendors' data sheets, by a pattern
# of the device's name; the first that is found counts.
PEAK_TFLOPS = {
    r"\bMIG\b": None,  # a slice of a GPU; its name does not say how large
    r"\b(GB200|GB300)\b": 2500.0,
    r"\b(B200|B300)\b": 2250.0,
    r"\bB100\b": 1750.0,
    r"\bH[12]00 NVL\b": 835.5,
    r"\bH100 PCIe\b": 756.5,
    r"\b(H100|H200|H800|GH200)\b": 989.4,
    r"\bH20\b": 148.0,
    r"\bA100\b": 312.0,
    r"\bA800\b": 312.0,
    r"\bA40\b": 149.7,
    r"\bA30\b": 165.0,
    r"\bA10\b": 125.0,
    r"\bL40S\b": 362.1,
    r"\bL40\b": 181.0,
    r"\bL4\b": 121.0,
    r"\bRTX 6000 Ada\b": 364.2,
    r"\bRTX A6000\b": 154.8,
    r"\bRTX 5090$": 209.5,
    r"\bRTX 4090$": 165.2,
    r"\bRTX 3090$": 71.0,
    r"\bMI300X\b": 1307.4,
    r"\bMI250X?\b": 191.5,  # of one of the two devices that a card shows as
}


def peak_flops(name: str) -> float | None:
    """Dense bf16 operations per second of a GPU by its name; None if it has none or is unknown."""
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.search(pattern, name):
            return tflops and tflops * 1e12
    return None


def mfu(
    flops_per_image: float, images_per_second_per_gpu: float, device: torch.device
) -> float | None:
    """Model FLOPs utilisation, 0 to 1, against the bf16 peak whatever the run's precision is.

    Args:
        flops_per_image: of a training step, as by `models.flops.training_flops`.
        images_per_second_per_gpu: trained.
        device: of this rank.

    Returns:
        None on a CPU and on a GPU whose peak is not known.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return peak and flops_per_image * images_per_second_per_gpu / peak
