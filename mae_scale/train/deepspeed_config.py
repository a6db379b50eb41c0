"""The DeepSpeed config of a run: a JSON from ds_configs/, completed from the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, KeysView
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import nn

from mae_scale.config.batch import accumulation_steps
from mae_scale.config.deepspeed import fit_to_model, load_deepspeed_config
from mae_scale.config.identity import flatten
from mae_scale.config.sections import TrainConfig
from mae_scale.errors import UserError, did_you_mean
from mae_scale.train.ds import (
    DeepSpeedBF16Config,
    DeepSpeedConfig,
    DeepSpeedConfigError,
    DeepSpeedConfigModel,
)
from mae_scale.world import World

# Sections of a DeepSpeed config that are not taken, and what decides their subject instead.
DECIDED_ELSEWHERE = {
    "optimizer": "optim.*",
    "scheduler": "optim.* and train.epochs",
    "fp16": "train.precision; fp16 is not offered (it overflows with MAE), bf16 is",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing and train.activation_offload",
    "elasticity": "train.global_batch_size; a run goes on at any world size without it",
    "curriculum_learning": "data.*",
    "data_efficiency": "data.*",
    "progressive_layer_drop": "model.*",
}
# Those that write to other places, send to other machines, or cut samples into pieces.
REFUSED = ("tensorboard", "wandb", "comet", "csv_monitor", "sequence_parallel_size")


_FP32 = " with weights in fp32, which train.autocast or the task asks for"

# Other spellings of a dtype that DeepSpeed takes, and the usual one.
SPELLINGS = {"float32": "fp32", "torch.float32": "fp32", "bfloat16": "bf16"}


def fill_deepspeed_config(
    name: str, train: TrainConfig, world: World, precision: str, *, fp32_weights: bool = False
) -> dict[str, Any]:
    """Return the DeepSpeed config of a run; "auto" and missing keys are filled in by the recipe.

    Args:
        name: name of a file in ds_configs/, or a path.
        train: section `train` of the recipe.
        world: processes of the run.
        precision: "bf16" or "fp32".
        fp32_weights: whether the weights stay fp32 under bf16, and `torch.autocast` computes layers
            in bf16. Detection needs it: bf16 is too coarse for the coordinates of boxes.

    Raises:
        UserError: a setting in the file contradicts the recipe (the message names both), is
            "auto" where the recipe decides nothing, or is one that DeepSpeed refuses.
    """
    config = load_deepspeed_config(name)
    if "bfloat16" in config:
        config.setdefault("bf16", config.pop("bfloat16"))
    for section, instead in DECIDED_ELSEWHERE.items():
        if _is_on(config.pop(section, None)):
            raise UserError(
                f"deepspeed: '{section}' in {name} contradicts the recipe, which decides it by "
                f"{instead}; remove it"
            )
    for section in REFUSED:
        if _is_on(config.pop(section, None)):
            raise UserError(f"deepspeed: '{section}' in {name} is not supported; remove it")
    profiler = config.get("flops_profiler")
    if isinstance(profiler, dict) and profiler.get("output_file") is not None:
        raise UserError(
            f"deepspeed: flops_profiler.output_file in {name} would be written outside of the run "
            "folder; remove it, and the profile is printed"
        )
    for section in ("zero_optimization", "bf16", "data_types"):
        if not isinstance(config.setdefault(section, {}), dict):
            raise UserError(f"deepspeed: {section} in {name} is not a JSON object")
    stage = config["zero_optimization"].get("stage", 0)
    if str(stage) not in ("0", "1", "2", "3"):
        raise UserError(
            f"deepspeed: zero_optimization.stage {json.dumps(stage)} in {name} is not 0, 1, 2 or 3"
        )
    config["zero_optimization"]["stage"] = stage = int(stage)
    accumulation = accumulation_steps(train, world.size)
    bf16_weights = precision == "bf16" and not fp32_weights
    decided: dict[str, tuple[object, str]] = {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "the accumulation that follows from it"),
        "gradient_clipping": (0.0, "optim.clip_grad, which does without DeepSpeed's"),
        "bf16.enabled": (bf16_weights, f"train.precision {precision}{_FP32 * fp32_weights}"),
        "communication_data_type": (train.grad_reduce, "train.grad_reduce"),
        "data_types.grad_accum_dtype": ("fp32", "the sum of gradients, which is fp32"),
        "zero_force_ds_cpu_optimizer": (False, "the recipe's AdamW, which is PyTorch's"),
    }
    fixed: dict[str, tuple[object, str]] = {  # checked only: not every DeepSpeed has them
        "bf16.bf16_master_weights_and_grads": (False, "the recipe's fp32 master weights"),
        "bf16.bf16_optimizer_states": (False, "the recipe's fp32 optimiser states"),
        "gradient_allreduce_op": ("mean", "the loss, a mean over the global batch"),
    }
    # DeepSpeed's throughput timer waits for the device twice in each micro-batch.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    if bf16_weights and "check_grad_overflow" in DeepSpeedBF16Config.model_fields:
        # The check waits for the device at each step; `StepGuard` does not.
        config["bf16"].setdefault("check_grad_overflow", False)
    for key, (value, source) in {**decided, **fixed}.items():
        section, _, leaf = key.rpartition(".")
        place = config[section] if section else config
        found = place.get(leaf, "auto")
        meant = SPELLINGS.get(found, found) if isinstance(found, str) else found
        if meant not in ("auto", value):
            raise UserError(
                f"deepspeed: {key} {json.dumps(found)} in {name} contradicts {source} "
                f'({json.dumps(value)}); write "auto"'
            )
        if key in decided or leaf in place:
            place[leaf] = value
    for key, value in flatten(config).items():
        if value == "auto":
            raise UserError(f'deepspeed: {key} in {name} is "auto", but no recipe decides it')
    if stage == 0:  # DeepSpeed takes no other dtype; see `engine._sum_in_fp32`
        config["data_types"]["grad_accum_dtype"] = "bf16" if bf16_weights else "fp32"
    if precision == "bf16" and fp32_weights:
        # `lower_precision_safe_modules` names the modules whose parameters are gathered, and whose
        # gradients are summed, in bf16; by default these are linear layers and convolutions.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if train.grad_reduce == "fp32":
            config["torch_autocast"]["lower_precision_safe_modules"] = []
    _check_with_deepspeed(config, name)
    return config


def _is_on(section: Any) -> bool:
    """Return whether a section, or a value in it, switches anything on."""
    if not isinstance(section, dict):
        return section not in (None, False, 0, "", "auto")
    if "enabled" in section:
        return _is_on(section["enabled"])
    return any(_is_on(value) for value in section.values())


class _Asked(dict[str, Any]):
    """A JSON object that notes which keys DeepSpeed asks for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(
            (key, _Asked(value) if isinstance(value, dict) else value)
            for key, value in content.items()
        )
        self.keys_asked: set[str] = set()
        self.all_asked = False

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return KeysView(self)  # asks this object

    def __iter__(self) -> Iterator[str]:
        self.all_asked = True  # by `**`, for a pydantic model, which refuses unknown keys itself
        return super().__iter__()

    def __copy__(self) -> _Asked:
        return self

    def check(self, name: str, prefix: str = "") -> None:
        """Raise a UserError that names a key that DeepSpeed did not ask for."""
        for key, value in () if self.all_asked else self.items():
            if key not in self.keys_asked:
                hint = did_you_mean(key, self.keys_asked, "remove it")
                raise UserError(
                    f"deepspeed: DeepSpeed knows no key '{prefix}{key}', which {name} sets; {hint}"
                )
            if isinstance(value, _Asked):
                value.check(name, f"{prefix}{key}.")


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """List a model and all that derive from it."""
    return [model, *(found for derived in model.__subclasses__() for found in _models(derived))]


