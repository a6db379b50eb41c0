"""Plan a recipe on a cluster before anything runs: memory, batch, time, and the command.

For one number of GPUs and one config it prints the setting to choose, what follows from it, and the
command to submit; for several of them a line each. Any config key can be set as in training;
deepspeed, train.micro_batch_size and train.activation_checkpointing are chosen unless they are on
the command line. Times come from measurements only.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from mae_scale.commands.arguments import Parser
from mae_scale.config.hints import hint_for
from mae_scale.config.keys import config_keys
from mae_scale.config.parsing import config_arguments, parse
from mae_scale.errors import UserError, did_you_mean
from mae_scale.planning.gpus import GPU_MEMORY_GB, named_gpu
from mae_scale.tasks.task import TASKS, Task, task_of_arguments


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config RECIPE_OR_FILE [--section.key value ...] --gpus N [options]",
    )
    add = parser.add_argument
    known = ", ".join(GPU_MEMORY_GB)
    add("--config", nargs="+", default=["pretrain_vit_base"], help="recipes or YAML files")
    add("--task", choices=list(TASKS), help="task of the config; default: found by its keys")
    add("--gpus", type=int, nargs="+", help="number of GPUs, or several numbers to compare")
    add("--gpus_per_node", type=int, default=8, help="(default: %(default)s)")
    add("--gpu", help=f"{known}; or any name with --memory_gb (default: A100-80GB)")
    add("--this_machine", action="store_true", help="plan for the GPUs, or the CPU, of this one")
    add("--memory_gb", type=float, help="memory of a GPU in 1e9 bytes; default: by its name")
    network = "bus bandwidth of a node by nccl-tests in GB/s; default: times leave the network out"
    add("--network_gbs", type=float, help=network)
    rate = "what you measured of one GPU with this config; default: what the project measured"
    add("--images_per_second", type=float, help=rate)
    measure = "time ten steps on the GPU, or the CPU, of this machine, and plan from them"
    add("--measure", action="store_true", help=measure)
    add("--why", action="store_true", help="also show what was compared, and the rule")
    add("--json", type=Path, help="file to write all numbers to")
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, plan, print, and write the JSON."""
    options, rest = parser(prog).parse_known_args(argv)
    _check_options(options)
    tasks = {name: _check_config(name, rest, options.task, prog) for name in options.config}

    from mae_scale.files import write_atomically
    from mae_scale.planning.text import comparison, page
    from mae_scale.tasks.planned import clusters_of, job_of, plan_of

    clusters, plans = clusters_of(options), []
    for name in options.config:
        job = job_of(name, rest, tasks[name], prog)
        plans += [plan_of(name, job, cluster, options, rest) for cluster in clusters]
    text = page(plans[0], options.why) if len(plans) == 1 else comparison(plans)
    if options.json is not None:
        content = {"plans": [plan.as_dict() for plan in plans]}
        try:
            write_atomically(options.json, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {options.json} cannot be written: {error.strerror}") from None
    print(text)
    return 0


def _check_options(options: argparse.Namespace) -> None:
    for name in ("memory_gb", "network_gbs", "images_per_second", "gpus_per_node"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g} must be more than 0")
    for number in options.gpus or ():
        if number < 1:
            raise UserError(f"--gpus {number} must be at least 1")
    here = "--this_machine" if options.this_machine else "--measure" if options.measure else ""
    if here and options.gpu is not None:
        raise UserError(f"{here} takes the device that is here, not --gpu {options.gpu}")
    if options.measure and options.images_per_second:
        raise UserError("--measure and --images_per_second exclude each other")
    if options.measure and len(options.config) * len(options.gpus or [1]) > 1:
        raise UserError("--measure takes one --config and one number of --gpus")
    if not here and options.gpus is None:
        raise UserError("say how many GPUs: --gpus N, or --this_machine")
    if options.gpu is not None:
        named_gpu(options.gpu, options.memory_gb)


def _check_config(name: str, rest: list[str], task_name: str | None, prog: str) -> Task:
    """Find the task of a config, and raise a UserError where the config cannot be used."""
    argv = ["--config", name, *rest]
    task = TASKS[task_name] if task_name else task_of_arguments(argv)
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
