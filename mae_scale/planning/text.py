"""Text that `mae-scale plan` prints: the answer first, then, where asked for, the reasons."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae_scale.config.sizes import size_text as pixels_text
from mae_scale.launch.console import size_text
from mae_scale.planning.fit import BUSY_TOKENS, HEADROOM, Cluster, Job, Row

WIDTH = 80
IMAGES_PER_CORE = 674  # decoded and cropped in a second: benchmarks/results/data_loading.txt


@dataclass(frozen=True)
class RunPlan:
    """Plan of a config on a cluster."""

    name: str
    """Name of the config."""
    job: Job
    """The run that is planned."""
    cluster: Cluster
    """The cluster that it is planned for."""
    rows: list[Row]
    """All settings that were considered."""
    chosen: Row | None
    """The setting that was chosen; None if none fits."""
    hint: str
    """Advice to read before the run is started."""
    command: str
    """The command that starts the run."""

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole run without validation and restarts; None if unknown."""
        rate = self.chosen and self.chosen.images_per_second
        return self.job.total_images / rate if rate else None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return {
            "config": self.name,
            "cluster": asdict(self.cluster),
            "flops_per_image": self.job.flops.training,
            "images": self.job.total_images,
            "rows": [row.as_dict() for row in self.rows],
            "chosen": self.chosen and self.chosen.as_dict(),
            "seconds": self.seconds,
            "gpu_hours": self.seconds and self.seconds / 3600 * self.cluster.gpus,
            "command": self.command,
        }


def page(plan: RunPlan, why: bool) -> str:
    """Return the text of the plan of one config on one cluster, with reasons if `why`."""
    cluster, chosen = plan.cluster, plan.chosen
    assert chosen is not None
    unit = "process" if cluster.is_cpu else "GPU"
    nodes = f", {cluster.nodes} nodes of {cluster.gpus_per_node}" * (cluster.nodes > 1)
    lines = [
        *_filled(f"{plan.name} on {cluster.gpus} x {cluster.name}{nodes}: {_setting(chosen)}"),
        *_filled(
            f"memory       {size_text(chosen.memory)} of {cluster.memory_gb:.4g} GB on each {unit}"
            + (f", and {size_text(chosen.host)} of host memory" if chosen.host else ""),
            13,
        ),
        *(line for text in _consequences(plan) for line in _filled(text, 13)),
        *_filled(plan.hint),
        plan.command,
    ]
    return "\n".join(lines + (_reasons(plan) if why else ["(--why shows what was compared)"]))


def _setting(row: Row) -> str:
    blocks = "no block recomputed" if row.checkpointing == "none" else f"recomputed: {_way(row)}"
    times = f"{row.accumulation} of them a step" if row.accumulation > 1 else "one a step"
    return f"{row.deepspeed}, {row.precision}, {blocks}, micro-batch {row.micro_batch}, {times}"


def _way(row: Row) -> str:
    text = row.checkpointing if isinstance(row.checkpointing, str) else f"every {row.checkpointing}"
    return f"{text}, offload" if row.offload else text


def _consequences(plan: RunPlan) -> list[str]:
    """Describe what the chosen setting means, a line for each subject."""
    job, cluster, chosen = plan.job, plan.cluster, plan.chosen
    assert chosen is not None
    rate, step, lines = chosen.images_per_second, chosen.step_s, []
    if rate and step and plan.seconds:
        hours = plan.seconds / 3600
        bound = "at most " * (cluster.gpus > 1 and not cluster.network_gbs)
        lines = [
            f"time         {bound}{rate:,.0f} images/s, steps of {step:.3g} s, epochs of "
            f"{job.images / rate / 60:,.1f} minutes, {hours / 24:,.1f} days, "
            f"{hours * cluster.gpus:,.0f} {'process' if cluster.is_cpu else 'GPU'}-hours: "
            f"{chosen.basis}"
        ]
        if chosen.host_s and chosen.host_s >= step - chosen.network_s:
            lines.append("host         it is the limit: a GPU would be faster")
        a_node = rate / cluster.gpus * cluster.gpus_per_node
        lines.append(
            f"data         {a_node:,.0f} images/s and {size_text(a_node * job.image_bytes)}/s to "
            f"each node; {rate / cluster.gpus / IMAGES_PER_CORE:.1f} cores for each GPU"
        )
    else:
        lines = [f"time         {chosen.basis}"]
    if chosen.traffic.sent:
        waits = f"; {chosen.network_s / step:.1%} of the time waits for it" if step else ""
        waits = waits if cluster.network_gbs else ""
        lines.append(
            f"network      {size_text(chosen.traffic.sent)} sent by each GPU for a step{waits}"
        )
    number = job.config.checkpoint.keep + 1
    lines.append(
        f"checkpoints  {size_text(chosen.checkpoint)} each, room for {number}: "
        f"{size_text(number * chosen.checkpoint)}"
    )
    return lines


