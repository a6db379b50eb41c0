"""The configs of fine-tuning, training from scratch and linear probing (paper Tables 9 to 11)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mae_scale.config.keys import Section
from mae_scale.config.sections import (
    BandedConfig,
    OptimConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from mae_scale.config.value_types import (
    AtLeast0,
    Changeable,
    From1,
    Pair,
    Share,
    ShareAbove0,
    ShareBelow1,
    Text,
)


class ClassifierConfig(BandedConfig):
    """The encoder of a masked autoencoder and a classification head (paper Appendix A.1)."""

    pool: Literal["mean", "token"] = "mean"
    """Features that are classified: the mean of the patches' features, or the class token's."""
    head: Literal["linear", "mlp"] = "linear"
    """Head that classifies the features: linear is one linear layer; mlp has one hidden layer of
    the encoder's width before it."""
    drop_path: ShareBelow1 = 0.0
    """Rate of stochastic depth in the last block; it rises linearly from 0 in the first one."""
    crop_ratio: ShareAbove0 | None = None
    """Share of the short side that evaluation's centre crop covers; null: 0.875 up to 224 pixels,
    1.0 above."""


class AugmentConfig(Section):
    """Random changes of training images (paper Tables 9 and 11)."""

    crop_scale: Pair[ShareAbove0] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""
    hflip: bool = True
    """Whether half of the images are mirrored, left to right."""
    color_jitter: Share = 0.0
    """Strength of random changes of brightness, contrast and saturation, 0 to 1; 0: none."""
    rand_augment: Text | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's spelling; null: none."""
    mixup: AtLeast0 = 0.8
    """Alpha of mixup; 0: none. If cutmix is on too, one of both is drawn for each micro-batch."""
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


class FinetuneTrainConfig(TrainConfig):
    """Length, batch, precision, memory, and what is trained."""

    epochs: From1 = 100
    global_batch_size: From1 = 1024
    tune_blocks: AtLeast0 | None = None
    """Number of last blocks that are trained besides the head (paper Figure 9): 0, 0.5 (the last
    block's MLP), 1, 2, ...; null: the whole model is trained."""
    class_weights: Literal["balanced"] | list[AtLeast0] | None = None
    """Weight of each class in the loss: a list in the order of the labels, or balanced, which lets
    each class count as much as any other, however many images it has; null: all 1."""
    validate_epochs: Changeable[From1] = 1
    """Epochs between two validations on data.val; the last epoch has one, too."""


class FinetuneOptimConfig(OptimConfig):
    """AdamW, the learning-rate rule, layer-wise decay (paper Table 9)."""

    base_lr: AtLeast0 = 5e-4
    min_lr: AtLeast0 = 1e-6
    warmup_epochs: AtLeast0 = 5
    betas: Pair[ShareBelow1] = (0.9, 0.999)
    layer_decay: ShareAbove0 = 1.0
    """Factor of the learning rate from each layer to the one before it; 1: the same for all."""
    ema_decay: ShareBelow1 | None = None
    """Decay per step of a moving average of the weights, which is kept in fp32 and validated, too;
    null: no average (paper Table 11)."""

    @property
    def kinds_without_decay(self) -> tuple[str, ...]:
        """Kinds of parameters that are not decayed: biases, norms, positions, the class token."""
        return (*super().kinds_without_decay, "position", "class_token")

    @property
    def rate_per_layer(self) -> float:
        """Factor of the learning rate from each layer to the one before it."""
        return self.layer_decay

    @property
    def average_decay(self) -> float | None:
        """Decay per step of the moving average of the weights; None: there is none."""
        return self.ema_decay


class FinetuneConfig(RunConfig):
    """Classification, from pre-trained weights or from scratch (paper Tables 9 and 11)."""

    task: Literal["finetune"] = "finetune"
    model: ClassifierConfig = Field(default_factory=ClassifierConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    train: FinetuneTrainConfig = Field(default_factory=FinetuneTrainConfig)
    optim: FinetuneOptimConfig = Field(default_factory=FinetuneOptimConfig)
    new_head: bool = False
    """Whether to start with a new head, and a new LayerNorm before it, even if the weights have
    them."""

    @property
    def mixes_pairs(self) -> bool:
        """Whether mixup or cutmix mix the images of a micro-batch in pairs."""
        return self.augment.mixes


class ProbeModelConfig(BandedConfig):
    """A frozen encoder and the linear layer on it (paper Table 10)."""

    pool: Literal["mean", "token"] = "token"
    """Features that are classified: the mean of the patches' features, or the class token's."""
    crop_ratio: ShareAbove0 | None = None
    """Share of the short side that evaluation's centre crop covers; null: 0.875 up to 224 pixels,
    1.0 above."""


class ProbeAugmentConfig(Section):
    """RandomResizedCrop and flip only (paper Table 10)."""

    crop: Literal["random", "clipped"] = "random"
    """Kind of crop: random is a RandomResizedCrop; clipped is the authors' crop for probing, which
    takes the first box that is drawn and clips it to the image."""
    crop_scale: Pair[ShareAbove0] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""


class ProbeTrainConfig(TrainConfig):
    """Length, batch, precision, memory."""

    epochs: From1 = 90
    global_batch_size: From1 = 16384
    micro_batch_size: Changeable[From1] = 512
    """Images per rank and forward pass; the statistics of the probe's BatchNorm are those of the
    micro-batches of all ranks."""
    validate_epochs: Changeable[From1] = 1
    """Epochs between two validations on data.val; the last epoch has one, too."""


class LarsConfig(OptimizerConfig):
    """LARS and the learning-rate rule (paper Table 10)."""

    optimizer: ClassVar[str] = "lars"
    max_zero_stage: ClassVar[int] = 0  # ZeRO cuts up the matrices whose norms LARS needs

    base_lr: AtLeast0 = 0.1
    warmup_epochs: AtLeast0 = 10
    weight_decay: AtLeast0 = 0.0
    """Weight decay of matrices; biases have none."""
    momentum: ShareBelow1 = 0.9
    """Momentum of LARS: the share of the last step that goes into the next one."""


class LinprobeConfig(RunConfig):
    """Linear probing: a linear classifier on a frozen encoder (paper Table 10)."""

    has_batch_statistics: ClassVar[bool] = True  # a BatchNorm stands before the linear layer

    task: Literal["linprobe"] = "linprobe"
    weights: Text | None = None
    """Encoder to probe: a run folder of pretrain or finetune, a step folder in one, a .pth of the
    authors, a .safetensors, or a folder of timm or Hugging Face; null: a random encoder."""
    model: ProbeModelConfig = Field(default_factory=ProbeModelConfig)
    augment: ProbeAugmentConfig = Field(default_factory=ProbeAugmentConfig)
    train: ProbeTrainConfig = Field(default_factory=ProbeTrainConfig)
    optim: LarsConfig = Field(default_factory=LarsConfig)
    deepspeed: Changeable[Text] = "zero0"
    """DeepSpeed config of stage 0: LARS needs the norms of whole matrices."""
