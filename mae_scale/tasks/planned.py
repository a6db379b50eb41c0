"""Plans of configs: the job that a config describes, the cluster, and the command to start it."""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from mae_scale.config.keys import key_names
from mae_scale.config.parsing import PLACES, config_arguments, given_values, parse
from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError, renamed
from mae_scale.planning.fit import HEADROOM, Cluster, Job, Row, fit, planned_precision
from mae_scale.planning.flops import count_flops
from mae_scale.planning.gpus import named_gpu
from mae_scale.planning.text import RunPlan
from mae_scale.tasks.classification import classes_of
from mae_scale.tasks.task import Task

# Words that stand for paths that every run needs, where the arguments do not give them.
# Config keys that are chosen unless they are on the command line.
CHOSEN = ("deepspeed", "train.micro_batch_size", "train.activation_checkpointing",
          "train.activation_offload")  # fmt: skip
# Number of images and mean bytes of an image where no shards are given: ImageNet-1K's training
# split, and the images that benchmarks/data_loading.py read.
IMAGENET, IMAGE_BYTES = 1_281_167, 107_600
CPU_IMAGES = 8  # most images with which a CPU is timed: its rate hardly depends on them


def clusters_of(options: argparse.Namespace) -> list[Cluster]:
    """Return a cluster for each number of GPUs.

    Raises:
        UserError: memory of the GPU is not known, or a number of GPUs does not fill nodes.
    """
    here, per_node = torch.cuda.device_count(), options.gpus_per_node
    most = max(options.gpus or [1])
    if options.this_machine or options.measure:
        name, memory = "CPU", psutil.virtual_memory().total / 1e9
        if here:
            properties = torch.cuda.get_device_properties(0)
            name, memory = properties.name, properties.total_memory / 1e9
        if options.this_machine or not here:
            per_node = here or most
        if options.this_machine and most > per_node:
            raise UserError(f"--gpus {most}: this machine has {here}")
        memory = options.memory_gb or memory
    else:
        name, memory = named_gpu(options.gpu or "A100-80GB", options.memory_gb)
    numbers = options.gpus or [here if options.this_machine and here else 1]
    for number in numbers:
        if number > per_node and number % per_node:
            near = number // per_node * per_node
            raise UserError(
                f"--gpus {number} are no full nodes of {per_node}; {near} or {near + per_node} "
                "would be, or another --gpus_per_node"
            )
    return [
        Cluster(
            gpus=number,
            gpus_per_node=min(number, per_node),
            name=name,
            memory_gb=memory / number if name == "CPU" else memory,
            network_gbs=options.network_gbs if number > 1 else None,
        )
        for number in numbers
    ]


def job_of(name: str, rest: list[str], task: Task, prog: str) -> Job:
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
        if task.name == "detect":
            classes = len(shards.categories)
        elif task.num_classes:
            classes = len(classes_of(shards))
    if images < config.train.global_batch_size:
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} is more than the {images} "
            "images of an epoch"
        )
    fixed = frozenset(token[2:].split("=")[0] for token in rest if token.startswith("--"))
    with torch.device("meta"), renamed(key_names(config)):  # no weights
        model = task.module.build(config, classes)
    loss = task.module.trial_loss
    return Job(config, model, loss, count_flops(model, loss), images, image_bytes, fixed)


def plan_of(
    name: str, job: Job, cluster: Cluster, options: argparse.Namespace, rest: list[str]
) -> RunPlan:
    """Choose a setting for a run on a cluster.

    Args:
        name: name of the config.
        job: the run.
        cluster: the cluster.
        options: arguments of `mae-scale plan`.
        rest: config keys among its arguments.

    Raises:
        UserError: a setting is not possible, or nothing fits and only this is planned.
    """
    found, chosen = fit(job, cluster, options.why)
    if chosen is None:
        if len(options.config) * len(options.gpus or [1]) == 1:
            raise UserError(_nothing_fits(name, cluster, found))
        return RunPlan(name, job, cluster, found, None, "", "")
    if options.images_per_second or options.measure:
        timed = _timed(job, cluster, chosen, options.images_per_second)
        found = [timed if row == chosen else row for row in found]
        chosen = timed
    here = options.this_machine or (options.measure and options.gpus is None)
    command, places = _command(name, job, cluster, chosen, rest, here)
    paths = f", with paths of yours for {', '.join(places)}" if places else ""
    site = "" if here else " (first `source slurm/site.sh`, which holds account and partition)"
    return RunPlan(name, job, cluster, found, chosen, f"Start it so{paths}{site}:", command)


