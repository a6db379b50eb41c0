"""DeepSpeed, changed where this project needs it; modules that run an engine import it here."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess the same, with a warning
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import deepspeed
from deepspeed import DeepSpeedConfig, DeepSpeedConfigError, DeepSpeedEngine
from deepspeed.runtime import compiler, utils
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
    stage_1_and_2,
)
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    InflightParamRegistry,
    PartitionedParameterCoordinator,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

# On a CPU DeepSpeed would compile a shared-memory op with g++ at the first start. Only its
# inference uses it; it needs a vector unit that not every CPU has, and a killed rank would leave
# its segments in /dev/shm. DeepSpeed looks the op up in this list, which it would otherwise make by
# trying the compiler on every op.
deepspeed.ops.__compatible_ops__ = {}

# Making an engine imports DeepSpeed's Muon, and that the whole of PyTorch's compiler, to compile a
# function that is not used here: more than a second at each start. So Muon is imported uncompiled.
_compile, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
compiler.compile = _compile

# Under ZeRO-1 in bf16 with fp32 accumulation DeepSpeed would take its older BF16_Optimizer, whose
# files its own zero_to_fp32.py cannot read, and which asks the device for the norm at each step.
# The optimiser of ZeRO-2 does stage 1 as well.
deepspeed.runtime.engine.BFLOAT16 = deepspeed.runtime.engine.ZERO_OPTIMIZATION


def _mask_without_waiting(norm: torch.Tensor, device: object = None, val: float = -1.0) -> None:
    """Put `val` in the place of a norm that is not finite.

    DeepSpeed's own function first copies a number from the host to the device, once for each group
    of the optimiser, and the host waits for that copy.
    """
    norm.masked_fill_(~torch.isfinite(norm), val)


for _module in (stage_1_and_2, stage3, utils):
    _module.mask_nan_or_inf_with_val_inplace = _mask_without_waiting

# DeepSpeed asks the device whether the norm is finite, to skip the step if it is not. Instead,
# `nonfinite.StepGuard` decides on the device: the norm of such a step is infinite, and the
# optimiser then changes nothing.
stage3.is_invalid_grad_norm = stage_1_and_2.is_invalid_grad_norm = lambda norm: False


def _take_without_waiting(handle: Any, **kwargs: Any) -> None:
    """Mark the weights as available that the only rank of a group takes from itself.

    DeepSpeed's own method first makes the host wait for the stream on which they may be copied. Who
    computes on another stream lets that one wait for it anyway, on the device.
    """
    prefix = f"_{type(handle).__name__}__"  # Python's name of private attributes
    if getattr(handle, f"{prefix}complete"):
        return
    one, several = f"{prefix}param", f"{prefix}params"
    for param in getattr(handle, several) if hasattr(handle, several) else [getattr(handle, one)]:
        param.ds_status = partition_parameters.ZeroParamStatus.AVAILABLE
    setattr(handle, f"{prefix}complete", True)


for _handle in (partition_parameters.NoGatherHandle, partition_parameters.NoGatherCoalescedHandle):
    _handle.wait = _take_without_waiting

# DeepSpeed marks some 2,000 calls of a step under ZeRO-3 for NVIDIA's profiler, which takes time.
# PyTorch's profiler, which `train.profile` uses, does not show these marks.
deepspeed.utils.nvtx.enable_nvtx = False

stage3_modules = (parameter_offload, partitioned_param_coordinator)


def _print_if_forced(message: str, debug: bool = False, force: bool = False) -> None:
    """Print a message of DeepSpeed's on rank 0, if it is to be seen.

    DeepSpeed's own function asks for the rank first, some 2,000 times in a step under ZeRO-3, and
    then prints nothing.
    """
    if (debug or force) and deepspeed.comm.get_rank() == 0:
        print(message)


for _module in (partition_parameters, *stage3_modules):
    _module.print_rank_0 = _print_if_forced

__all__ = [
    "DeepSpeedBF16Config",
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedEngine",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "FP16_UnfusedOptimizer",
    "InflightParamRegistry",
    "PartitionedParameterCoordinator",
    "TorchCheckpointEngine",
    "deepspeed",
    "partition_parameters",
    "stage3",
    "stage3_modules",
]
