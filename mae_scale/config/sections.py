"""The sections of a config and their keys: what each key means, its range, and its default."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from mae_scale.config.keys import Section
from mae_scale.config.value_types import (
    Above0,
    AtLeast0,
    AtLeast10,
    Changeable,
    Finite,
    From0,
    From1,
    Pair,
    Share,
    ShareBelow1,
    Size,
    Text,
    Workers,
)
from mae_scale.world import data_workers


def given(section: Section, *without: str) -> dict[str, Any]:
    """Return the keys of a section that are not null, as keyword arguments.

    Args:
        section: a config section.
        without: keys to leave out.
    """
    return section.model_dump(exclude=set(without), exclude_none=True)


# Sections that every task has


class DataConfig(Section):
    """Shards and how they are read."""

    # The folder may move. Another check sees to it that its manifest stays the same.
    train: Changeable[Text]
    """Folder of training shards, as written by `mae-scale shard`."""
    val: Changeable[Text | None] = None
    """Folder of validation shards; null: no validation. Pre-training reconstructs some of their
    images in pictures."""
    workers: Changeable[Workers | None] = None
    """Data-loading processes per rank; 0 loads in the training process itself; null: one less than
    the CPUs of the rank on this machine, 16 at the most."""
    lanes: From1 = 256
    """Number of places in the dataset that are read at the same time; it changes the sample
    order."""
    window: From1 = 2048
    """Samples of a lane that are shuffled together; it changes the sample order."""
    repeats: From1 = 1
    """Number of images that a step makes of each of its samples, decoded once, with different crops
    and masks (repeated augmentation); it multiplies the images and steps of an epoch."""
    cache_dir: Changeable[Text | None] = None
    """Folder on a local disk into which remote shards are staged; only remote shards need it, such
    as those of `FOLDER+pipe:cat FOLDER/{}` on a slow shared file system."""
    cache_gb: Changeable[Above0] = 200.0
    """Size limit of cache_dir, in gigabytes (1e9 bytes); the least recently used shards are deleted
    first."""
    max_bad_fraction: Changeable[Share] = 1e-4
    """Share of samples that may be damaged before the run ends; another sample replaces each."""
    max_pixels: From1 = 178_956_970
    """Most pixels that an image may have; a larger image is not decoded and counts as damaged."""
    mean: list[AtLeast0] | None = None
    """Mean of each band of the images, for values from 0 to 1, as `mae-scale stats` computes it;
    null: ImageNet's means of three bands."""
    std: list[Above0] | None = None
    """Standard deviation of each band; null: ImageNet's deviations of three bands."""
    value_range: Pair[Finite] | list[Pair[Finite]] | None = None
    """Values that become black and white, such as [0, 10000] for many satellites, or a list of such
    pairs, one for each band; values beyond them are clipped. null: the whole range of 8 or 16
    bits."""

    @property
    def worker_processes(self) -> int:
        """Data-loading processes per rank: `workers`, or a number that suits this machine."""
        return data_workers() if self.workers is None else self.workers


class EncoderConfig(Section):
    """The encoder of a masked autoencoder (paper section 3)."""

    name: Text = "mae_vit_base_patch16"
    """Architecture: mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    img_size: Size | Pair[Size] = 224
    """Side of the square input image in pixels, or its height and width; multiples of the patch
    size."""
    patch_size: Size | None = None
    """Side of a patch, in pixels; null takes the size in the model's name."""
    embed_dim: Size | None = None
    """Width of the encoder, in channels; null takes the architecture's."""
    depth: Size | None = None
    """Blocks of the encoder; null takes the architecture's."""
    num_heads: Size | None = None
    """Attention heads of the encoder, which must divide embed_dim; null: the architecture's."""
    mlp_ratio: Above0 | None = None
    """Width of the MLPs' hidden layers divided by the width of their blocks; null: 4."""


class BandedConfig(EncoderConfig):
    """An encoder of images with any number of bands."""

    in_chans: Size = 3
    """Number of bands of an image; numbers other than 3 need data.mean and data.std."""


