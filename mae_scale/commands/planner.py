"""Planning: choosing the settings of a config on a cluster, and the command that starts the run."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import Any

import psutil
import torch

from mae_scale.commands.plan import PLACES, config_arguments, gpu_name
from mae_scale.config.keys import key_names
from mae_scale.config.parsing import given_values, parse
from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError, renamed
from mae_scale.files import write_atomically
from mae_scale.planning.choice import HEADROOM, Cluster, PlannedRun, Row, RunPlan, rows
from mae_scale.planning.choosing import choose
from mae_scale.planning.gpus import GPU_MEMORY_GB, peak_flops
from mae_scale.planning.text import comparison, page, recomputed
from mae_scale.tasks.classification import classes_of
from mae_scale.tasks.task import Task

# Config keys that are chosen unless they are on the command line.
CHOSEN = ("deepspeed", "train.micro_batch_size", "train.activation_checkpointing",
          "train.activation_offload")  # fmt: skip
# Number of images and mean bytes of an image where no shards are given: ImageNet-1K's training
# split, and the images that benchmarks/data_loading.py read.
IMAGENET, IMAGE_BYTES = 1_281_167, 107_600


def plan(options: argparse.Namespace, rest: list[str], tasks: dict[str, Task], prog: str) -> None:
    """Plan each config on each cluster, print the text, and write the JSON.

    Args:
        options: arguments of `mae-scale plan`.
        rest: config keys among its arguments.
        tasks: task of each config, by the config's name.
        prog: name of the command, for messages.

    Raises:
        UserError: a cluster or a config cannot be planned.
    """
    clusters = _clusters(options)
    plans = []
    for name in options.config:
        job = _job(name, rest, tasks[name], prog)
        plans += [_plan(name, job, cluster, options, rest) for cluster in clusters]
    text = page(plans[0]) if len(plans) == 1 else comparison(plans)
    if options.json is not None:
        _write(options.json, [each.as_dict() for each in plans])
    print(text)


def _clusters(options: argparse.Namespace) -> list[Cluster]:
    """Return a cluster for each number of GPUs.

    Raises:
        UserError: memory or peak of the GPU is not known, or a number of GPUs does not fill nodes.
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
        name = gpu_name(options)
        numbers, per_node = options.gpus, options.gpus_per_node
        known_memory = GPU_MEMORY_GB.get(name)
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
            host_ms=options.host_ms,
        )
        for number in numbers
    ]


def _job(name: str, rest: list[str], task: Task, prog: str) -> PlannedRun:
    """Read the run that a config and further `--section.key value` arguments describe.

    Raises:
        UserError: the config cannot be used, or an epoch has fewer images than a batch.
    """
    config = parse(task.config, config_arguments(name, rest), prog)
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
    with torch.device("meta"), renamed(key_names(config)):  # no weights
        model = task.module.build(config, classes)
    return PlannedRun(config, model, task.module.flops(model), images, image_bytes, fixed)


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
    command, hint = "", ""
    if chosen:
        command, places = _command(name, job, cluster, chosen, rest, options)
        hint = _hint(places, options.this_machine)
    return RunPlan(name, job, cluster, found, chosen, minutes, command, hint)


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
) -> tuple[str, list[str]]:
    """Compose the command that starts the run: sbatch, or torchrun on this machine.

    Returns:
        The command, and the words in it that stand for paths that are not given.
    """
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
    places = dict(PLACES)
    if job.config.task in ("finetune", "linprobe"):
        places["data.val"] = "VAL_SHARDS"
    weights = job.config.weights
    if weights is not None and not Path(weights).exists() and "--weights" not in " ".join(rest):
        places["weights"] = "WEIGHTS"
    missing = {key: p for key, p in places.items() if key not in given or key == "weights"}
    for key, place in missing.items():
        arguments += [f"--{key}", place]
    values = (chosen.deepspeed, chosen.micro_batch, chosen.checkpointing, chosen.offload)
    for key, value in zip(CHOSEN, values, strict=True):
        if key not in job.fixed and (value or key in given):
            arguments += [f"--{key}", str(value).lower()]
    if options.checkpoint_minutes is not None:
        arguments += ["--checkpoint.every_minutes", f"{options.checkpoint_minutes:g}"]
    return f"{start} {shlex.join(arguments)}", list(missing.values())


def _hint(places: list[str], here: bool) -> str:
    """Say what to do before the command is copied."""
    words = ["Start it so"]
    if places:
        words.append(f", with paths of yours for {', '.join(places)}")
    if not here:
        words.append(" (first `source slurm/site.sh`, which holds account and partition)")
    return "".join([*words, ":"])


def _write(path: Path, content: Any) -> None:
    try:
        write_atomically(path, json.dumps({"plans": content}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}") from None
