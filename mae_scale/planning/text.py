"""Text that `mae-scale plan` prints, in 80 columns except for the command; answers come last."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import psutil

from mae_scale.config.sizes import size_text as pixels_text
from mae_scale.launch.console import size_text
from mae_scale.planning.choice import HEADROOM, HOST_OF_STAGE_3, Cluster, Row, RunPlan
from mae_scale.planning.choosing import reason

WIDTH = 80


def recomputed(row: Row) -> str:
    """Name the blocks that a setting recomputes."""
    text = row.checkpointing if isinstance(row.checkpointing, str) else f"every {row.checkpointing}"
    return f"{text}, offload" if row.offload else text


def _number(value: float | None, pattern: str = ",.0f") -> str:
    return "-" if value is None else format(value, pattern)


_COLUMNS = (
    f"  {'':14}{'recomputed':13}{'micro':>6}{'accum':>6}{'states':>8}{'activ':>7}{'buffers':>8}"
    f"{'all':>7}{'img/s':>9}"
)


def _table(found: list[Row], chosen: Row, unit: float) -> list[str]:
    """Make a table with a line for each setting; bytes are given in multiples of `unit`."""
    lines = [_COLUMNS]
    for row in found:
        mark = "*" if row == chosen else " " if row.fits else "x"
        bound = "<" if row.host and row.images_per_second else ""
        states = row.weights + row.gradients + row.optimizer
        lines.append(
            f"{mark} {Path(row.deepspeed).stem:14.13}{recomputed(row):13}{row.micro_batch:6}"
            f"{row.accumulation:6}{states / unit:8.1f}{row.activations / unit:7.1f}"
            f"{row.buffers / unit:8.1f}{row.memory / unit:7.1f}"
            f"{bound + _number(row.images_per_second):>9}"
        )
    return lines


def _largest(found: list[Row]) -> list[Row]:
    """Pick for each stage and checkpointing the largest micro-batch that fits, or the smallest."""
    best: dict[Any, Row] = {}
    for row in found:
        key = (row.deepspeed, row.checkpointing, row.offload)
        if key not in best or row.fits:
            best[key] = row
    return list(best.values())


def page(plan: RunPlan) -> str:
    """Return the text of the plan of one config on one cluster."""
    job, cluster, chosen = plan.job, plan.cluster, plan.chosen
    assert chosen is not None
    config = job.config
    unit = "process" if cluster.is_cpu else "GPU"
    size = 1e9 if chosen.memory > 1e9 else 1e6
    everything = list(job.model.parameters())
    trained = sum(p.numel() for p in everything if p.requires_grad) / 1e6
    lines = [
        f"{plan.name}: {config.model.name} at {pixels_text(config.model.img_size)} pixels",
        f"{sum(p.numel() for p in everything) / 1e6:.1f} M parameters, {trained:.1f} M trained; "
        f"batch {config.train.global_batch_size}, {job.total_images / 1e6:,.1f} M images in all",
        _machine(cluster),
        "",
        *_assumptions(plan),
        "",
        *_filled(
            f"Memory of each {unit} in {'GB' if size == 1e9 else 'MB'}, at the largest micro-batch "
            f"that fits into {cluster.memory_gb * (1 - HEADROOM):.1f} GB "
            f"({cluster.memory_gb:.1f} less {HEADROOM:.0%}). x: does not fit. *: chosen, see below."
        ),
        *_table(_with(chosen, _largest(plan.rows)), chosen, size),
        "",
        *_filled(
            f"The same for {chosen.deepspeed}, recomputed {recomputed(chosen)}, at every "
            "micro-batch:"
        ),
        *_table([row for row in plan.rows if _same_checkpointing(row, chosen)], chosen, size),
        "",
        *_filled(
            f"Choose {chosen.deepspeed}, blocks recomputed: {recomputed(chosen)}, micro-batch "
            f"{chosen.micro_batch}, {chosen.accumulation} of them a step. "
            f"{reason(plan.rows, chosen)}"
        ),
        *(line for text in _consequences(plan) for line in _filled(text, 13)),
        "",
        *_filled(plan.hint),
        plan.command,
    ]
    return "\n".join(lines)


def _filled(text: str, indent: int = 0) -> list[str]:
    """Break a text into lines of the page's width."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )


def _with(chosen: Row, some: list[Row]) -> list[Row]:
    """Return the rows with the chosen one in the place of its stage and checkpointing."""
    return [chosen if _same_checkpointing(row, chosen) else row for row in some]


def _same_checkpointing(row: Row, other: Row) -> bool:
    return (row.deepspeed, row.checkpointing, row.offload) == (
        other.deepspeed, other.checkpointing, other.offload,
    )  # fmt: skip


def _machine(cluster: Cluster) -> str:
    if cluster.is_cpu:
        processes = f"{cluster.gpus} process{'es' * (cluster.gpus > 1)}"
        return f"{processes} on this machine's CPU, {psutil.cpu_count()} cores"
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus_per_node}"
    return f"{cluster.gpus} x {cluster.name}, {nodes}"


