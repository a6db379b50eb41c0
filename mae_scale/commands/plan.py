"""`mae-scale plan`: memory, time, data and saves of a recipe on a cluster, before anything runs.

One number of GPUs and one config give a table over ZeRO stages, activation checkpointing and
micro-batches, the setting to choose, and the command to submit. Several give a line for each. Any
config key can be set as in training; deepspeed, train.micro_batch_size and
train.activation_checkpointing are chosen unless they are on the command line.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch

from mae_scale.commands.arguments import Parser
from mae_scale.config.parsing import given_values, parse
from mae_scale.config.sections import RunConfig
from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError, did_you_mean
from mae_scale.files import write_atomically
from mae_scale.planning.choice import HEADROOM, Cluster, PlannedRun, Row, RunPlan, choose, rows
from mae_scale.planning.gpus import GPU_MEMORY_GB, peak_flops
from mae_scale.planning.text import comparison, page, recomputed
from mae_scale.tasks.classification import classes_of
from mae_scale.tasks.task import TASKS, task_of_arguments

CHOSEN = ("deepspeed", "train.micro_batch_size", "train.activation_checkpointing",
          "train.activation_offload")  # fmt: skip
# Where no shards are named: ImageNet-1K's training split, and what benchmarks/data_loading.py read.
IMAGENET, IMAGE_BYTES = 1_281_167, 107_600
PLACES = {"run_dir": "RUN", "data.train": "SHARDS"}


def _options(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config RECIPE_OR_FILE [--section.key value ...] --gpus N [options]",
    )
    add = parser.add_argument
    add("--config", nargs="+", default=["pretrain_vit_base"], help="recipes or YAML files")
    add("--task", choices=TASKS, help="whose config it is; default: found out by its keys")
    add("--gpus", type=int, nargs="+", help="number of GPUs, or several numbers to compare")
    add("--gpus_per_node", type=int, default=8)
    add("--gpu", help=f"one of {', '.join(GPU_MEMORY_GB)}, or any name with --memory_gb and "
        "--tflops; default: A100-80GB")  # fmt: skip
    add("--this_machine", action="store_true", help="plan for the GPUs, or the CPU, of this one")
    add("--memory_gb", type=float, help="of a GPU, 1e9 bytes; default: by its name")
    add("--tflops", type=float, help="dense bf16 peak of a GPU; default: by its name")
    add("--mfu", type=float, default=0.4, help="share of the peak that the model's own operations "
        "reach while a GPU computes (default: 0.4)")  # fmt: skip
    add("--network_gbs", type=float, default=100.0, help="GB/s of all links of a node together, "
        "nccl-tests' bus bandwidth (default: 100, four links of 200 Gbit/s)")  # fmt: skip
    add("--disk_gbs", type=float, default=2.0, help="GB/s that all ranks together write to the run "
        "folder (default: 2)")  # fmt: skip
    add("--images_per_core", type=float, default=674.0, help="images/s that a core decodes and "
        "crops (default: 674, benchmarks/results/data_loading.txt)")  # fmt: skip
    add("--checkpoint_minutes", type=float, help="between two checkpoints; default: the config's")
    add("--restart_minutes", type=float, default=5.0, help="from the end of a job to its next step "
        "(default: 5)")  # fmt: skip
    add("--json", type=Path, help="file to write all numbers to")
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, plan, print, and write the JSON."""
    options, rest = _options(prog).parse_known_args(argv)
    _check_numbers(options)
    clusters = _clusters(options)
    plans = []
    for name in options.config:
        job = _job(name, rest, options.task, prog)
        plans += [_plan(name, job, cluster, options, rest) for cluster in clusters]
    text = page(plans[0]) if len(plans) == 1 else comparison(plans)
    if options.json is not None:
        _write(options.json, [plan.as_dict() for plan in plans])
    print(text)
    return 0


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("memory_gb", "tflops", "mfu", "network_gbs", "disk_gbs", "images_per_core",
                 "checkpoint_minutes", "gpus_per_node"):  # fmt: skip
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


def _clusters(options: argparse.Namespace) -> list[Cluster]:
    """One for each number of GPUs.

    Raises:
        UserError: memory or peak of the GPU are not known, or the nodes are not full.
    """
    known_memory: float | None
    if options.this_machine:
        if options.gpu is not None:
            raise UserError("--gpu and --this_machine exclude each other: it has the GPUs it has")
        here = torch.cuda.device_count()
        numbers, per_node = options.gpus or [max(1, here)], here or max(options.gpus or [1])
        if here:
            properties = torch.cuda.get_device_properties(0)
            name, known_memory = properties.name, properties.total_memory / 1e9
        else:
            name, known_memory = "CPU", psutil.virtual_memory().total / 1e9
        if max(numbers) > per_node:
            raise UserError(f"--gpus {max(numbers)}: this machine has {here}")
    else:
        if options.gpus is None:
            raise UserError("say how many GPUs: --gpus N, or --this_machine")
        name = options.gpu or "A100-80GB"
        numbers, per_node = options.gpus, options.gpus_per_node
        known = {key.lower(): key for key in GPU_MEMORY_GB}
        name = known.get(name.lower(), name)
        known_memory = GPU_MEMORY_GB.get(name)
        if known_memory is None and options.memory_gb is None:
            hint = did_you_mean(name, GPU_MEMORY_GB)
            raise UserError(
                f"--gpu {name!r} is not known; {hint} Known are {', '.join(GPU_MEMORY_GB)}; of "
                "another one say --memory_gb and --tflops"
            )
    peak = peak_flops(name.replace("-", " "))
    tflops = options.tflops or (peak and peak / 1e12)
    if tflops is None and name != "CPU":
        raise UserError(f"the bf16 peak of {name} is not known; say --tflops (dense, not sparse)")
    for number in numbers:
        if number > per_node and number % per_node:
            near = number // per_node * per_node
            raise UserError(
                f"--gpus {number} are no full nodes of {per_node}; {near} or {near + per_node} "
                "would be, or another --gpus_per_node"
            )
    memory = options.memory_gb or known_memory
    assert memory is not None
    return [
        Cluster(
            gpus=number,
            gpus_per_node=min(number, per_node),
            name=name,
            memory_gb=memory / number if name == "CPU" else memory,
            tflops=tflops,
            mfu=options.mfu,
            network_gbs=options.network_gbs,
            disk_gbs=options.disk_gbs,
            images_per_core=options.images_per_core,
            restart_minutes=options.restart_minutes,
        )
        for number in numbers
    ]