def _reasons(plan: RunPlan) -> list[str]:
    """Show what was compared, and by what rule the setting was chosen."""
    job, chosen = plan.job, plan.chosen
    assert chosen is not None
    size, name = (1e9, "GB") if chosen.memory > 1e9 else (1e6, "MB")
    parameters = list(job.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    return [
        "",
        *_filled(
            f"{job.config.model.name} at {pixels_text(job.config.model.img_size)} pixels: "
            f"{sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, {trained:.1f} M "
            f"trained; {job.flops.training / 1e9:,.1f} GFLOP an image; batch "
            f"{job.config.train.global_batch_size}, {job.total_images / 1e6:,.1f} M images in all"
        ),
        *_filled(
            "Rule: what needs no host memory and keeps a GPU busy "
            f"({BUSY_TOKENS} tokens, or all images of a GPU); zero1 and zero2 before zero3, whose "
            "host time grows with ranks and parameters; then the fewest recomputed blocks, zero1 "
            "before zero2, the largest micro-batch. zero0 is shown to compare with."
        ),
        *_filled(
            f"Memory in {name}, of which {HEADROOM:.0%} stays free for the CUDA context, NCCL and "
            "the allocator. states: weights, gradients, optimiser; activ: activations at the worst "
            "moment; buffers: what is being sent or gathered. x: does not fit. *: chosen. "
            "First the largest micro-batch that fits, then all of the chosen setting:"
        ),
        *_table(_largest(plan.rows, chosen), chosen, size),
        *_table([row for row in plan.rows if _key(row) == _key(chosen)], chosen, size),
    ]


def _key(row: Row) -> tuple[Any, ...]:
    return row.deepspeed, row.checkpointing, row.offload


def _largest(found: list[Row], chosen: Row) -> list[Row]:
    """Pick for each stage and checkpointing the largest micro-batch that fits, or the smallest."""
    best: dict[Any, Row] = {}
    for row in found:
        if _key(row) not in best or row.fits:
            best[_key(row)] = row
    return list({**best, _key(chosen): chosen}.values())


def _table(found: list[Row], chosen: Row, unit: float) -> list[str]:
    """Make a table with a line for each setting; bytes are given in multiples of `unit`."""
    lines = [
        f"  {'':14}{'recomputed':14}{'micro':>6}{'accum':>6}{'states':>8}{'activ':>8}{'buffers':>8}"
        f"{'all':>8}{'img/s':>8}"
    ]
    for row in found:
        mark = "*" if row == chosen else " " if row.fits else "x"
        rate = f"{row.images_per_second:,.0f}" if row.images_per_second else "-"
        lines.append(
            f"{mark} {Path(row.deepspeed).stem:14.13}{_way(row):14}{row.micro_batch:6}"
            f"{row.accumulation:6}{row.states / unit:8.1f}{row.activations / unit:8.1f}"
            f"{row.buffers / unit:8.1f}{row.memory / unit:8.1f}{rate:>8}"
        )
    return lines


def comparison(plans: list[RunPlan]) -> str:
    """Return a table for each config, with a line for each number of GPUs."""
    first = plans[0].cluster
    lines = [f"{first.name} of {first.memory_gb:g} GB, {HEADROOM:.0%} of it left free"]
    name, notes = None, []
    for plan in plans:
        row, gpus = plan.chosen, plan.cluster.gpus
        if plan.name != name:
            name = plan.name
            lines += [
                "",
                name,
                f"{'GPUs':>6}  {'stage':14}{'recomputed':14}{'micro':>6}{'accum':>6}{'GB':>6}"
                f"{'img/s':>9}{'days':>7}{'GPU-h':>9}",
            ]
        if row is None:
            lines.append(f"{gpus:6}  nothing fits into {plan.cluster.memory_gb:g} GB")
            continue
        times = "-".rjust(9) + "-".rjust(7) + "-".rjust(9)
        if plan.seconds and row.images_per_second:
            hours = plan.seconds / 3600
            times = f"{row.images_per_second:9,.0f}{hours / 24:7,.1f}{hours * gpus:9,.0f}"
        lines.append(
            f"{gpus:6}  {Path(row.deepspeed).stem:14.13}{_way(row):14}{row.micro_batch:6}"
            f"{row.accumulation:6}{row.memory / 1e9:6.1f}{times}"
        )
        notes.append(row.basis)
    if notes:
        lines += ["", *(line for text in dict.fromkeys(notes) for line in _filled(f"- {text}", 2))]
    return "\n".join(lines)


def _filled(text: str, indent: int = 0) -> list[str]:
    """Break a text into lines of the page's width."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )
