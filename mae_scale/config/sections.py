"""The sections of a config and its keys, with what each key means and its default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mae_scale.world import data_workers


@dataclass
class ModelConfig:
    """The masked autoencoder (paper section 3)."""

    name: str = "mae_vit_base_patch16"
    """Architecture: mae_vit_{base,large}_patch16, mae_vit_huge_patch14 or mae_vit_tiny_patch16."""
    img_size: int = 224
    """Side of the square input image, in pixels; a multiple of the patch size."""
    patch_size: int | None = None
    """Side of a patch, in pixels; null takes the one in the model's name."""
    mask_ratio: float = 0.75
    """Share of the patches that is removed, between 0 and 1 (paper Figure 5)."""
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
    pca_components: int = 96
    """Coefficients of the target pca; the components are those of the run's first 2048 images."""
    tokenizer: str | None = None
    """File of the tokenizer for the target tokens: a TorchScript module (.pt), or a .safetensors
    of DALL-E's dVAE encoder."""
    vocabulary_size: int = 8192
    """Number of different ids that the tokenizer gives."""
    embed_dim: int | None = None
    """Width of the encoder, in channels; null takes the architecture's."""
    depth: int | None = None
    """Blocks of the encoder; null takes the architecture's."""
    decoder_embed_dim: int | None = None
    """Width of the decoder, in channels; null takes the architecture's (paper Table 1b)."""
    decoder_depth: int | None = None
    """Blocks of the decoder; null takes the architecture's (paper Table 1a)."""

    def build_kwargs(self) -> dict[str, Any]:
        """What `build_mae` gets: the architecture's own values where a key is null."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if v is not None and k != "tokenizer"}


@dataclass
class DataConfig:
    """Shards and how they are read."""

    train: str
    """Folder of training shards, as written by data_prep/shard_imagenet.py."""
    val: str | None = None
    """Folder of validation shards; null: no validation. Pre-training draws pictures of some."""
    workers: int = field(default_factory=data_workers)
    """Data-loading processes per rank, by default one less than its CPUs, 16 at the most; 0 loads
    in the training process itself."""
    lanes: int = 256
    """Number of places in the dataset that are read at the same time; part of the sample order."""
    window: int = 2048
    """Samples of a lane that are shuffled together; part of the sample order."""
    cache_dir: str | None = None
    """Folder on a local disk into which remote shards are staged; needed for those only."""
    cache_gb: float = 200.0
    """Size limit of cache_dir, in gigabytes (1e9 bytes); the least recently used shard goes."""
    max_bad_fraction: float = 1e-4
    """Share of samples that may be damaged, each replaced by another one, before the run ends."""


@dataclass
class TrainConfig:
    """Length, batch, precision, memory."""

    epochs: int = 1600
    """Epochs of the whole schedule; the learning rate follows it."""
    max_steps: int | None = None
    """Ends the run after this many optimiser steps, without changing the learning rate."""
    global_batch_size: int = 4096
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch_size: int = 64
    """Images per rank and forward pass; accumulation steps follow from the global batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of weights and activations; master weights are fp32. auto: bf16 on GPUs, fp32 on CPUs."""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over the ranks; bf16 halves what is sent."""
    activation_checkpointing: Literal["none", "full"] | int = "none"
    """Blocks whose activations are recomputed in the backward pass: none, full, or every k-th."""
    activation_offload: bool = False
    """Whether the inputs of recomputed blocks, all that is kept of them, wait in host memory."""
    compile: bool = False
    """Whether the blocks are compiled with torch.compile."""
    max_bad_steps: int = 10
    """Optimiser steps in a row with a loss or gradient that is not finite, before the run ends."""
    log_every: int = 20
    """Optimiser steps between two rows of metrics.jsonl."""
    hang_timeout: float = 1800.0
    """Seconds without any progress after which a run ends, naming the rank that hangs."""
    profile: str | None = None
    """Optimiser steps START-STOP, both included, whose trace is written; null: none."""


@dataclass
class PretrainTrainConfig(TrainConfig):
    """Length, batch, precision, memory, pictures."""

    reconstruct_every: int | None = 5000
    """Optimiser steps between two pictures of what becomes of the same eight images, those of
    data.val if it is given; the last step has one, too; null: none."""