def _job(name: str, rest: list[str], task_name: str | None, prog: str) -> PlannedRun:
    """The run of a config and further `--section.key value` arguments."""
    argv = ["--config", name, *rest]
    task = TASKS[task_name] if task_name else task_of_arguments(argv)
    if not task.is_planned:
        raise UserError(
            f"plan does not know the memory and the time of {task.name}; docs/dense.md has what "
            "was published of it"
        )
    given = given_values(argv)
    _check_known(rest, task.config)
    for key, place in PLACES.items():
        if key not in given:
            argv.append(f"--{key}={place}")
    config = parse(task.config, argv, prog)
    images, classes, image_bytes = IMAGENET, task.num_classes, float(IMAGE_BYTES)
    if any(token.split("=")[0] == "--data.train" for token in rest):
        shards = open_shards(config.data.train, config.data.cache_dir)
        images, image_bytes = len(shards), float(shards.bytes.sum()) / len(shards)
        images, image_bytes = images * config.data.repeats, image_bytes / config.data.repeats
        if task.num_classes:
            classes = len(classes_of(shards))
    if images < config.train.global_batch_size:
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} is more than the {images} "
            "images of an epoch"
        )
    fixed = frozenset(token[2:].split("=")[0] for token in rest if token.startswith("--"))
    with torch.device("meta"):  # no weights
        model = task.module.build(config, classes)
    return PlannedRun(config, model, task.module.flops(model), images, image_bytes, fixed)


def _check_known(rest: list[str], config_class: type[RunConfig]) -> None:
    """Raise a UserError for an option that is neither this command's nor a config key."""
    own = [action.option_strings[-1] for action in _options("")._actions]
    sections = {field.name for field in fields(config_class)}
    for token in rest:
        option = token.split("=")[0]
        if option.startswith("--") and option[2:].split(".")[0] not in sections:
            hint = did_you_mean(option, own, "--help lists the known ones")
            raise UserError(f"unknown option {option}; {hint}")


def _plan(
    name: str, job: PlannedRun, cluster: Cluster, options: argparse.Namespace, rest: list[str]
) -> RunPlan:
    found = rows(job, cluster)
    chosen = choose(found)
    if chosen is None and len(options.config) * len(options.gpus or [1]) == 1:
        raise UserError(_nothing_fits(name, cluster, found))
    minutes = options.checkpoint_minutes or job.config.checkpoint.every_minutes
    steps = job.config.checkpoint.every_steps
    if minutes is None and steps and chosen and chosen.compute_s is not None:
        minutes = steps * (chosen.compute_s + chosen.network_s) / 60
    command = _command(name, job, cluster, chosen, rest, options) if chosen else ""
    return RunPlan(name, job, cluster, found, chosen, minutes, command)


def _nothing_fits(name: str, cluster: Cluster, found: list[Row]) -> str:
    least = min(found, key=lambda row: row.memory + (row.host if cluster.is_cpu else 0))
    needed = (least.memory + (least.host if cluster.is_cpu else 0)) / (1 - HEADROOM) / 1e9
    return (
        f"{name} does not fit into {cluster.memory_gb:g} GB on {cluster.gpus} x {cluster.name}: "
        f"with {least.deepspeed}, activation checkpointing {recomputed(least)} and micro-batch "
        f"{least.micro_batch} it needs {math.ceil(10 * needed) / 10:g} GB, {HEADROOM:.0%} headroom "
        "included; take more GPUs or larger ones"
    )


def _command(
    name: str,
    job: PlannedRun,
    cluster: Cluster,
    chosen: Row,
    rest: list[str],
    options: argparse.Namespace,
) -> str:
    """Compose the command that starts the run: sbatch, or torchrun on this machine."""
    task = job.config.task
    if options.this_machine:
        start = f"torchrun --standalone --nproc_per_node {cluster.gpus} -m mae_scale {task}"
    else:
        start = (
            f"sbatch --nodes={cluster.nodes} --gpus-per-node={cluster.gpus_per_node} "
            f"slurm/{task}.sbatch"
        )
    arguments = ["--config", name, *rest]
    given = given_values(arguments)
    for key, place in PLACES.items():
        if key not in given:
            arguments += [f"--{key}", place]
    values = (chosen.deepspeed, chosen.micro_batch, chosen.checkpointing, chosen.offload)
    for key, value in zip(CHOSEN, values, strict=True):
        if key not in job.fixed and (value or key in given):
            arguments += [f"--{key}", str(value).lower()]
    if options.checkpoint_minutes is not None:
        arguments += ["--checkpoint.every_minutes", f"{options.checkpoint_minutes:g}"]
    return f"{start} {shlex.join(arguments)}"


def _write(path: Path, content: Any) -> None:
    try:
        write_atomically(path, json.dumps({"plans": content}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}") from None
