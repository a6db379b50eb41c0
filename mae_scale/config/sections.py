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
    Between0And1,
    From0,
    From1,
    Share,
    ShareAbove0,
    ShareBelow1,
    Workers,
)
from mae_scale.world import data_workers

CHANGEABLE = "changeable"  # key of a field's metadata


def changeable(default: Any) -> Any:
    """Declare a key that may change when a run goes on."""
    return field(default=default, metadata={CHANGEABLE: True})


def given(section: Any, *without: str) -> dict[str, Any]:
    """The keys of a section that are not null, as keyword arguments.

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

    @property
    def worker_processes(self) -> int:
        """Data-loading processes per rank: `workers`, or what suits this machine."""
        return data_workers() if self.workers is None else self.workers


@dataclass
class EncoderConfig:
    """The encoder of a masked autoencoder (paper section 3)."""

    name: str = "mae_vit_base_patch16"
    """Architecture: mae_vit_{tiny,small,base,large}_patch16 or mae_vit_huge_patch14."""
    img_size: From1 = 224
    """Side of the square input image, in pixels; a multiple of the patch size."""
    patch_size: From1 | None = None
    """Side of a patch, in pixels; null takes the one in the model's name."""
    embed_dim: From1 | None = None
    """Width of the encoder, in channels; null takes the architecture's."""
    depth: From1 | None = None
    """Blocks of the encoder; null takes the architecture's."""


@dataclass
class TrainConfig:
    """Length, batch, precision, memory."""

    epochs: From1 = 1600
    """Epochs of the whole schedule; the learning rate follows it."""
    max_steps: From1 | None = changeable(None)
    """Ends the run after this many optimiser steps, without changing the learning rate."""
    global_batch_size: From1 = 4096
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch_size: From1 = changeable(64)
    """Images per rank and forward pass; accumulation steps follow from the global batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of weights and activations; master weights are fp32. auto: bf16 on GPUs, fp32 on
    CPUs."""
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

    optimizer: ClassVar[Literal["adamw", "lars"]]
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
    """What a run of any task is decided by; each task has a subclass with its own sections."""

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
    """What to start from: a run folder of pretrain or finetune or a step folder in it, a .pth of
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


# pretrain


@dataclass
class ModelConfig(EncoderConfig):
    """The masked autoencoder (paper section 3)."""

    mask_ratio: Between0And1 = 0.75
    """Share of the patches that is removed (paper Figure 5)."""
    mask_sampling: Literal["random", "block", "grid"] = "random"
    """How these are chosen: each by itself, rectangles as in BEiT, or all but one of every four
    (paper Table 1f)."""
    mask_tokens_in_encoder: bool = False
    """Whether the encoder sees mask tokens in the place of removed patches (paper Table 1c)."""
    target: Literal["pixels", "pca", "tokens"] = "pixels"
    """What is predicted of a removed patch (paper Table 1d): its pixels, their largest PCA
    coefficients, or the id that a tokenizer gives to it."""
    norm_pix_loss: bool = True
    """Whether the target is each patch's pixels normalised by their own mean and deviation."""
    pca_components: From1 = 96
    """Coefficients of the target pca; the components are those of the run's first 2048 images."""
    tokenizer: str | None = None
    """File of the tokenizer for the target tokens: a TorchScript module (.pt), or a .safetensors
    of DALL-E's dVAE encoder."""
    vocabulary_size: From1 = 8192
    """Number of different ids that the tokenizer gives."""
    decoder_embed_dim: From1 | None = None
    """Width of the decoder, in channels; null takes the architecture's (paper Table 1b)."""
    decoder_depth: From1 | None = None
    """Blocks of the decoder; null takes the architecture's (paper Table 1a)."""


