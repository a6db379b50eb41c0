"""DeepSpeed, changed where this project needs it; modules that run an engine import it here."""

from __future__ import annotations

import importlib
import logging
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess the same, with a warning
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import deepspeed
from deepspeed import DeepSpeedConfig, DeepSpeedConfigError, DeepSpeedEngine
from deepspeed.runtime import compiler
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero import partition_parameters, stage_1_and_2
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


stage_1_and_2.mask_nan_or_inf_with_val_inplace = _mask_without_waiting

# At stages 1 and 2 DeepSpeed would ask the device for the norm, and skip a step whose norm is not
# finite. Instead, `nonfinite.StepGuard` decides on the device: the norm of such a step is infinite,
# and the optimiser then changes nothing.
stage_1_and_2.is_invalid_grad_norm = lambda norm: False


def restore_linear() -> None:
    """Put PyTorch's linear layers back that DeepSpeed replaces in the whole process at ZeRO 3."""
    replaced = partition_parameters.InsertPostInitMethodToModuleSubClasses
    torch.nn.functional.linear = getattr(replaced, "linear_bk", torch.nn.functional.linear)


__all__ = [
    "DeepSpeedBF16Config",
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedConfigModel",
    "DeepSpeedEngine",
    "DeepSpeedZeroOptimizer",
    "FP16_UnfusedOptimizer",
    "TorchCheckpointEngine",
    "deepspeed",
    "restore_linear",
]
