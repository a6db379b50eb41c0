"""Typed configuration: dataclasses, read from YAML, every key overridable on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from mae_scale.errors import UserError
from mae_scale.world import data_workers

T = TypeVar("T")

RECIPES = Path(__file__).parent / "recipes"

# The attribute docstrings below are what `--help` prints.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


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


AT_LEAST = {
    "seed": 0,
    "replay": 1,
    "data.workers": 0,
    "data.lanes": 1,
    "data.window": 1,
    "train.epochs": 1,
    "train.max_steps": 1,
    "train.max_bad_steps": 1,
    "train.log_every": 1,
    "train.hang_timeout": 10,
    "train.validate_epochs": 1,
    "train.reconstruct_every": 1,
    "optim.warmup_epochs": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "checkpoint.background_gb": 0,
    "checkpoint.milestone_epochs": 1,
}

# What a run may change when it goes on: none of it changes which samples a step sees or the
# learning rate. `data.train` may move as long as its manifest stays the same (checked apart).
MAY_CHANGE = (
    "run_dir",
    "deepspeed",
    "data.train",
    "data.val",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.max_bad_fraction",
    "train.max_steps",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.activation_offload",
    "train.compile",
    "train.max_bad_steps",
    "train.log_every",
    "train.hang_timeout",
    "train.validate_epochs",
    "train.profile",
    "train.reconstruct_every",
    "checkpoint",
    "replay",
)


class _Parser(ArgumentParser):
    """jsonargparse's parser with one-line errors that the command line turns into exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split()).replace("Parser key", "config key")
        text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
        raise UserError(text)


def recipe_names() -> list[str]:
    """Names that `--config` takes besides paths."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse(config_class: type[T], argv: list[str], prog: str) -> T:
    """Build a config from `--config FILE_OR_RECIPE` and `--section.key value` arguments.

    What stands on the command line wins over the file, wherever `--config` stands.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of the wrong type, a
            missing required key, a file that is not there or not YAML.
    """
    parser = _Parser(prog=prog, description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file, or the name of a recipe: {', '.join(recipe_names())}.",
    )
    parser.add_class_arguments(config_class)
    known = _keys(config_class)
    files, rest = _split_config_arguments(argv)
    for file in files:
        _check_known(_yaml_keys(file), known, f" in {file}")
    options = [token[2:].split("=")[0] for token in rest if token.startswith("--")]
    _check_known(options, [*known, "help", "print_config"], "")
    namespace = parser.parse_args([f"--config={file}" for file in files] + rest)
    namespace.pop("config")
    config = config_class(**vars(parser.instantiate(namespace)))
    flat = flatten(dataclasses.asdict(config))  # type: ignore[call-overload]
    for key, least in AT_LEAST.items():
        if flat.get(key) is not None and flat[key] < least:
            raise UserError(f"{key} is {flat[key]}; it must be at least {least}")
    return config


def config_class_of(argv: list[str]) -> type[RunConfig]:
    """Of which task the `--config` files and `--section.key` arguments are: by their keys.

    Raises:
        UserError: a file that is not there or not YAML.
    """
    given = given_keys(argv)
    classes: tuple[type[RunConfig], ...] = (PretrainConfig, FinetuneConfig, LinprobeConfig)
    # A mistyped key is nobody's; the class that knows most of them will name it.
    return max(classes, key=lambda config: sum(key in _keys(config) for key in given))


def given_keys(argv: list[str]) -> set[str]:
    """Keys that the `--config` files and arguments set."""
    files, rest = _split_config_arguments(argv)
    keys = {key for file in files for key in _yaml_keys(file)}
    return keys | {token[2:].split("=")[0] for token in rest if token.startswith("--")}


def _split_config_arguments(argv: list[str]) -> tuple[list[Path], list[str]]:
    """Take the `--config` arguments out of argv, recipe names resolved to their files."""
    files, rest, tokens = [], [], iter(argv)
    for token in tokens:
        if token == "--config" or token.startswith("--config="):
            value = token[9:] if "=" in token else next(tokens, "")
            files.append(_find_config(value))
        else:
            rest.append(token)
    return files, rest


def _find_config(value: str) -> Path:
    for path in (Path(value), RECIPES / f"{value}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(value, recipe_names(), 1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; recipes: {', '.join(recipe_names())}"
    raise UserError(f"--config {value!r} is neither a file nor a recipe{hint}")


def _keys(config_class: Any, prefix: str = "") -> list[str]:
    """Dotted names of all keys of a config class, sections included."""
    keys = []
    for name, hint in get_type_hints(config_class).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += _keys(hint, f"{prefix}{name}.")
    return keys


def _yaml_keys(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no config keys; expected lines such as 'seed: 1'")
    return list(flatten(content))


def _check_known(keys: Iterable[str], known: list[str], where: str) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else "; --help lists the known ones"
            raise UserError(f"unknown config key '{key}'{where}{hint}")


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 1}} as {"train.epochs": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_yaml(config: Any) -> str:
    """The resolved config as YAML, tuples as lists."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False)


def _defaults(config: Any) -> dict[str, Any]:
    """The flat values of a config of this class where nothing is given."""
    plain = type(config)(run_dir="", data=DataConfig(train=""))
    return flatten(yaml.safe_load(as_yaml(plain)))


def differences(old: dict[str, Any], config: Any) -> list[str]:
    """Keys that a run may not change, as lines `key: old -> new`.

    Args:
        old: as in the config.yaml of the run; keys that are newer than it count as their defaults.
        config: the new one.
    """
    before, after = {**_defaults(config), **flatten(old)}, flatten(yaml.safe_load(as_yaml(config)))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not _may_change(key)
    ]


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def identity_hash(config: Any) -> str:
    """SHA-256 over the keys that a run may not change: what makes it this run.

    Defaults are left out, so that a key that joins later leaves the hash of older runs as it was.
    """
    flat, defaults = flatten(yaml.safe_load(as_yaml(config))), _defaults(config)
    identity = {
        key: value
        for key, value in flat.items()
        if not _may_change(key) and value != defaults.get(key)
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
