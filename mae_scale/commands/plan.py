"""Plan a recipe on a cluster: memory, time, data and saves, before anything runs.

For one number of GPUs and one config it prints a table over ZeRO stages, activation checkpointing
and micro-batches, the setting to choose, and the command to submit. For several of them it prints a
line each. Any config key can be set as in training; deepspeed, train.micro_batch_size and
train.activation_checkpointing are chosen unless they are on the command line.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from mae_scale.commands.arguments import Parser
from mae_scale.config.hints import hint_for
from mae_scale.config.keys import config_keys
from mae_scale.config.parsing import given_values, parse
from mae_scale.errors import UserError, did_you_mean
from mae_scale.planning.gpus import GPU_MEMORY_GB
from mae_scale.tasks.task import TASKS, Task, task_of_arguments

# Words that stand for paths that every run needs, where the arguments do not give them.
PLACES = {"run_dir": "RUN", "data.train": "SHARDS"}


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config RECIPE_OR_FILE [--section.key value ...] --gpus N [options]",
    )
    add = parser.add_argument
    add("--config", nargs="+", default=["pretrain_vit_base"], help="recipes or YAML files")
    add("--task", choices=list(TASKS), help="task of the config; default: found by its keys")
    add("--gpus", type=int, nargs="+", help="number of GPUs, or several numbers to compare")
    add("--gpus_per_node", type=int, default=8, help="(default: %(default)s)")
    add("--gpu", help=f"one of {', '.join(GPU_MEMORY_GB)}, or any name with --memory_gb and "
        "--tflops (default: A100-80GB)")  # fmt: skip
    add("--this_machine", action="store_true", help="plan for the GPUs, or the CPU, of this one")
    add("--memory_gb", type=float, help="memory of a GPU in 1e9 bytes; default: by its name")
    add("--tflops", type=float, help="dense bf16 peak of a GPU; default: by its name")
    add("--mfu", type=float, default=0.4, help="share of the peak that the model's own operations "
        "reach while a GPU computes (default: %(default)s)")  # fmt: skip
    add("--network_gbs", type=float, default=100.0, help="GB/s of all links of a node together, "
        "nccl-tests' bus bandwidth (default: 100, four links of 200 Gbit/s)")  # fmt: skip
    add("--disk_gbs", type=float, default=2.0, help="GB/s that all ranks together write to the run "
        "folder (default: 2)")  # fmt: skip
    add("--images_per_core", type=float, default=674.0, help="images/s that a core decodes and "
        "crops (default: 674, benchmarks/results/data_loading.txt)")  # fmt: skip
    add("--checkpoint_minutes", type=float, help="between two checkpoints; default: the config's")
    add("--restart_minutes", type=float, default=5.0, help="from the end of a job to its next step "
        "(default: 5)")  # fmt: skip
    add("--host_ms", type=float, default=0.7, help="milliseconds in which the host hands a block "
        "over to a GPU, forward and backward (default: %(default)s; measure it with "
        "benchmarks/host_time.py)")  # fmt: skip
    add("--json", type=Path, help="file to write all numbers to")
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, plan, print, and write the JSON."""
    options, rest = parser(prog).parse_known_args(argv)
    _check_cluster(options)
    tasks = {name: _check_config(name, rest, options.task, prog) for name in options.config}

    from mae_scale.commands.planner import plan

    plan(options, rest, tasks, prog)
    return 0


def config_arguments(name: str, rest: list[str]) -> list[str]:
    """Compose the arguments that give a config, with `PLACES` for paths that are not given.

    Args:
        name: recipe or YAML file.
        rest: config keys among the arguments of `mae-scale plan`.
    """
    argv = ["--config", name, *rest]
    given = given_values(argv)
    return argv + [f"--{key}={place}" for key, place in PLACES.items() if key not in given]


def _check_cluster(options: argparse.Namespace) -> None:
    for name in ("memory_gb", "tflops", "mfu", "network_gbs", "disk_gbs", "images_per_core",
                 "host_ms", "checkpoint_minutes", "gpus_per_node"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g} must be more than 0")
    if options.mfu > 1:
        raise UserError(f"--mfu {options.mfu:g} is a share, at most 1")
    if not 0 <= options.restart_minutes < math.inf:
        raise UserError(f"--restart_minutes {options.restart_minutes:g} must be at least 0")
    for number in options.gpus or ():
        if number < 1:
            raise UserError(f"--gpus {number} must be at least 1")
    if not options.this_machine:
        gpu_name(options)


def gpu_name(options: argparse.Namespace) -> str:
    """Return the name of the GPU as the tables of `planning.gpus` spell it.

    Raises:
        UserError: no number of GPUs is given, or the GPU is unknown and its memory is not given.
    """
    if options.gpus is None:
        raise UserError("say how many GPUs: --gpus N, or --this_machine")
    name = options.gpu or "A100-80GB"
    name = {key.lower(): key for key in GPU_MEMORY_GB}.get(name.lower(), name)
    if name not in GPU_MEMORY_GB and options.memory_gb is None:
        kinds = [known for known in GPU_MEMORY_GB if known.lower().startswith(name.lower())]
        hint = (
            f"did you mean {' or '.join(map(repr, kinds))}?"
            if kinds
            else did_you_mean(name, GPU_MEMORY_GB)
        )
        raise UserError(
            f"--gpu {name!r} is not known; {hint} Known are {', '.join(GPU_MEMORY_GB)}; for "
            "another one give --memory_gb and --tflops"
        )
    return name


def _check_config(name: str, rest: list[str], task_name: str | None, prog: str) -> Task:
    """Find the task of a config, and raise a UserError where the config cannot be used."""
    argv = ["--config", name, *rest]
    task = TASKS[task_name] if task_name else task_of_arguments(argv)
    if not task.is_planned:
        raise UserError(
            f"plan does not know the memory and the time of {task.name}; docs/dense.md has what "
            "was published of it"
        )
    own = [action.option_strings[-1] for action in parser("")._actions]
    keys = list(config_keys(task.config))
    sections = task.config.model_fields
    for token in rest:
        option = token.split("=")[0]
        if option.startswith("--") and option[2:].split(".")[0] not in sections:
            hint = did_you_mean(option, own, "", 0.75) or hint_for(option[2:], keys)
            raise UserError(f"unknown option {option}; {hint}")
    parse(task.config, config_arguments(name, rest), prog)
    return task