@dataclass
class OptimConfig:
    """AdamW and the learning-rate rule (paper Table 8)."""

    base_lr: float = 1.5e-4
    """Learning rate for 256 images; the peak is base_lr x global_batch_size / 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the half-cycle cosine."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""


@dataclass
class CheckpointConfig:
    """When the run is saved and what is kept."""

    every_steps: int | None = None
    """Optimiser steps between two checkpoints; null: by time only."""
    every_minutes: float | None = 30.0
    """Minutes between two checkpoints; null: by steps only."""
    keep: int = 3
    """Number of newest checkpoints kept."""
    background_gb: float | None = 0.25
    """Gigabytes (1e9 bytes) of a rank's state from which on files are written while training goes
    on, from a copy in host memory, and not before the next step; null: never."""
    milestone_epochs: int | None = None
    """Also save at, and keep for good, the end of every so many epochs; null: none."""


@dataclass
class PretrainAugmentConfig:
    """What makes training images vary (paper Table 1e); by default a random crop and a flip."""

    crop: Literal["none", "fixed", "random"] = "random"
    """none: the centre, without a flip; fixed: a square of fixed size somewhere, covering 0.875 of
    the short side; random: a RandomResizedCrop."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""
    color_jitter: float = 0.0
    """Strength of random changes of brightness, contrast and saturation, 0 to 1; 0: none."""