def _check_with_deepspeed(config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed read the config, so that an unknown key is found before anything is made."""
    # Without a process group DeepSpeed takes the world size to be 1; this key may not fit that.
    alone = _Asked({key: value for key, value in config.items() if key != "train_batch_size"})
    try:
        DeepSpeedConfig(alone)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        text = f"{key}: {first['msg']} ({error.title})"
        if first["type"] == "extra_forbidden":
            last = str(first["loc"][-1])
            known = {
                field for model in _models(DeepSpeedConfigModel) for field in model.model_fields
            }
            hint = did_you_mean(last, known - {last}, "remove it", cutoff=0.7)
            text = f"it knows no key '{key}' ({error.title}); {hint}"
        raise UserError(f"deepspeed: DeepSpeed refuses {name}: {text}") from None
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        text = " ".join(str(error).split()).split(" For further information")[0]
        raise UserError(f"deepspeed: DeepSpeed refuses {name}: {text}") from None
    alone.check(name)


def fit_buckets(
    name: str, config: dict[str, Any], model: nn.Module, world: World
) -> dict[str, Any]:
    """Return a filled-in DeepSpeed config with buckets that fit the model, on a GPU.

    Args:
        name: name of the file in ds_configs/, or a path.
        config: filled-in DeepSpeed config of that file.
        model: model with its frozen parameters set.
        world: processes of the run.
    """
    if world.device.type != "cuda":
        return config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = fit_to_model(name, config["zero_optimization"], trained, world.size)
    return {**config, "zero_optimization": zero}


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a filled-in DeepSpeed config, 0 to 3."""
    return config["zero_optimization"]["stage"]
