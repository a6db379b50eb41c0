"""Compute what a run needs of a cluster and what it gets from it: memory, time, data, saves.

Nothing is started and no weights are made. Memory follows from `planning.memory` and
`planning.model_states`; time follows from the model's operations, the GPU's peak and a stated share
of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mae_scale.config.batch import accumulation_steps, resolve_precision, total_steps
from mae_scale.config.deepspeed import check_stage, fit_to_model, load_deepspeed_config
from mae_scale.config.sections import RunConfig
from mae_scale.errors import UserError
from mae_scale.models.encoder import Encoder
from mae_scale.planning.flops import recomputed_flops
from mae_scale.planning.memory import (
    activation_parts,
    host_bytes,
    kept_bytes,
    peak_bytes,
    sizes,
)
from mae_scale.planning.model_states import model_states, traffic, trained_by

HEADROOM = 0.1  # of the memory: the CUDA context, NCCL, what the allocator cannot use
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
CHECKPOINTING: tuple[tuple[str | int, bool], ...] = (
    ("none", False), (4, False), (2, False), ("full", False), ("full", True),
)  # fmt: skip
BUSY_TOKENS = 2048  # rows of the encoder's matrices from which on a GPU can reach its MFU
HOST_OF_STAGE_3 = 2  # times as long as under other stages the host takes for a block
BACKWARD = 2 / 3  # of the time of a step, in which gradients can be sent


@dataclass(frozen=True)
class Cluster:
    """GPUs and what is assumed of them."""

    gpus: int
    gpus_per_node: int
    name: str
    """Name of the GPU, or CPU."""
    memory_gb: float
    """Memory of a GPU, or of a process on a CPU, in 1e9 bytes."""
    tflops: float | None
    """Dense bf16 peak of a GPU."""
    mfu: float
    """Share of the peak that goes into the model's operations while a GPU computes."""
    network_gbs: float
    """GB/s in which collectives pass a node's links, all of them together."""
    disk_gbs: float
    """GB/s that all ranks together write to the run folder."""
    images_per_core: float
    """Images that a core decodes and crops in a second."""
    restart_minutes: float
    """From the end of a job to its next step."""
    host_ms: float
    """Milliseconds that the host takes to hand over a block, forward and backward."""

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(1, self.gpus // self.gpus_per_node)

    @property
    def is_cpu(self) -> bool:
        """Whether there is no GPU."""
        return self.name == "CPU"


@dataclass(frozen=True)
class PlannedRun:
    """A run to be planned."""

    config: RunConfig
    model: Encoder
    """On the meta device, frozen as the task does it."""
    flops: int
    """Operations of an image, forward and backward."""
    images: int
    """Images of an epoch."""
    image_bytes: float
    """Bytes of an image on disk."""
    fixed: frozenset[str]
    """Config keys that are not to be chosen."""

    @property
    def total_images(self) -> int:
        """Images that the whole run trains on."""
        batch = self.config.train.global_batch_size
        return total_steps(self.config.train, self.images // batch) * batch


@dataclass(frozen=True)
class Row:
    """A setting and what follows from it; bytes are those of a rank."""

    deepspeed: str
    checkpointing: str | int
    offload: bool
    micro_batch: int
    accumulation: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Bytes that the forward pass keeps for the backward pass."""
    buffers: float
    """All else at the worst moment: for sending, temporary tensors, what is computed again."""
    host: float
    fits: bool
    sent: float
    """Bytes that a rank sends for a step."""
    network_s: float
    """Seconds of a step that are spent waiting for the network."""
    compute_s: float | None
    """Seconds of computing in a step; None where the peak is not known, as on a CPU."""
    host_s: float
    """Seconds in which the host hands a step over to the device; a step takes no less."""
    recompute_share: float
    """Share of the computing that activation checkpointing adds."""
    images_per_second: float | None
    """Images per second of all ranks together."""
    checkpoint: float
    """Bytes of a checkpoint, of all ranks."""
    busy: bool
    """Whether the micro-batch is large enough for the stated MFU, and for the host to keep up."""

    @property
    def step_s(self) -> float | None:
        """Seconds of a step: of computing and of waiting, or what the host takes."""
        return self.compute_s and max(self.compute_s + self.network_s, self.host_s)

    @property
    def memory(self) -> float:
        """Bytes of a rank on its device at the worst moment."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "memory": self.memory}


def rows(job: PlannedRun, cluster: Cluster) -> list[Row]:
    """Compute a row for each setting that is worth a look; settings that are fixed stay so.

    Raises:
        UserError: the batch does not divide among the GPUs, or a fixed setting cannot be.
    """
    train, fixed = job.config.train, job.fixed
    stages: tuple[str, ...] = STAGES
    if job.config.optim.max_zero_stage == 0:
        stages = ("zero0",)
    if "deepspeed" in fixed:
        stages = (job.config.deepspeed,)
    options = CHECKPOINTING
    if not any(p.requires_grad for p in job.model.blocks.parameters()):
        options = (("none", False),)  # frozen blocks keep nothing
    if fixed & {"train.activation_checkpointing", "train.activation_offload"}:
        options = ((train.activation_checkpointing, train.activation_offload),)
    sections = {name: load_deepspeed_config(name).get("zero_optimization", {}) for name in stages}
    for section in sections.values():
        check_stage(job.config.optim, section.get("stage", 0))
    found = []
    for every, offload in options:
        job.model.set_activation_checkpointing(every, offload)  # type: ignore[arg-type]
        for name in stages:
            found += [
                _row(job, cluster, name, sections[name], every, offload, micro)
                for micro in micro_batches(job, cluster.gpus)
            ]
    return sorted(found, key=lambda row: stages.index(row.deepspeed))


def micro_batches(job: PlannedRun, gpus: int) -> list[int]:
    """List the powers of two that divide a GPU's share of the global batch.

    Raises:
        UserError: there is no such share.
    """
    train = job.config.train
    batch, most = train.global_batch_size, train.micro_batch_size
    keeps = job.config.has_batch_statistics and batch % (gpus * most) == 0
    if "train.micro_batch_size" in job.fixed or keeps:
        accumulation_steps(train, gpus)
        return [most]
    if batch < 1 or batch % gpus:
        fitting = [n for n in range(1, batch + 1) if batch % n == 0]
        near = sorted(sorted(fitting, key=lambda n: abs(n - gpus))[:2])
        raise UserError(
            f"train.global_batch_size {batch} does not divide among {gpus} GPUs; nearest numbers "
            f"of GPUs that would: {', '.join(map(str, near))}"
        )
    share = batch // gpus
    found = [2**n for n in range(share.bit_length()) if share % 2**n == 0]
    if job.config.mixes_pairs:
        found = [micro for micro in found if micro % 2 == 0]
    if not found:
        raise UserError(
            f"train.global_batch_size {batch} gives each of {gpus} GPUs {share} images, an odd "
            "number, and mixup and cutmix mix pairs; use fewer GPUs, or --augment.mixup 0 "
            "--augment.cutmix 0"
        )
    return found


def _row(
    job: PlannedRun,
    cluster: Cluster,
    name: str,
    zero: dict[str, Any],
    every: str | int,
    offload: bool,
    micro: int,
) -> Row:
    train, gpus = job.config.train, cluster.gpus
    kind = "cpu" if cluster.is_cpu else "cuda"
    precision = resolve_precision(train.precision, torch.device(kind))
    weights = "fp32" if train.autocast else precision
    run = trained_by(job.config.optim, job.model, weights, train.grad_reduce)
    accumulation = train.global_batch_size // (micro * gpus)
    if not cluster.is_cpu:
        zero = fit_to_model(name, zero, run.trained)
    states = model_states(run, zero, gpus, accumulates=accumulation > 1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    parts = activation_parts(job.model, sizes(dtype, kind))
    kept = micro * kept_bytes(parts)
    host = states.host + micro * host_bytes(parts)
    memory = states.peak(peak_bytes(parts, micro))
    limit = cluster.memory_gb * 1e9 * (1 - HEADROOM)
    sent = traffic(run, zero, gpus, accumulation)
    again = recomputed_flops(job.model) / job.flops
    compute = None
    exposed = (sent.gradients + sent.weights) / (cluster.network_gbs * 1e9)
    if cluster.tflops is not None:
        # fp32 on a GPU is TF32, whose peak is half of bf16's.
        peak_flops = cluster.tflops * 1e12 * (1 if precision == "bf16" else 0.5)
        flops = job.flops * (1 + again) * train.global_batch_size / gpus
        compute = flops / (peak_flops * cluster.mfu)
        hidden = sent.overlapped / (cluster.network_gbs * 1e9)
        exposed -= min(hidden, BACKWARD * compute * sent.window)
    handing_over = accumulation * _passes(job.model) / 3 * cluster.host_ms / 1e3
    if zero.get("stage") == 3:
        handing_over *= HOST_OF_STAGE_3
    largest = train.global_batch_size // gpus
    enough = micro >= min(largest, -(-BUSY_TOKENS // job.model.encoder_tokens))
    keeps_up = compute is None or compute + exposed >= handing_over or micro == largest
    return Row(
        deepspeed=name,
        checkpointing=every,
        offload=offload,
        micro_batch=micro,
        accumulation=accumulation,
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=kept,
        buffers=memory - states.weights - states.gradients - states.optimizer - kept,
        host=host,
        fits=memory + (host if cluster.is_cpu else 0) <= limit,
        sent=sent.gradients + sent.weights,
        network_s=exposed,
        compute_s=compute,
        host_s=handing_over,
        recompute_share=again / (1 + again),
        images_per_second=compute
        and train.global_batch_size / max(compute + exposed, handing_over),
        checkpoint=run.checkpoint_bytes(zero.get("stage", 0)),
        busy=enough and keeps_up,
    )


def _passes(model: Encoder) -> int:
    """Count the passes through a block in a micro-batch, a backward one for two."""
    blocks = [*model.blocks, *getattr(model, "decoder_blocks", ())]
    return sum(3 if any(p.requires_grad for p in block.parameters()) else 1 for block in blocks)


@dataclass(frozen=True)
class RunPlan:
    """A config on a cluster."""

    name: str
    job: PlannedRun
    cluster: Cluster
    rows: list[Row]
    chosen: Row | None
    checkpoint_minutes: float | None
    """Between two checkpoints; None where it is in steps and their time is not known."""
    command: str
    """The command that starts the run."""
    hint: str
    """Advice to read before it is started."""

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole run, without validation and restarts."""
        rate = self.chosen and self.chosen.images_per_second
        return self.job.total_images / rate if rate else None

    @property
    def room(self) -> float:
        """Bytes that the checkpoints take while one is being written."""
        assert self.chosen is not None
        return (self.job.config.checkpoint.keep + 1) * self.chosen.checkpoint

    @property
    def write_seconds(self) -> float:
        """Seconds that writing a checkpoint takes."""
        assert self.chosen is not None
        return self.chosen.checkpoint / (self.cluster.disk_gbs * 1e9)

    def lost_minutes(self) -> tuple[float, float] | None:
        """Minutes that a job loses when it is killed without a warning: on average, at the worst.

        The restart is included.
        """
        if self.checkpoint_minutes is None:
            return None
        again, write = self.cluster.restart_minutes, self.write_seconds / 60
        return self.checkpoint_minutes / 2 + write + again, self.checkpoint_minutes + write + again

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        lost = self.lost_minutes() if self.chosen else None
        rate = self.chosen and self.chosen.images_per_second
        per_gpu = rate and rate / self.cluster.gpus
        return {
            "config": self.name,
            "cluster": asdict(self.cluster),
            "flops_per_image": self.job.flops,
            "images": self.job.total_images,
            "rows": [row.as_dict() for row in self.rows],
            "chosen": self.chosen and self.chosen.as_dict(),
            "seconds": self.seconds,
            "gpu_hours": self.seconds and self.seconds / 3600 * self.cluster.gpus,
            "cores_per_gpu": per_gpu and per_gpu / self.cluster.images_per_core,
            "read_bytes_per_second": rate and rate * self.job.image_bytes,
            "checkpoint_write_seconds": self.write_seconds if self.chosen else None,
            "checkpoint_room": self.room if self.chosen else None,
            "checkpoint_minutes": self.checkpoint_minutes,
            "lost_minutes": lost and {"expected": lost[0], "worst": lost[1]},
            "command": self.command,
        }
