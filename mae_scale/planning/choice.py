"""Rows of a plan: memory, time, traffic and checkpoints of a run for each possible setting.

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
    Part,
    activation_parts,
    host_bytes,
    kept_bytes,
    peak_bytes,
    sizes,
)
from mae_scale.planning.model_states import ParameterStates, model_states, traffic, trained_by

HEADROOM = 0.1  # share of the memory for the CUDA context, NCCL and the allocator's losses
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
CHECKPOINTING: tuple[tuple[str | int, bool], ...] = (
    ("none", False), (4, False), (2, False), ("full", False), ("full", True),
)  # fmt: skip
BUSY_TOKENS = 2048  # rows of the encoder's matrices, from which on a GPU can reach its MFU
HOST_OF_STAGE_3 = 2  # ratio of the host's time for a block under stage 3 to that under others
BACKWARD = 2 / 3  # share of a step's time in which gradients can be sent


@dataclass(frozen=True)
class Cluster:
    """GPUs, or processes on a CPU, and what is assumed of them."""

    gpus: int
    """Number of GPUs, or of processes on a CPU."""
    gpus_per_node: int
    """Number of GPUs in a node."""
    name: str
    """Name of the GPU, or "CPU"."""
    memory_gb: float
    """Memory of a GPU, or of a process on a CPU, in 1e9 bytes."""
    tflops: float | None
    """Dense bf16 peak of a GPU in TFLOP/s; None if it is not known."""
    mfu: float
    """Share of the peak, 0 to 1, that goes into the model's operations while a GPU computes."""
    network_gbs: float
    """GB/s at which collectives pass all links of a node together."""
    disk_gbs: float
    """GB/s at which all ranks together write to the run folder."""
    images_per_core: float
    """Number of images that a core decodes and crops in a second."""
    restart_minutes: float
    """Minutes from the end of a job to the next step of its successor."""
    host_ms: float
    """Milliseconds that the host takes to hand a block to the GPU, forward and backward."""

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
    """Config of the run."""
    model: Encoder
    """Model on the meta device, with the same frozen parameters as in the run."""
    flops: int
    """Floating-point operations for an image, forward and backward."""
    images: int
    """Number of images in an epoch."""
    image_bytes: float
    """Bytes of an image on disk."""
    fixed: frozenset[str]
    """Config keys whose values are given and not to be chosen."""

    @property
    def total_images(self) -> int:
        """Number of images that the whole run trains on."""
        batch = self.config.train.global_batch_size
        return total_steps(self.config.train, self.images // batch) * batch


@dataclass(frozen=True)
class Row:
    """A setting and what follows from it; bytes are those of one rank unless stated otherwise."""

    deepspeed: str
    """Name of a file in ds_configs/, or a path."""
    checkpointing: str | int
    """Value of `train.activation_checkpointing`."""
    offload: bool
    """Value of `train.activation_offload`."""
    micro_batch: int
    """Number of images in a micro-batch of a rank."""
    accumulation: int
    """Number of micro-batches in a step."""
    weights: float
    """Bytes of the weights."""
    gradients: float
    """Bytes of the gradients."""
    optimizer: float
    """Bytes of the optimiser's masters and states."""
    activations: float
    """Bytes that the forward pass keeps for the backward pass."""
    buffers: float
    """Bytes of all else at the worst moment: sending, temporary tensors, recomputed activations."""
    host: float
    """Bytes in host memory."""
    fits: bool
    """Whether the setting fits into the memory."""
    sent: float
    """Bytes that a rank sends in a step."""
    network_s: float
    """Seconds of a step in which a GPU waits for the network."""
    compute_s: float | None
    """Seconds of a step in which a GPU computes; None where the peak is not known."""
    host_s: float
    """Seconds that the host takes to hand a step to the device; a step takes no less."""
    recompute_share: float
    """Share of the computing that is due to activation checkpointing, 0 to 1."""
    images_per_second: float | None
    """Images per second of all ranks together; None where the peak is not known."""
    checkpoint: float
    """Bytes of a checkpoint, all ranks together."""
    busy: bool
    """Whether the micro-batch is large enough for the stated MFU, and for the host to keep up."""

    @property
    def step_s(self) -> float | None:
        """Seconds of a step: computing plus waiting for the network, or the host's if longer."""
        return self.compute_s and max(self.compute_s + self.network_s, self.host_s)

    @property
    def memory(self) -> float:
        """Bytes on the device of a rank at the worst moment."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {**asdict(self), "memory": self.memory}


def rows(job: PlannedRun, cluster: Cluster) -> list[Row]:
    """Compute a row for each setting worth considering; settings in `job.fixed` are kept.

    Raises:
        UserError: the batch does not divide among the GPUs, or a fixed setting is not possible.
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
    kind = "cpu" if cluster.is_cpu else "cuda"
    precision = resolve_precision(train.precision, torch.device(kind))
    weights = "fp32" if train.autocast else precision
    run = trained_by(job.config.optim, job.model, weights, train.grad_reduce)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = []
    for every, offload in options:
        job.model.set_activation_checkpointing(every, offload)  # type: ignore[arg-type]
        parts = activation_parts(job.model, sizes(dtype, kind))
        again = recomputed_flops(job.model) / job.flops
        way = _Way(precision, run, parts, again, _passes(job.model), every, offload)
        for name in stages:
            found += [
                _row(job, cluster, way, name, sections[name], micro)
                for micro in micro_batches(job, cluster.gpus)
            ]
    return sorted(found, key=lambda row: stages.index(row.deepspeed))


def micro_batches(job: PlannedRun, gpus: int) -> list[int]:
    """List the possible micro-batches: powers of two that divide a GPU's share of a batch.

    Raises:
        UserError: the global batch does not divide among the GPUs, or the shares are odd and images
            are mixed in pairs.
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


@dataclass(frozen=True)
class _Way:
    """What rows have in common that differ in the ZeRO stage and the micro-batch only."""

    precision: str
    """Precision of the computation, "bf16" or "fp32"."""
    run: ParameterStates
    """What the run keeps for each parameter."""
    parts: list[Part]
    """Parts of the forward pass, with their bytes."""
    again: float
    """FLOPs of recomputing as a share of a step's."""
    passes: int
    """Passes through blocks in a micro-batch."""
    checkpointing: str | int
    offload: bool


def _row(
    job: PlannedRun, cluster: Cluster, way: _Way, name: str, zero: dict[str, Any], micro: int
) -> Row:
    train, gpus, run, parts = job.config.train, cluster.gpus, way.run, way.parts
    accumulation = train.global_batch_size // (micro * gpus)
    if not cluster.is_cpu:
        zero = fit_to_model(name, zero, run.trained, gpus)
    states = model_states(run, zero, gpus, accumulates=accumulation > 1)
    kept = micro * kept_bytes(parts)
    host = states.host + micro * host_bytes(parts)
    memory = states.peak(peak_bytes(parts, micro))
    limit = cluster.memory_gb * 1e9 * (1 - HEADROOM)
    sent = traffic(run, zero, gpus, accumulation)
    compute = None
    exposed = (sent.gradients + sent.weights) / (cluster.network_gbs * 1e9)
    if cluster.tflops is not None:
        # fp32 on a GPU is TF32, whose peak is half of bf16's.
        peak_flops = cluster.tflops * 1e12 * (1 if way.precision == "bf16" else 0.5)
        flops = job.flops * (1 + way.again) * train.global_batch_size / gpus
        compute = flops / (peak_flops * cluster.mfu)
        hidden = sent.overlapped / (cluster.network_gbs * 1e9)
        exposed -= min(hidden, BACKWARD * compute * sent.window)
    handing_over = accumulation * way.passes / 3 * cluster.host_ms / 1e3
    if zero.get("stage") == 3:
        handing_over *= HOST_OF_STAGE_3
    largest = train.global_batch_size // gpus
    enough = micro >= min(largest, -(-BUSY_TOKENS // job.model.encoder_tokens))
    keeps_up = compute is None or compute + exposed >= handing_over or micro == largest
    return Row(
        deepspeed=name,
        checkpointing=way.checkpointing,
        offload=way.offload,
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
        recompute_share=way.again / (1 + way.again),
        images_per_second=compute
        and train.global_batch_size / max(compute + exposed, handing_over),
        checkpoint=run.checkpoint_bytes(zero.get("stage", 0)),
        busy=enough and keeps_up,
    )


def _passes(model: Encoder) -> int:
    """Count the passes through blocks in a micro-batch; a backward pass counts as two."""
    blocks = [*model.blocks, *getattr(model, "decoder_blocks", ())]
    return sum(3 if any(p.requires_grad for p in block.parameters()) else 1 for block in blocks)


@dataclass(frozen=True)
class RunPlan:
    """Plan of a config on a cluster."""

    name: str
    """Name of the config."""
    job: PlannedRun
    """The run that is planned."""
    cluster: Cluster
    """The cluster that it is planned for."""
    rows: list[Row]
    """All settings that were considered."""
    chosen: Row | None
    """The setting that was chosen; None if none fits."""
    checkpoint_minutes: float | None
    """Minutes between two checkpoints; None if they are set in steps of unknown duration."""
    command: str
    """The command that starts the run."""
    hint: str
    """Advice to read before the run is started."""

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole run without validation and restarts; None if unknown."""
        rate = self.chosen and self.chosen.images_per_second
        return self.job.total_images / rate if rate else None

    @property
    def room(self) -> float:
        """Bytes of all checkpoints that exist while one is being written."""
        assert self.chosen is not None
        return (self.job.config.checkpoint.keep + 1) * self.chosen.checkpoint

    @property
    def write_seconds(self) -> float:
        """Seconds that writing a checkpoint takes."""
        assert self.chosen is not None
        return self.chosen.checkpoint / (self.cluster.disk_gbs * 1e9)

    def lost_minutes(self) -> tuple[float, float] | None:
        """Return the minutes that a job killed without a warning loses: on average and at most.

        The restart is included. None if the time between checkpoints is not known.
        """
        if self.checkpoint_minutes is None:
            return None
        again, write = self.cluster.restart_minutes, self.write_seconds / 60
        return self.checkpoint_minutes / 2 + write + again, self.checkpoint_minutes + write + again

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
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
