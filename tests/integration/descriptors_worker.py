"""A rank of test_descriptors.py, which builds a small engine and counts its open files."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))

import torch  # noqa: E402

from mae_scale.config.sections import OptimConfig, TrainConfig  # noqa: E402
from mae_scale.launch.distributed import gather_to_all, process_group  # noqa: E402
from mae_scale.train.deepspeed_config import fill_deepspeed_config  # noqa: E402
from mae_scale.train.engine import build_engine, fill_in  # noqa: E402
from mae_scale.world import World  # noqa: E402


class Small(torch.nn.Linear):
    def initialize_module(self, module: torch.nn.Module) -> None:
        self.reset_parameters()


world = World.from_environment()
with process_group(world, 120):
    train = TrainConfig(global_batch_size=world.size, micro_batch_size=1)
    config = fill_deepspeed_config("zero1", train, world, "fp32")
    model = Small(4, 4)
    fill_in(model, 0, config)
    engine = build_engine(model, OptimConfig(), config)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    counts = gather_to_all(len(list(Path("/proc/self/fd").iterdir())))
    if world.rank == 0:
        Path(sys.argv[1]).write_text(
            json.dumps([counts, resource.getrlimit(resource.RLIMIT_NOFILE)])
        )