def _timed(job: Job, cluster: Cluster, row: Row, rate: float | None) -> Row:
    """Return a row with a time that was measured: `rate` of the user, or ten steps from here."""
    if rate:
        basis = "from --images_per_second"
    else:
        from mae_scale.tasks.trial import STEPS, time_steps

        images = row.micro_batch
        if cluster.is_cpu and "train.micro_batch_size" not in job.fixed:
            images = min(images, CPU_IMAGES)
        job.model.to(torch.float32).set_activation_checkpointing(row.checkpointing, row.offload)
        precision = planned_precision(job.config, cluster)
        what: dict[str, Any] = {"stage": row.deepspeed, "precision": precision, "images": images}
        seconds, gigabytes = time_steps(job.config, job.model, job.trial_loss, **what)
        rate = images / seconds
        basis = (
            f"measured here: {STEPS} steps of {images} images in one process, {seconds:.3g} s each "
            f"at a peak of {gigabytes:.2f} GB"
        )
    if cluster.gpus > 1 and cluster.is_cpu:
        basis += "; several processes share this CPU: the sum was not measured"
    elif cluster.gpus > 1:
        basis += "; what a network costs was not measured"
    batch = job.config.train.global_batch_size
    together = rate if cluster.is_cpu else rate * cluster.gpus
    return replace(row.timed(cluster, batch / together, batch, basis), host_s=None)


def _nothing_fits(name: str, cluster: Cluster, found: list[Row]) -> str:
    least = min(found, key=lambda row: row.needed(cluster))
    needed = least.needed(cluster) / (1 - HEADROOM) / 1e9
    return (
        f"{name} does not fit into {cluster.memory_gb:g} GB on {cluster.gpus} x {cluster.name}: "
        f"with {least.deepspeed}, activation checkpointing {least.checkpointing} and micro-batch "
        f"{least.micro_batch} it needs {math.ceil(10 * needed) / 10:g} GB, {HEADROOM:.0%} headroom "
        "included; take more GPUs or larger ones"
    )


def _command(
    name: str, job: Job, cluster: Cluster, chosen: Row, rest: list[str], here: bool
) -> tuple[str, list[str]]:
    """Compose the command that starts the run: sbatch, or torchrun on this machine.

    Returns:
        The command, and the words in it that stand for paths that are not given.
    """
    task, given = job.config.task, given_values(["--config", name, *rest])
    start = f"torchrun --standalone --nproc_per_node {cluster.gpus} -m mae_scale {task}"
    if not here:
        node = f"--nodes={cluster.nodes} --gpus-per-node={cluster.gpus_per_node}"
        start = f"sbatch {node} slurm/{task}.sbatch"
    places = PLACES | ({} if task == "pretrain" else {"data.val": "VAL_SHARDS"})
    missing = {key: place for key, place in places.items() if key not in given}
    weights = job.config.weights
    if weights is not None and not Path(weights).exists() and "--weights" not in " ".join(rest):
        missing["weights"] = "WEIGHTS"
    added: dict[str, Any] = dict(missing)
    values = (chosen.deepspeed, chosen.micro_batch, chosen.checkpointing, chosen.offload)
    for key, value in zip(CHOSEN, values, strict=True):
        if key not in job.fixed and (value or key in given):
            added[key] = str(value).lower()
    if chosen.precision == "fp32" and job.config.train.precision == "auto" and not cluster.is_cpu:
        added["train.precision"] = "fp32"
    words = [word for key, value in added.items() for word in (f"--{key}", value)]
    return f"{start} {shlex.join(['--config', name, *rest, *words])}", list(missing.values())