@dataclass
class PretrainConfig:
    """Pre-training of a masked autoencoder (paper section 3, Table 8)."""

    run_dir: str
    """Folder of the run: config, metrics, checkpoints. The same folder goes on where it stopped."""
    data: DataConfig
    weights: str | None = None
    """What to start from: a run folder of pretrain or finetune or a step folder in it, a .pth of
    the authors, a .safetensors, or a folder of timm or Hugging Face; null: from scratch."""
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: PretrainAugmentConfig = field(default_factory=PretrainAugmentConfig)
    train: PretrainTrainConfig = field(default_factory=PretrainTrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deepspeed: str = "zero1"
    """DeepSpeed config: zero0, zero1, zero2, zero3, zero3_offload, or the path of a JSON file."""
    seed: int = 0
    """Decides sample order, crops, masks and initial weights."""
    replay: int | None = None
    """Run this optimiser step of the run again, alone, and show the first value that is not finite.
    Nothing is written."""


@dataclass
class ClassifierConfig:
    """The encoder of a masked autoencoder and a classification head (paper Appendix A.1)."""

    name: str = "mae_vit_base_patch16"
    """The masked autoencoder whose encoder it is: mae_vit_{tiny,small,base,large}_patch16 or
    mae_vit_huge_patch14."""
    img_size: int = 224
    """Side of the square input image, in pixels; a multiple of the patch size."""
    patch_size: int | None = None
    """Side of a patch, in pixels; null takes the one in the model's name."""
    embed_dim: int | None = None
    """Width of the encoder, in channels; null takes the architecture's."""
    depth: int | None = None
    """Blocks of the encoder; null takes the architecture's."""
    pool: Literal["mean", "token"] = "mean"
    """What is classified: the mean of the patches' features, or the class token's."""
    head: Literal["linear", "mlp"] = "linear"
    """One linear layer, or an MLP with one hidden layer of the encoder's width."""
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block; it rises linearly from 0 in the first one."""
    crop_ratio: float | None = None
    """Share of the short side that evaluation's centre crop covers; null: 0.875 up to 224 pixels,
    1.0 above."""

    def build_kwargs(self) -> dict[str, Any]:
        """What `build_classifier` gets: the architecture's own values where a key is null."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if v is not None and k != "crop_ratio"}


@dataclass
class AugmentConfig:
    """What makes training images vary (paper Tables 9 and 11)."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's spelling; null: none."""
    mixup: float = 0.8
    """Alpha of mixup; 0: none. Where both are on, each micro-batch draws mixup or cutmix."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0: none."""
    erasing: float = 0.25
    """Share of the images in which a rectangle becomes noise (random erasing)."""
    label_smoothing: float = 0.1
    """Probability mass of the target that is spread over all classes."""


@dataclass
class FinetuneTrainConfig(TrainConfig):
    """Length, batch, precision, memory, and what is trained."""

    epochs: int = 100
    """Epochs of the whole schedule; the learning rate follows it."""
    global_batch_size: int = 1024
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    tune_blocks: float | None = None
    """Last blocks that are trained besides the head (paper Figure 9): 0, 0.5 (the last block's
    MLP), 1, 2, ...; null: everything."""
    validate_epochs: int = 1
    """Epochs between two validations on data.val; the last epoch has one, too."""


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """AdamW, the learning-rate rule, layer-wise decay (paper Table 9)."""

    base_lr: float = 5e-4
    """Learning rate for 256 images; the peak is base_lr x global_batch_size / 256."""
    min_lr: float = 1e-6
    """Learning rate at the end of the half-cycle cosine."""
    warmup_epochs: float = 5
    """Epochs of linear warm-up from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one before it; 1: the same for all."""
    ema_decay: float | None = None
    """Decay per step of a moving average of the weights, kept in fp32, validated beside them;
    null: none (paper Table 11)."""


@dataclass
class FinetuneConfig:
    """Classification, from pre-trained weights or from scratch (paper Tables 9 and 11)."""

    run_dir: str
    """Folder of the run: config, metrics, checkpoints. The same folder goes on where it stopped."""
    data: DataConfig
    weights: str | None = None
    """What to start from: a run folder of pretrain or finetune or a step folder in it, a .pth of
    the authors, a .safetensors, or a folder of timm or Hugging Face; null: from scratch."""
    new_head: bool = False
    """Whether to start with a new head even if the weights have one."""
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deepspeed: str = "zero1"
    """DeepSpeed config: zero0, zero1, zero2, zero3, zero3_offload, or the path of a JSON file."""
    seed: int = 0
    """Decides sample order, augmentation, dropped paths and initial weights."""
    replay: int | None = None
    """Run this optimiser step of the run again, alone, and show the first value that is not finite.
    Nothing is written."""


@dataclass
class ProbeModelConfig:
    """A frozen encoder and the linear layer on it (paper Table 10)."""

    name: str = "mae_vit_base_patch16"
    """The masked autoencoder whose encoder it is: mae_vit_{tiny,small,base,large}_patch16 or
    mae_vit_huge_patch14."""
    img_size: int = 224
    """Side of the square input image, in pixels; a multiple of the patch size."""
    patch_size: int | None = None
    """Side of a patch, in pixels; null takes the one in the model's name."""
    embed_dim: int | None = None
    """Width of the encoder, in channels; null takes the architecture's."""
    depth: int | None = None
    """Blocks of the encoder; null takes the architecture's."""
    pool: Literal["mean", "token"] = "token"
    """What is classified: the mean of the patches' features, or the class token's."""
    crop_ratio: float | None = None
    """Share of the short side that evaluation's centre crop covers; null: 0.875 up to 224 pixels,
    1.0 above."""

    def build_kwargs(self) -> dict[str, Any]:
        """What `build_classifier` gets: the architecture's own values where a key is null."""
        values = dataclasses.asdict(self)
        kwargs = {k: v for k, v in values.items() if v is not None and k != "crop_ratio"}
        return {**kwargs, "head": "probe"}


@dataclass
class ProbeAugmentConfig:
    """RandomResizedCrop and flip only (paper Table 10)."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""


@dataclass
class ProbeTrainConfig(TrainConfig):
    """Length, batch, precision, memory."""

    epochs: int = 90
    """Epochs of the whole schedule; the learning rate follows it."""
    global_batch_size: int = 16384
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch_size: int = 512
    """Images per rank and forward pass; the probe's BatchNorm sees so many at a time."""
    validate_epochs: int = 1
    """Epochs between two validations on data.val; the last epoch has one, too."""


@dataclass
class LarsConfig:
    """LARS and the learning-rate rule (paper Table 10)."""

    base_lr: float = 0.1
    """Learning rate for 256 images; the peak is base_lr x global_batch_size / 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the half-cycle cosine."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.0
    """Weight decay of matrices; biases have none."""
    momentum: float = 0.9
    """Momentum of the step."""


@dataclass
class LinprobeConfig:
    """Linear probing: a linear classifier on a frozen encoder (paper Table 10)."""

    run_dir: str
    """Folder of the run: config, metrics, checkpoints. The same folder goes on where it stopped."""
    data: DataConfig
    weights: str | None = None
    """Encoder to probe: a run folder of pretrain or finetune or a step folder in it, a .pth of the
    authors, a .safetensors, or a folder of timm or Hugging Face; null: a random one."""
    model: ProbeModelConfig = field(default_factory=ProbeModelConfig)
    augment: ProbeAugmentConfig = field(default_factory=ProbeAugmentConfig)
    train: ProbeTrainConfig = field(default_factory=ProbeTrainConfig)
    optim: LarsConfig = field(default_factory=LarsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deepspeed: str = "zero0"
    """DeepSpeed config of stage 0: LARS needs the norms of whole matrices."""
    seed: int = 0
    """Decides sample order, crops and initial weights."""
    replay: int | None = None
    """Run this optimiser step of the run again, alone, and show the first value that is not finite.
    Nothing is written."""


RunConfig = PretrainConfig | FinetuneConfig | LinprobeConfig
