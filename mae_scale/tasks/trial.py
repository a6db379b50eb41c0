"""Ten steps of a config on the device at hand, with made-up images, for `mae-scale plan`."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from mae_scale.config.sections import RunConfig
from mae_scale.errors import UserError
from mae_scale.launch.distributed import process_group
from mae_scale.models.compiled import compile_blocks
from mae_scale.planning.flops import TrialLoss, blank_images
from mae_scale.train.deepspeed_config import fill_deepspeed_config, fit_buckets
from mae_scale.train.engine import build_engine, fill_in
from mae_scale.train.metrics import memory_gb
from mae_scale.world import World

WARM_UP, STEPS = 3, 10


def time_steps(
    config: RunConfig, model: Any, trial_loss: TrialLoss, *, stage: str, precision: str, images: int
) -> tuple[float, float]:
    """Train ten steps of one micro-batch in this process, and measure them.

    Args:
        config: config of the run.
        model: model on the meta device, in fp32, with its checkpointing set; it gets weights.
        trial_loss: function that computes the loss of the model for images.
        stage: DeepSpeed config.
        precision: "bf16" or "fp32".
        images: images of the micro-batch.

    Returns:
        Seconds of a step, and the peak memory in GB: on the GPU, or of this process without one.

    Raises:
        UserError: the micro-batch does not fit into the GPU.
    """
    world, train = World(), copy.copy(config.train)
    train.global_batch_size = train.micro_batch_size = images
    fp32_weights = config.fp32_weights or train.autocast
    filled = fill_deepspeed_config(stage, train, world, precision, fp32_weights=fp32_weights)
    filled = fit_buckets(stage, filled, model, world)
    if train.compile:
        compile_blocks(model)
    with process_group(world, train.hang_timeout) as watchdog:
        watchdog.doing("timing steps of the plan")
        fill_in(model, config.seed, filled)
        engine = build_engine(model, config.optim, filled)
        batch = blank_images(engine.module, images).to(engine.device).random_(256)
        seconds = 0.0
        try:
            for steps in (WARM_UP, STEPS):
                began = time.perf_counter()
                for _ in range(steps):
                    engine.backward(trial_loss(engine, batch))
                    engine.step()
                if world.device.type == "cuda":
                    torch.cuda.synchronize(world.device)
                seconds = time.perf_counter() - began
        except torch.OutOfMemoryError:
            raise UserError(
                f"--measure: {images} images do not fit into this GPU; give a smaller "
                "--train.micro_batch_size"
            ) from None
        return seconds / STEPS, memory_gb()
