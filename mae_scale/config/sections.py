"""The sections of a config and their keys: what each key means, its range, and its default.

The text below a key is what `--help` prints. A key that is declared by `changeable` may change when
a run goes on: it decides neither which samples a step sees nor what is learned from them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mae_scale.config.numbers import (
    Above0,
    AtLeast0,
    AtLeast10,
    From0,
    From1,
    Share,
    ShareBelow1,
    Workers,
)
from mae_scale.world import data_workers

CHANGEABLE = "changeable"  # key of a field's metadata


def changeable(default: Any) -> Any:
    """Declare a key that may change when a run goes on."""
    return field(default=default, metadata={CHANGEABLE: True})


def given(section: Any, *without: str) -> dict[str, Any]:
    """Give the keys of a section that are not null, as keyword arguments.

    Args:
        section: a config section.
        without: keys to leave out.
    """
    values = dataclasses.asdict(section)
    return {key: v for key, v in values.items() if v is not None and key not in without}


# Sections of every task


@dataclass
class DataConfig:
    """Shards and how they are read."""

    # It may move; that its manifest stays the same is checked apart.
    train: str = field(metadata={CHANGEABLE: True})
    """Folder of training shards, as written by `mae-scale shard`."""
    val: str | None = changeable(None)
    """Folder of validation shards; null: no validation. Pre-training draws pictures of some."""
    workers: Workers | None = changeable(None)
    """Data-loading processes per rank; 0 loads in the training process itself; null: one less than
    the CPUs of the rank on this machine, 16 at the most."""
    lanes: From1 = 256
    """Number of places in the dataset that are read at the same time; part of the sample order."""
    window: From1 = 2048
    """Samples of a lane that are shuffled together; part of the sample order."""
    repeats: From1 = 1
    """Images that a step has of each of its samples, decoded once, with other crops and masks
    (repeated augmentation); an epoch then has so many times the images and steps."""
    cache_dir: str | None = changeable(None)
    """Folder on a local disk into which remote shards are staged; needed for those only."""
    cache_gb: Above0 = changeable(200.0)
    """Size limit of cache_dir, in gigabytes (1e9 bytes); the least recently used shard goes."""
    max_bad_fraction: Share = changeable(1e-4)
    """Share of samples that may be damaged, each replaced by another one, before the run ends."""
    max_pixels: From1 = 178_956_970
    """Pixels that an image may have; a larger one is not decoded and counts as damaged."""
    mean: list[AtLeast0] | None = None
    """Mean of each band of the images, for values from 0 to 1, as `mae-scale stats` computes it;
    null: that of ImageNet's three."""
    std: list[Above0] | None = None
    """Standard deviation of each band; null: that of ImageNet's three."""
    value_range: tuple[float, float] | None = None
    """Values that become black and white, as 0 and 10000 for many satellites; what lies beyond is
    clipped. null: all that 8 or 16 bits can hold."""

    @property
    def worker_processes(self) -> int:
        """Data-loading processes per rank: `workers`, or what suits this machine."""
        return data_workers() if self.workers is None else self.workers


@dataclass
class EncoderConfig:
    """The encoder of a masked autoencoder (paper section 3)."""

    name: str = "mae_vit_base_patch16"
    """Architecture: mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    img_size: From1 | tuple[From1, From1] = 224
    """Side of the square input image in pixels, or its height and width; multiples of the patch
    size."""
    patch_size: From1 | None = None
    """Side of a patch, in pixels; null takes the one in the model's name."""
    embed_dim: From1 | None = None
    """Width of the encoder, in channels; null takes the architecture's."""
    depth: From1 | None = None
    """Blocks of the encoder; null takes the architecture's."""
    num_heads: From1 | None = None
    """Attention heads of the encoder, which must divide embed_dim; null: the architecture's."""
    mlp_ratio: Above0 | None = None
    """Width of the MLPs' hidden layers over that of their blocks; null: 4."""


@dataclass
class BandedConfig(EncoderConfig):
    """An encoder of images with any number of bands."""

    in_chans: From1 = 3
    """Bands of an image; other numbers than 3 need data.mean and data.std."""