def _consequences(plan: RunPlan) -> list[str]:
    """Describe what the chosen setting means, a line for each subject."""
    job, cluster, chosen = plan.job, plan.cluster, plan.chosen
    assert chosen is not None
    rate, lines = chosen.images_per_second, []
    step = chosen.step_s
    if rate is not None and plan.seconds is not None and step is not None:
        hours = plan.seconds / 3600
        lines += [
            f"time         {rate:,.0f} images/s ({rate / cluster.gpus:,.0f} a GPU), steps of "
            f"{step:.2f} s, epochs of {job.images / rate / 60:,.1f} minutes, "
            f"{hours / 24:,.1f} days, {hours * cluster.gpus:,.0f} GPU-hours",
            f"network      {size_text(chosen.sent)} sent by each GPU for a step; "
            f"{chosen.network_s / step:.1%} of the time is spent waiting for it",
        ]
        lines.append(f"host         {_host_limit(plan, chosen)}")
        if chosen.host:
            lines.append(
                f"memory       {size_text(chosen.host)} of host memory for each GPU; copies to it "
                "are not in the time"
            )
        if chosen.recompute_share:
            lines.append(f"recomputing  {chosen.recompute_share:.0%} of the computing")
        a_node = rate / cluster.gpus * cluster.gpus_per_node
        cores = rate / cluster.gpus / cluster.images_per_core
        lines.append(
            f"data         {a_node:,.0f} images/s and {size_text(a_node * job.image_bytes)}/s to "
            f"each node; {cores:.1f} cores for each GPU"
        )
    lines.append(
        f"checkpoints  {size_text(chosen.checkpoint)} each, {plan.write_seconds:.1f} s to write, "
        f"room for {job.config.checkpoint.keep + 1}: {size_text(plan.room)}"
    )
    lost = plan.lost_minutes()
    if lost is not None and plan.checkpoint_minutes is not None:
        hours_lost = [f"{minutes / 60 * cluster.gpus:,.1f}" for minutes in lost]
        lines.append(
            f"preemption   without a warning, saving every {plan.checkpoint_minutes:g} minutes: "
            f"{lost[0] / 60:.2f} hours lost, {lost[1] / 60:.2f} at the worst "
            f"({' and '.join(hours_lost)} GPU-hours)"
        )
    return lines


def _host_limit(plan: RunPlan, chosen: Row) -> str:
    """Tell the host's time for a step, and from which micro-batch on the GPU takes longer."""
    text = f"{chosen.host_s:.3f} s a step"
    alike = [row for row in plan.rows if _same_checkpointing(row, chosen)]
    fast = [row.micro_batch for row in alike if row.step_s and row.step_s > row.host_s]
    if not fast:
        return f"{text}, which is longer than the GPU takes, whatever the micro-batch"
    return f"{text}; from a micro-batch of {min(fast)} on the GPU takes longer"


def comparison(plans: list[RunPlan]) -> str:
    """Return a table for each config, with a line for each number of GPUs."""
    lines = [*_assumptions(plans[0], several=True)]
    name = None
    for plan in plans:
        row, gpus = plan.chosen, plan.cluster.gpus
        if plan.name != name:
            name = plan.name
            lines += [
                "",
                name,
                f"{'GPUs':>6}  {'stage':14}{'recomputed':14}{'micro':>5}{'accum':>6}{'GB':>6}"
                f"{'img/s':>8}{'wait':>5}{'days':>6}{'GPU-h':>8}",
            ]
        if row is None:
            lines.append(f"{gpus:6}  nothing fits into {plan.cluster.memory_gb:g} GB")
            continue
        rate, hours = row.images_per_second, plan.seconds and plan.seconds / 3600
        wait = row.step_s and row.network_s / row.step_s
        lines.append(
            f"{gpus:6}  {Path(row.deepspeed).stem:14.13}{recomputed(row):14}{row.micro_batch:5}"
            f"{row.accumulation:6}{row.memory / 1e9:6.1f}{_number(rate):>8}"
            f"{_number(wait, '.0%'):>5}{_number(hours and hours / 24, ',.1f'):>6}"
            f"{_number(hours and hours * gpus):>8}"
        )
    return "\n".join(lines)


def _assumptions(plan: RunPlan, several: bool = False) -> list[str]:
    """List the assumptions behind the numbers."""
    cluster, job = plan.cluster, plan.job
    lines = ["Assumed:"]
    if several:
        lines.append(
            f"- {cluster.name} of {cluster.memory_gb:g} GB, {HEADROOM:.0%} of it left free"
        )
    lines.append(
        "- memory by formula (docs/scaling.md has the errors); states: weights, gradients and "
        "optimiser; activ: what the forward pass keeps; buffers: gradients being sent, gathered "
        "weights, what is computed again, temporary tensors; the headroom is for the CUDA "
        "context, NCCL and the allocator"
    )
    if cluster.tflops is not None:
        lines += [
            f"- MFU {cluster.mfu:g} of {cluster.tflops:g} TFLOP/s (fp32: TF32, half of it) while a "
            "GPU computes; recomputing takes time of its own, and so does waiting for the "
            "network; a GPU is kept busy by a micro-batch of 2048 visible tokens or more",
            f"- {cluster.network_gbs:g} GB/s of bus bandwidth; zero1, zero2 and zero3 send during "
            "the backward pass, zero0 after it; copies to host memory are not in the time: "
            "where there are some, img/s is a bound",
            f"- the host takes {cluster.host_ms:g} ms for a block's forward and backward pass, "
            f"{HOST_OF_STAGE_3} times as long under zero3; a step takes no less",
            f"- {cluster.images_per_core:g} images/s a core (fine-tuning's augmentation takes "
            f"more), {job.image_bytes / 1e3:.0f} kB an image",
        ]
    lines.append(
        f"- {cluster.disk_gbs:g} GB/s to the run folder; {cluster.restart_minutes:g} minutes for a "
        "restart; a job that is warned saves first"
    )
    return [part for line in lines for part in _filled(line, 2)]