class TrainConfig(Section):
    """Length, batch, precision, memory."""

    epochs: From1 = 1600
    """Epochs of the whole schedule; the learning rate follows it."""
    max_steps: Changeable[From1 | None] = None
    """Optimiser steps after which the run ends; they do not change the learning rate. null: the run
    ends after its epochs."""
    max_hours: Changeable[Above0 | None] = None
    """Hours after which this start of the run saves and exits with 85, as on SIGTERM; the same
    command then continues the run. null: no limit."""
    global_batch_size: From1 = 4096
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch_size: Changeable[From1] = 64
    """Images per rank and forward pass; accumulation steps follow from the global batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of weights and activations; master weights are fp32. auto: bf16 on GPUs, fp32 on
    CPUs."""
    autocast: bool = False
    """Whether, under bf16, torch.autocast computes layers in bf16 while weights and the activations
    between blocks are fp32, as in the authors' code; otherwise all of them are bf16."""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over the ranks; bf16 halves the bytes sent."""
    activation_checkpointing: Changeable[Literal["none", "full"] | From1] = "none"
    """Blocks whose activations are recomputed in the backward pass: none; full, all of them; or a
    number k, every k-th."""
    activation_offload: Changeable[bool] = False
    """Whether the inputs of recomputed blocks are kept in host memory until the backward pass."""
    compile: Changeable[bool] = False
    """Whether the blocks are compiled with torch.compile."""
    deterministic: Changeable[bool] = False
    """Whether a GPU uses only algorithms that give the same bits each time, which is slower."""
    max_bad_steps: Changeable[From1] = 10
    """Number of optimiser steps in a row with a loss or gradient that is not finite after which the
    run ends."""
    log_every: Changeable[From1] = 20
    """Optimiser steps between two rows of metrics.jsonl."""
    hang_timeout: Changeable[AtLeast10] = 300.0
    """Seconds without any progress in a step after which the run ends and names the rank that
    hangs. The first steps of a start, saves, validations and all else have 1800 s at the least."""
    profile: Changeable[Text | None] = None
    """Optimiser steps START-STOP, both included, of which a trace is written; null: no trace."""


class OptimizerConfig(Section):
    """The learning-rate rule, and the optimiser that applies it."""

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
    """Largest L2 norm of the gradient over all parameters; a longer gradient is scaled down to it.
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
        """Name of a curve over the whole run (`schedule.curve_rate`); None: the rule of MAE, a
        warm-up and half a cosine."""
        return None

    @property
    def rate_per_layer(self) -> float:
        """Factor of the learning rate from each layer to the one before it."""
        return 1.0

    @property
    def average_decay(self) -> float | None:
        """Decay per step of the moving average of the weights; None: no average is kept."""
        return None


class CheckpointConfig(Section):
    """When the run is saved and which checkpoints are kept."""

    every_steps: Changeable[From1 | None] = None
    """Optimiser steps between two checkpoints; null: by time only."""
    every_minutes: Changeable[Above0 | None] = 30.0
    """Minutes between two checkpoints; null: by steps only."""
    keep: Changeable[From1] = 3
    """Number of newest checkpoints that are kept."""
    background_gb: Changeable[AtLeast0 | None] = 0.25
    """Gigabytes (1e9 bytes) of a rank's state from which on a checkpoint is written from a copy in
    host memory while training goes on; smaller states are written before the next step. null: all
    are."""
    milestone_epochs: Changeable[From1 | None] = None
    """Epochs between two milestones: checkpoints that are saved besides the others and are kept for
    good; null: no milestones."""


class RunConfig(Section):
    """The config of a run; each task has a subclass with its own sections."""

    has_batch_statistics: ClassVar[bool] = False
    """Whether the model takes statistics over a micro-batch, so that its size matters."""
    fp32_weights: ClassVar[bool] = False
    """Whether weights stay fp32 under bf16; `torch.autocast` then computes layers in bf16."""

    run_dir: Changeable[Text]
    """Folder of the run: config, metrics, checkpoints. A start with the folder of a run continues
    that run where it stopped."""
    data: DataConfig
    task: Text = ""
    """Name of the task whose config this is; it may be left out."""
    weights: Text | None = None
    """Weights to start from: a run folder of pretrain or finetune, a step folder in one, a .pth of
    the authors, a .safetensors, or a folder of timm or Hugging Face; null: from scratch."""
    model: EncoderConfig = Field(default_factory=EncoderConfig)
    augment: Any = None
    train: TrainConfig = Field(default_factory=TrainConfig)
    optim: OptimizerConfig = Field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    deepspeed: Changeable[Text] = "zero1"
    """DeepSpeed config: zero0, zero1, zero2, zero3, zero3_offload, or the path of a JSON file."""
    seed: From0 = 0
    """Number that decides sample order, crops, masks, augmentation, dropped paths and initial
    weights."""
    replay: Changeable[From1 | None] = None
    """Number of the optimiser step that is run again, alone, to show the first value in it that is
    not finite. Nothing is written. null: the run is trained."""

    start_over: Changeable[bool] = False
    """Whether a run that has saved checkpoints, none of which can be used any more, begins at step
    0 again; what is in its folder is set aside. A checkpoint that can be used is used."""

    @property
    def mixes_pairs(self) -> bool:
        """Whether the images of a micro-batch are mixed in pairs, which needs an even number."""
        return False


class OptimConfig(OptimizerConfig):
    """AdamW and the learning-rate rule (paper Table 8)."""

    optimizer: ClassVar[str] = "adamw"

    betas: Pair[ShareBelow1] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