@dataclass
class TrainConfig:
    """Length, batch, precision, memory."""

    epochs: From1 = 1600
    """Epochs of the whole schedule; the learning rate follows it."""
    max_steps: From1 | None = changeable(None)
    """Ends the run after this many optimiser steps, without changing the learning rate."""
    max_hours: Above0 | None = changeable(None)
    """Hours after which this start of the run saves and exits with 85, as on SIGTERM; the same
    command goes on. null: no limit."""
    global_batch_size: From1 = 4096
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch_size: From1 = changeable(64)
    """Images per rank and forward pass; accumulation steps follow from the global batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of weights and activations; master weights are fp32. auto: bf16 on GPUs, fp32 on
    CPUs."""
    autocast: bool = False
    """Whether, under bf16, weights and what goes from block to block are fp32 and torch.autocast
    computes layers in bf16, as in the authors' code; otherwise both are bf16."""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over the ranks; bf16 halves what is sent."""
    activation_checkpointing: Literal["none", "full"] | From1 = changeable("none")
    """Blocks whose activations are recomputed in the backward pass: none, full, or every k-th."""
    activation_offload: bool = changeable(False)
    """Whether the inputs of recomputed blocks, which are all that is kept of them, wait in host
    memory."""
    compile: bool = changeable(False)
    """Whether the blocks are compiled with torch.compile."""
    deterministic: bool = changeable(False)
    """Whether a GPU takes only algorithms that give the same bits each time, which is slower."""
    max_bad_steps: From1 = changeable(10)
    """Optimiser steps in a row with a loss or gradient that is not finite, before the run ends."""
    log_every: From1 = changeable(20)
    """Optimiser steps between two rows of metrics.jsonl."""
    hang_timeout: AtLeast10 = changeable(1800.0)
    """Seconds without any progress after which a run ends and names the rank that hangs."""
    profile: str | None = changeable(None)
    """Optimiser steps START-STOP, both included, whose trace is written; null: none."""


@dataclass
class OptimizerConfig:
    """The learning-rate rule; `optimizer` says what applies it."""

    optimizer: ClassVar[str]
    """Name of the optimiser in `train.optimizers.OPTIMIZERS`."""
    max_zero_stage: ClassVar[int] = 3
    """Highest ZeRO stage under which the optimiser works."""
    base_lr: AtLeast0 = 1.5e-4
    """Learning rate for 256 images; the peak is base_lr x global_batch_size / 256."""
    min_lr: AtLeast0 = 0.0
    """Learning rate at the end of the half-cycle cosine."""
    warmup_epochs: AtLeast0 = 40
    """Epochs of linear warm-up from 0."""
    weight_decay: AtLeast0 = 0.05
    """Decoupled weight decay of matrices; biases and norms have none."""
    clip_grad: Above0 | None = None
    """Largest L2 norm of the gradient over all parameters; a longer one is scaled down to it.
    null: no clipping, as in MAE's recipes."""

    @property
    def warmup(self) -> str:
        """Length of the warm-up in words."""
        return f"{self.warmup_epochs:g} epochs of warm-up"

    @property
    def kinds_without_decay(self) -> tuple[str, ...]:
        """Kinds of parameters (`models.kinds`) that are not decayed: biases and norms."""
        return ("bias", "layer_norm", "channel_norm", "scale")

    @property
    def curve(self) -> str | None:
        """Name of a curve over the whole run (`schedule.curve_rate`); None: the rule of MAE."""
        return None

    @property
    def rate_per_layer(self) -> float:
        """Factor of the learning rate from each layer to the one before it."""
        return 1.0

    @property
    def average_decay(self) -> float | None:
        """Decay per step of the moving average of the weights; None: there is none."""
        return None


@dataclass
class CheckpointConfig:
    """When the run is saved and what is kept."""

    every_steps: From1 | None = changeable(None)
    """Optimiser steps between two checkpoints; null: by time only."""
    every_minutes: Above0 | None = changeable(30.0)
    """Minutes between two checkpoints; null: by steps only."""
    keep: From1 = changeable(3)
    """Number of newest checkpoints kept."""
    background_gb: AtLeast0 | None = changeable(0.25)
    """Gigabytes (1e9 bytes) of a rank's state from which on files are written while training goes
    on, from a copy in host memory, and not before the next step; null: never."""
    milestone_epochs: From1 | None = changeable(None)
    """Also save at, and keep for good, the end of every so many epochs; null: none."""


@dataclass
class RunConfig:
    """The config of a run; each task has a subclass with its own sections."""

    has_batch_statistics: ClassVar[bool] = False
    """Whether the model's statistics are those of a micro-batch, so that its size matters."""
    fp32_weights: ClassVar[bool] = False
    """Whether weights stay fp32 under bf16, where `torch.autocast` then computes layers."""

    run_dir: str = field(metadata={CHANGEABLE: True})
    """Folder of the run: config, metrics, checkpoints. The same folder goes on where it stopped."""
    data: DataConfig = field()
    task: str = ""
    """Name of the task whose config this is; it may be left out."""
    weights: str | None = None
    """Weights to start from: a run folder of pretrain or finetune or a step folder in it, a .pth of
    the authors, a .safetensors, or a folder of timm or Hugging Face; null: from scratch."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    augment: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deepspeed: str = changeable("zero1")
    """DeepSpeed config: zero0, zero1, zero2, zero3, zero3_offload, or the path of a JSON file."""
    seed: From0 = 0
    """Decides sample order, crops, masks, augmentation, dropped paths and initial weights."""
    replay: From1 | None = changeable(None)
    """Run this optimiser step of the run again, alone, and show the first value that is not finite.
    Nothing is written."""

    @property
    def mixes_pairs(self) -> bool:
        """Whether the images of a micro-batch are mixed in pairs, so that its size must be even."""
        return False


@dataclass
class OptimConfig(OptimizerConfig):
    """AdamW and the learning-rate rule (paper Table 8)."""

    optimizer: ClassVar[str] = "adamw"

    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