@dataclass
class PretrainAugmentConfig:
    """What makes training images vary (paper Table 1e); by default a random crop and a flip."""

    crop: Literal["none", "fixed", "random"] = "random"
    """none: the centre, without a flip; fixed: a square of fixed size somewhere, covering 0.875 of
    the short side; random: a RandomResizedCrop."""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.2, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""
    color_jitter: Share = 0.0
    """Strength of random changes of brightness, contrast and saturation, 0 to 1; 0: none."""


@dataclass
class PretrainTrainConfig(TrainConfig):
    """Length, batch, precision, memory, pictures."""

    reconstruct_every: From1 | None = changeable(5000)
    """Optimiser steps between two pictures of what becomes of the same eight images, those of
    data.val if it is given; the last step has one, too; null: none."""


@dataclass
class OptimConfig(OptimizerConfig):
    """AdamW and the learning-rate rule (paper Table 8)."""

    optimizer: ClassVar[Literal["adamw", "lars"]] = "adamw"

    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""


@dataclass
class PretrainConfig(RunConfig):
    """Pre-training of a masked autoencoder (paper section 3, Table 8)."""

    task: Literal["pretrain"] = "pretrain"
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: PretrainAugmentConfig = field(default_factory=PretrainAugmentConfig)
    train: PretrainTrainConfig = field(default_factory=PretrainTrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


# finetune


@dataclass
class ClassifierConfig(EncoderConfig):
    """The encoder of a masked autoencoder and a classification head (paper Appendix A.1)."""

    pool: Literal["mean", "token"] = "mean"
    """What is classified: the mean of the patches' features, or the class token's."""
    head: Literal["linear", "mlp"] = "linear"
    """One linear layer, or an MLP with one hidden layer of the encoder's width."""
    drop_path: ShareBelow1 = 0.0
    """Rate of stochastic depth in the last block; it rises linearly from 0 in the first one."""
    crop_ratio: ShareAbove0 | None = None
    """Share of the short side that evaluation's centre crop covers; null: 0.875 up to 224 pixels,
    1.0 above."""


@dataclass
class AugmentConfig:
    """What makes training images vary (paper Tables 9 and 11)."""

    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""
    color_jitter: Share = 0.0
    """Strength of random changes of brightness, contrast and saturation, 0 to 1; 0: none."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's spelling; null: none."""
    mixup: AtLeast0 = 0.8
    """Alpha of mixup; 0: none. Where both are on, each micro-batch draws mixup or cutmix."""
    cutmix: AtLeast0 = 1.0
    """Alpha of cutmix; 0: none."""
    erasing: Share = 0.25
    """Share of the images in which a rectangle becomes noise (random erasing)."""
    label_smoothing: ShareBelow1 = 0.1
    """Probability mass of the target that is spread over all classes."""

    @property
    def mixes(self) -> bool:
        """Whether the images of a micro-batch are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass
class FinetuneTrainConfig(TrainConfig):
    """Length, batch, precision, memory, and what is trained."""

    epochs: From1 = 100
    """Epochs of the whole schedule; the learning rate follows it."""
    global_batch_size: From1 = 1024
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    tune_blocks: AtLeast0 | None = None
    """Last blocks that are trained besides the head (paper Figure 9): 0, 0.5 (the last block's
    MLP), 1, 2, ...; null: everything."""
    validate_epochs: From1 = changeable(1)
    """Epochs between two validations on data.val; the last epoch has one, too."""


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """AdamW, the learning-rate rule, layer-wise decay (paper Table 9)."""

    base_lr: AtLeast0 = 5e-4
    """Learning rate for 256 images; the peak is base_lr x global_batch_size / 256."""
    min_lr: AtLeast0 = 1e-6
    """Learning rate at the end of the half-cycle cosine."""
    warmup_epochs: AtLeast0 = 5
    """Epochs of linear warm-up from 0."""
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    layer_decay: ShareAbove0 = 1.0
    """Factor of the learning rate from each layer to the one before it; 1: the same for all."""
    ema_decay: ShareBelow1 | None = None
    """Decay per step of a moving average of the weights, kept in fp32, validated beside them;
    null: none (paper Table 11)."""

    @property
    def kinds_without_decay(self) -> tuple[str, ...]:
        """Kinds of parameters that are not decayed: also positions and the class token."""
        return (*super().kinds_without_decay, "position", "class_token")

    @property
    def rate_per_layer(self) -> float:
        """Factor of the learning rate from each layer to the one before it."""
        return self.layer_decay

    @property
    def average_decay(self) -> float | None:
        """Decay per step of the moving average of the weights; None: there is none."""
        return self.ema_decay


@dataclass
class FinetuneConfig(RunConfig):
    """Classification, from pre-trained weights or from scratch (paper Tables 9 and 11)."""

    task: Literal["finetune"] = "finetune"
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    new_head: bool = False
    """Whether to start with a new head even if the weights have one."""

    @property
    def mixes_pairs(self) -> bool:
        """Whether mixup or cutmix mix the images of a micro-batch in pairs."""
        return self.augment.mixes


# linprobe


@dataclass
class ProbeModelConfig(EncoderConfig):
    """A frozen encoder and the linear layer on it (paper Table 10)."""

    pool: Literal["mean", "token"] = "token"
    """What is classified: the mean of the patches' features, or the class token's."""
    crop_ratio: ShareAbove0 | None = None
    """Share of the short side that evaluation's centre crop covers; null: 0.875 up to 224 pixels,
    1.0 above."""


@dataclass
class ProbeAugmentConfig:
    """RandomResizedCrop and flip only (paper Table 10)."""

    crop: Literal["random", "clipped"] = "random"
    """random: a RandomResizedCrop; clipped: the authors' one for probing, whose first box counts,
    clipped to the image."""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""


@dataclass
class ProbeTrainConfig(TrainConfig):
    """Length, batch, precision, memory."""

    epochs: From1 = 90
    """Epochs of the whole schedule; the learning rate follows it."""
    global_batch_size: From1 = 16384
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch_size: From1 = changeable(512)
    """Images per rank and forward pass; the probe's BatchNorm sees so many at a time."""
    validate_epochs: From1 = changeable(1)
    """Epochs between two validations on data.val; the last epoch has one, too."""


@dataclass
class LarsConfig(OptimizerConfig):
    """LARS and the learning-rate rule (paper Table 10)."""

    optimizer: ClassVar[Literal["adamw", "lars"]] = "lars"
    max_zero_stage: ClassVar[int] = 0  # ZeRO cuts the matrices whose norms LARS needs

    base_lr: AtLeast0 = 0.1
    """Learning rate for 256 images; the peak is base_lr x global_batch_size / 256."""
    warmup_epochs: AtLeast0 = 10
    """Epochs of linear warm-up from 0."""
    weight_decay: AtLeast0 = 0.0
    """Weight decay of matrices; biases have none."""
    momentum: ShareBelow1 = 0.9
    """Momentum of the step."""


@dataclass
class LinprobeConfig(RunConfig):
    """Linear probing: a linear classifier on a frozen encoder (paper Table 10)."""

    has_batch_statistics: ClassVar[bool] = True  # of the BatchNorm before the linear layer

    task: Literal["linprobe"] = "linprobe"
    weights: str | None = None
    """Encoder to probe: a run folder of pretrain or finetune or a step folder in it, a .pth of the
    authors, a .safetensors, or a folder of timm or Hugging Face; null: a random one."""
    model: ProbeModelConfig = field(default_factory=ProbeModelConfig)
    augment: ProbeAugmentConfig = field(default_factory=ProbeAugmentConfig)
    train: ProbeTrainConfig = field(default_factory=ProbeTrainConfig)
    optim: LarsConfig = field(default_factory=LarsConfig)
    deepspeed: str = changeable("zero0")
    """DeepSpeed config of stage 0: LARS needs the norms of whole matrices."""
