"""Settings of a run on a cluster: what fits into the memory, and which one to choose.

Nothing is started and no weights are made. Memory follows from `planning.activations` and
`planning.memory`; time only from what was measured (`planning.measured`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from mae_scale.config.batch import accumulation_steps, resolve_precision, total_steps
from mae_scale.config.deepspeed import check_stage, fit_to_model, load_deepspeed_config
from mae_scale.config.sections import RunConfig
from mae_scale.errors import UserError
from mae_scale.models.classifier import keep_statistics_in_fp32
from mae_scale.planning.activations import Activations, activations
from mae_scale.planning.flops import Flops, TrialLoss
from mae_scale.planning.gpus import knows_bf16
from mae_scale.planning.measured import Work, predict
from mae_scale.planning.memory import Traffic, model_states, traffic, trained_by

HEADROOM = 0.1  # share of the memory for the CUDA context, NCCL and the allocator's losses
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
FIRST = ("zero1", "zero2")  # preferred: ZeRO 3's host time grows as ranks x parameters
WAYS: tuple[tuple[str | int, bool], ...] = (
    ("none", False), (4, False), (2, False), ("full", False), ("full", True),
)  # fmt: skip
BUSY_TOKENS = 2048  # rows of the encoder's matrices from which on a GPU is taken to be busy
BACKWARD = 2 / 3  # share of a step's time in which gradients can be sent


@dataclass(frozen=True)
class Cluster:
    """GPUs, or processes on a CPU."""

    gpus: int  # number of GPUs, or of processes on a CPU
    gpus_per_node: int  # number of GPUs in a node
    name: str  # name of the GPU, or "CPU"
    memory_gb: float  # memory of a GPU, or of a process on a CPU, in 1e9 bytes
    network_gbs: float | None = None  # GB/s of all links of a node together; None: left out

    @property
    def nodes(self) -> int:
        return max(1, self.gpus // self.gpus_per_node)

    @property
    def is_cpu(self) -> bool:
        return self.name == "CPU"


@dataclass
class Job:
    """A run to be planned."""

    config: RunConfig  # config of the run
    model: Any  # model on the meta device, with the same frozen parameters as in the run
    trial_loss: TrialLoss  # function of the task that computes a loss with made-up targets
    flops: Flops  # floating-point operations for an image
    images: int  # number of images in an epoch
    image_bytes: float  # bytes of an image on disk
    fixed: frozenset[str]  # config keys whose values are given and not to be chosen
    counted: dict[Any, Activations] = field(
        default_factory=dict
    )  # by checkpointing and micro-batch

    @property
    def encoder(self) -> Any:
        """The model's encoder."""
        return getattr(self.model, "backbone", self.model)

    @property
    def autocast(self) -> bool:
        """Whether weights stay fp32 under bf16."""
        return self.config.fp32_weights or self.config.train.autocast

    @property
    def total_images(self) -> int:
        """Number of images that the whole run trains on."""
        batch = self.config.train.global_batch_size
        return total_steps(self.config.train, self.images // batch) * batch

    @property
    def blocks(self) -> float:
        """Number of blocks; a frozen one counts a third, as it has no backward pass."""
        blocks = [*self.encoder.blocks, *getattr(self.encoder, "decoder_blocks", ())]
        trained = sum(any(p.requires_grad for p in block.parameters()) for block in blocks)
        return trained + (len(blocks) - trained) / 3


@dataclass(frozen=True)
class Row:
    """A setting and what follows from it; bytes are those of one rank unless stated otherwise."""

    deepspeed: str  # name of a file in ds_configs/, or a path
    checkpointing: str | int  # value of `train.activation_checkpointing`
    offload: bool  # value of `train.activation_offload`
    precision: str  # precision of the computation, "bf16" or "fp32"
    micro_batch: int  # number of images in a micro-batch of a rank
    accumulation: int  # number of micro-batches in a step
    states: float  # bytes of weights, gradients, the optimiser's masters and moments
    activations: float  # bytes of activations at the worst moment of the forward and backward pass
    buffers: float  # bytes of all else at the worst moment: gradients being sent, gathered weights
    host: float  # bytes in host memory
    fits: bool  # whether the setting fits into the memory
    busy: bool  # whether the micro-batch is as large as it can be, or has tokens enough for a GPU
    traffic: Traffic  # what a rank sends in a step
    checkpoint: float  # bytes of a checkpoint, all ranks together
    step_s: float | None  # seconds of a step; None: not predicted
    # Seconds of a step in which the host hands it to the device; a step takes no less.
    host_s: float | None
    network_s: float  # seconds of a step in which a GPU waits for the network
    images_per_second: float | None  # images per second of all ranks together; None: not predicted
    basis: str  # what was measured and what was not, or why no time is predicted

    @property
    def memory(self) -> float:
        """Bytes on the device of a rank at the worst moment."""
        return self.states + self.activations + self.buffers

    def timed(self, cluster: Cluster, computing: float, images: int, basis: str) -> Row:
        """Return the row with the time of a step of `images` images on all ranks together.

        It takes `computing` seconds, and what waiting for the network adds.
        """
        waiting = 0.0
        if cluster.network_gbs:
            rate = cluster.network_gbs * 1e9
            hidden = min(self.traffic.overlapped / rate, BACKWARD * computing * self.traffic.window)
            waiting = self.traffic.sent / rate - hidden
        step = computing + waiting
        return replace(
            self, step_s=step, network_s=waiting, images_per_second=images / step, basis=basis
        )

    def needed(self, cluster: Cluster) -> float:
        """Return the bytes that must fit into a rank's memory: a CPU is its own host."""
        return self.memory + (self.host if cluster.is_cpu else 0)

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {**asdict(self), "memory": self.memory}


def fit(job: Job, cluster: Cluster, every_way: bool) -> tuple[list[Row], Row | None]:
    """Compute all settings of a run, or only as many as decide, and choose one (None: none fits).

    Raises:
        UserError: the batch does not divide among the GPUs, or a fixed setting is not possible.
    """
    stages: tuple[str, ...] = STAGES
    if "deepspeed" in job.fixed:
        stages = (job.config.deepspeed,)
    elif job.config.optim.max_zero_stage == 0:
        stages = ("zero0",)
    sections = {name: load_deepspeed_config(name).get("zero_optimization", {}) for name in stages}
    for section in sections.values():
        check_stage(job.config.optim, section.get("stage", 0))
    found: list[Row] = []
    for checkpointing, offload in _ways(job):
        found += _rows(job, cluster, sections, checkpointing, offload)
        best = choose(found)
        # Whatever follows recomputes more.
        if best and best.deepspeed in FIRST and best.busy and not best.host and not every_way:
            break
    return found, choose(found)


def choose(found: list[Row]) -> Row | None:
    """Choose a setting that fits: the first without host memory that keeps a GPU busy.

    Of several, ZeRO 1 and 2 come before 3; then the fewest recomputed blocks, ZeRO 1 before 2, and
    the largest micro-batch. `zero0` is for comparison only. The result is None if nothing fits.
    """
    fitting = [row for row in found if row.fits]
    if len({row.deepspeed for row in found}) > 1:
        fitting = [row for row in fitting if row.deepspeed != "zero0"]

    def order(row: Row) -> tuple[Any, ...]:
        way = (row.checkpointing, row.offload)
        way_at = WAYS.index(way) if way in WAYS else 0
        stage_at = STAGES.index(row.deepspeed) if row.deepspeed in STAGES else 0
        late = row.deepspeed not in FIRST
        return row.host > 0, not row.busy, late, way_at, stage_at, -row.micro_batch

    return min(fitting, key=order, default=None)


def micro_batches(job: Job, gpus: int) -> list[int]:
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


def planned_precision(config: RunConfig, cluster: Cluster) -> str:
    """Return the precision of a run on a cluster, "bf16" or "fp32".

    Raises:
        UserError: the config asks for bf16, which the GPU does not know.
    """
    asked = config.train.precision
    if cluster.is_cpu or knows_bf16(cluster.name):
        return resolve_precision(asked, torch.device("cpu" if cluster.is_cpu else "cuda"))
    if asked == "bf16":
        raise UserError(
            f"{cluster.name} computes neither in bf16 nor in TF32; --train.precision fp32 would do"
        )
    return "fp32"


def _ways(job: Job) -> Iterator[tuple[str | int, bool]]:
    train = job.config.train
    if job.fixed & {"train.activation_checkpointing", "train.activation_offload"}:
        yield train.activation_checkpointing, train.activation_offload
    elif not any(p.requires_grad for p in job.encoder.blocks.parameters()):
        yield "none", False  # frozen blocks keep nothing
    else:
        yield from WAYS


def _count(job: Job, way: str | int, most: int, autocast: bool) -> Activations:
    """Count the activations with checkpointing `way`, once for each way; the model is set to it.

    Every 4th block lies between none and every 2nd, as the recomputed operations do.
    """
    if way == 4 and ("none", most) in job.counted:
        none, second = (_count(job, other, most, autocast) for other in ("none", 2))
        half = job.flops.again(job.model)
        job.model.set_activation_checkpointing(way)
        return none.towards(second, job.flops.again(job.model) / half)
    job.model.set_activation_checkpointing(way)  # copies to the host need values
    if (way, most) not in job.counted:
        job.counted[way, most] = activations(job.model, job.trial_loss, most, autocast=autocast)
    return job.counted[way, most]


def _rows(
    job: Job,
    cluster: Cluster,
    sections: dict[str, dict[str, Any]],
    checkpointing: str | int,
    offload: bool,
) -> Iterator[Row]:
    config, model, gpus, train = job.config, job.model, cluster.gpus, job.config.train
    precision = planned_precision(config, cluster)
    in_bf16 = precision == "bf16" and not job.autocast
    model.to(torch.bfloat16 if in_bf16 else torch.float32)
    keep_statistics_in_fp32(model)
    micros = micro_batches(job, gpus)
    kept = _count(job, checkpointing, max(micros), precision == "bf16" and job.autocast)
    again = job.flops.again(model) / job.flops.training
    run = trained_by(config.optim, model, "bf16" if in_bf16 else "fp32", train.grad_reduce)
    busy = min(max(micros), -(-BUSY_TOKENS // job.encoder.encoder_tokens))
    for name, section in sections.items():
        zero = section if cluster.is_cpu else fit_to_model(name, section, run.trained, gpus)
        work = Work(
            config.task, job.blocks, job.flops.training, again, precision, name, train.compile
        )
        for micro in micros:
            accumulation = train.global_batch_size // (micro * gpus)
            states = model_states(run, zero, gpus, accumulates=accumulation > 1)
            peak = kept.peak(micro, offload)
            memory, host = states.peak(peak), states.host + micro * kept.inputs * offload
            held = states.weights + states.gradients + states.optimizer
            time = predict(cluster.name, work, micro)
            words = "copies to host memory were not measured: time is not predicted"
            row = Row(
                deepspeed=name,
                checkpointing=checkpointing,
                offload=offload,
                precision=precision,
                micro_batch=micro,
                accumulation=accumulation,
                states=held,
                activations=peak,
                buffers=memory - held - peak,
                host=host,
                fits=memory + host * cluster.is_cpu <= cluster.memory_gb * 1e9 * (1 - HEADROOM),
                busy=micro >= busy,
                traffic=traffic(run, zero, gpus, accumulation),
                checkpoint=run.checkpoint_bytes(zero.get("stage", 0)),
                step_s=None,
                host_s=time.host and time.host * accumulation,
                network_s=0.0,
                images_per_second=None,
                basis=words if time.seconds and host else time.words,
            )
            if time.seconds and not host:
                computing = accumulation * time.seconds
                row = row.timed(cluster, computing, train.global_batch_size, time.words)
            yield row
