"""Text that `mae-scale plan` prints: the answer first, then, where asked for, the reasons."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae_scale.config.sizes import size_text as pixels_text
from mae_scale.launch.console import size_text
from mae_scale.planning.fit import BUSY_TOKENS, HEADROOM, Cluster, Job, Row

IMAGES_PER_CORE = 674  # decoded and cropped in a second: benchmarks/results/data_loading.txt


@dataclass(frozen=True)
class RunPlan:
    """Plan of a config on a cluster."""

    name: str  # name of the config
    job: Job
    cluster: Cluster
    rows: list[Row]  # all settings that were considered
    chosen: Row | None  # None: nothing fits
    hint: str  # advice to read before the run is started
    command: str  # command that starts the run

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
    cluster, row, job = plan.cluster, plan.chosen, plan.job
    assert row is not None
    unit = "process" if cluster.is_cpu else "GPU"
    nodes = f", {cluster.nodes} nodes of {cluster.gpus_per_node}" * (cluster.nodes > 1)
    blocks = "no block recomputed" if row.checkpointing == "none" else f"recomputed: {_way(row)}"
    host = f", and {size_text(row.host)} of host memory" * (row.host > 0)
    about = [("memory", f"{size_text(row.memory)} of {cluster.memory_gb:.4g} GB a {unit}{host}")]
    rate, step = row.images_per_second, row.step_s
    if rate and step and plan.seconds:
        hours = plan.seconds / 3600
        bound = "at most " * (cluster.gpus > 1 and not cluster.network_gbs)
        times = (
            f"{bound}{rate:,.0f} images/s, steps of {step:.3g} s, epochs of "
            f"{job.images / rate / 60:,.1f} minutes, {hours / 24:,.1f} days, "
        )
        about.append(("time", f"{times}{hours * cluster.gpus:,.0f} {unit}-hours: {row.basis}"))
        if row.host_s and row.host_s >= step - row.network_s:
            about.append(("host", "it is the limit: a GPU would be faster"))
        node = rate / cluster.gpus * cluster.gpus_per_node
        cores = f"{rate / cluster.gpus / IMAGES_PER_CORE:.1f} cores a {unit}"
        data = f"{node:,.0f} images/s and {size_text(node * job.image_bytes)}/s a node; {cores}"
        about.append(("data", data))
    else:
        about.append(("time", row.basis))
    if row.traffic.sent:
        waits = f"; waiting takes {row.network_s / step:.1%} of the time" if step else ""
        sent = f"{size_text(row.traffic.sent)} sent by each {unit} for a step"
        about.append(("network", sent + waits * bool(cluster.network_gbs)))
    number = job.config.checkpoint.keep + 1
    total = size_text(number * row.checkpoint)
    about.append(("checkpoints", f"{size_text(row.checkpoint)}, room for {number}: {total}"))
    setting = f"{row.deepspeed}, {row.precision}, {blocks}, micro-batch {row.micro_batch}"
    lines = [
        *_filled(
            f"{plan.name} on {cluster.gpus} x {cluster.name}{nodes}: {setting}, "
            f"{row.accumulation} of them a step"
        ),
        *(line for name, text in about for line in _filled(f"{name:13}{text}", 13)),
        *_filled(plan.hint),
        plan.command,
    ]
    return "\n".join(lines + (_reasons(plan, row) if why else ["(--why shows the alternatives)"]))


def _way(row: Row) -> str:
    text = row.checkpointing if isinstance(row.checkpointing, str) else f"every {row.checkpointing}"
    return f"{text}, offload" if row.offload else text


def _reasons(plan: RunPlan, chosen: Row) -> list[str]:
    """Show what was compared, and by what rule the setting was chosen."""
    job = plan.job
    parameters = list(job.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6

    def key(row: Row) -> tuple[Any, ...]:
        return row.deepspeed, row.checkpointing, row.offload

    # For each stage and checkpointing the largest micro-batch that fits, or the smallest.
    best: dict[Any, Row] = {}
    for row in plan.rows:
        if key(row) not in best or row.fits:
            best[key(row)] = row
    best[key(chosen)] = chosen
    alike = [row for row in plan.rows if key(row) == key(chosen)]
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
            "before zero2, the largest micro-batch. zero0 is shown to compare with. "
            f"{HEADROOM:.0%} of the memory stays free. *: chosen. x: does not fit. First the "
            "largest micro-batch that fits, then all of the chosen setting:"
        ),
        *_table(list(best.values()), chosen),
        *_table(alike, chosen),
    ]


def _table(rows: list[Row], chosen: Row) -> list[str]:
    unit, name = (1e9, "GB") if chosen.memory > 1e9 else (1e6, "MB")
    heads = ("", "recomputed", "micro", "accum", "states", "activ", "buffers", name, "img/s")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        sizes = (row.states, row.activations, row.buffers, row.memory)
        lines.append((
            f"{'*' if row == chosen else ' ' if row.fits else 'x'} {Path(row.deepspeed).stem:.13}",
            *(_way(row), str(row.micro_batch), str(row.accumulation)),
            *(f"{size / unit:.1f}" for size in sizes),
            f"{row.images_per_second:,.0f}" if row.images_per_second else "-",
        ))  # fmt: skip
    return _aligned(lines, 2)


def comparison(plans: list[RunPlan]) -> str:
    """Return a table for each config, with a line for each number of GPUs."""
    first, lines = plans[0].cluster, []
    for name in dict.fromkeys(plan.name for plan in plans):
        heads = ("stage", "recomputed", "micro", "accum", "GB", "img/s", "days", "GPU-h")
        table: list[tuple[str, ...]] = [("  GPUs", *heads)]
        for plan in plans:
            row, gpus = plan.chosen, f"{plan.cluster.gpus:6}  "
            if plan.name != name:
                continue
            if row is None:
                table.append((gpus, "-", f"nothing fits into {plan.cluster.memory_gb:g} GB"))
                continue
            hours = (plan.seconds or 0) / 3600
            times = ("-", "-", "-")
            if row.images_per_second:
                gpu_hours = hours * plan.cluster.gpus
                times = (f"{row.images_per_second:,.0f}", f"{hours / 24:,.1f}", f"{gpu_hours:,.0f}")
            table.append((
                *(gpus, Path(row.deepspeed).stem[:13], _way(row), str(row.micro_batch)),
                *(str(row.accumulation), f"{row.memory / 1e9:.1f}"),
                *times,
            ))  # fmt: skip
        lines += ["", name, *_aligned(table, 3)]
    notes = dict.fromkeys(plan.chosen.basis for plan in plans if plan.chosen)
    head = f"{first.name} of {first.memory_gb:g} GB, {HEADROOM:.0%} of it left free"
    return "\n".join([head, *lines, "", *(x for text in notes for x in _filled(f"- {text}", 2))])


def _aligned(table: list[tuple[str, ...]], left: int) -> list[str]:
    """Align the first `left` columns on the left, and the others on the right."""
    return [
        "".join(f"{x:17}" if n < left else f"{x:>8}" for n, x in enumerate(row)).rstrip()
        for row in table
    ]


def _filled(text: str, indent: int = 0) -> list[str]:
    """Break a text into lines of the page's width."""
    return textwrap.wrap(
        text, 80, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )
