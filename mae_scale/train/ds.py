"""DeepSpeed, imported the way this project needs it. Everything else imports it from here."""

from __future__ import annotations

import logging
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # its own guess is the same, with a warning
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import deepspeed
from deepspeed import DeepSpeedConfig, DeepSpeedConfigError, DeepSpeedEngine
from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

# On a CPU DeepSpeed would compile a shared-memory op with g++ at the first start. Only its
# inference uses it; it needs a vector unit that not every CPU has, and a killed rank would leave
# its segments in /dev/shm. This list, which DeepSpeed looks that op up in, would otherwise be made
# by trying the compiler on every op.
deepspeed.ops.__compatible_ops__ = {}

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedEngine",
    "deepspeed",
    "ds_to_universal",
    "get_fp32_state_dict_from_zero_checkpoint",
]
