"""The DeepSpeed engine: a JSON from ds_configs/ with every "auto" filled in from the recipe."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torch import nn

from mae_scale.config import OptimConfig, TrainConfig, flatten
from mae_scale.errors import UserError
from mae_scale.train.distributed import World
from mae_scale.train.ds import DeepSpeedEngine, deepspeed

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimiser step: global batch / (micro-batch x world size).

    Raises:
        UserError: it is no whole number; the message says which settings would do.
    """
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch < 1 or micro < 1:
        raise UserError(
            f"train.global_batch_size {batch} and train.micro_batch_size {micro} must be positive"
        )
    if batch % (micro * world_size) == 0:
        return batch // (micro * world_size)
    if batch % world_size == 0:
        share = batch // world_size
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        near = min(divisors, key=lambda d: abs(d - micro))
        would = f"train.micro_batch_size {near} would"
    else:
        unit = micro * world_size
        near = max(unit, round(batch / unit) * unit)
        would = f"train.global_batch_size {near} would, or another number of processes"
    raise UserError(
        f"train.global_batch_size {batch} is not a multiple of train.micro_batch_size {micro} x "
        f"{world_size} processes = {micro * world_size}; {would}"
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """bf16 or fp32; `auto` is bf16 on GPUs and fp32 on CPUs."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def load_deepspeed_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON by its name in ds_configs/ or by its path.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    known = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    path = DS_CONFIGS / f"{name}.json" if name in known else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}, or a path"
        raise UserError(f"deepspeed: there is no DeepSpeed config '{name}'; {hint}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {path} is not a JSON object")
    return config


def fill_deepspeed_config(
    name: str, train: TrainConfig, world: World, precision: str
) -> dict[str, Any]:
    """The DeepSpeed config of a run: "auto" and missing keys come from the recipe.

    Raises:
        UserError: a setting in the file contradicts the recipe (the message names both), or is
            "auto" where the recipe decides nothing.
    """
    config = load_deepspeed_config(name)
    for section, instead in (("optimizer", "optim.*"), ("scheduler", "optim.* and train.epochs")):
        if section in config:
            raise UserError(
                f"deepspeed: '{section}' in {name} contradicts the recipe, which decides it by "
                f"{instead}; remove it"
            )
    if config.get("fp16", {}).get("enabled"):
        raise UserError(
            f"deepspeed: fp16.enabled in {name} contradicts train.precision {precision}; "
            "fp16 is not offered (it overflows with MAE), bf16 is"
        )
    accumulation = accumulation_steps(train, world.size)
    decided: dict[str, tuple[object, str]] = {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "the accumulation that follows from it"),
        "gradient_clipping": (0.0, "the recipe's gradient clipping"),
        "bf16.enabled": (precision == "bf16", f"train.precision {precision}"),
    }
    if precision == "bf16":  # StepGuard does it on the device
        config.setdefault("bf16", {}).setdefault("check_grad_overflow", False)
    if zero_stage(config) > 0:  # stage 0 sums in the precision of the weights and knows no other
        decided["data_types.grad_accum_dtype"] = ("fp32", "the sum of gradients in fp32")
    for key, (value, source) in decided.items():
        *sections, leaf = key.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        found = place.get(leaf, "auto")
        if found not in ("auto", value):
            raise UserError(
                f"deepspeed: {key} {json.dumps(found)} in {name} contradicts {source} "
                f'({json.dumps(value)}); write "auto"'
            )
        place[leaf] = value
    for key, value in flatten(config).items():
        if value == "auto":
            raise UserError(f'deepspeed: {key} in {name} is "auto", but no recipe decides it')
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed config, 0 to 3."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def optimizer_order(model: nn.Module, optim: OptimConfig) -> list[str]:
    """Names of the trained parameters in the order of `build_engine`'s optimiser groups."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, optim.weight_decay)
    return [name_of[id(parameter)] for group in groups for parameter in group["params"]]


def build_engine(
    model: nn.Module, optim: OptimConfig, deepspeed_config: dict[str, Any]
) -> DeepSpeedEngine:
    """Wrap a model: AdamW with weight decay on matrices only, sharded as the config says.

    The learning rate is set by the loop at each step.
    """
    groups = param_groups_weight_decay(model, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
    )
    # Under stage 0 in bf16 DeepSpeed 0.19 takes a trial step with zero gradients to make AdamW's
    # state, and leaves it counted: the bias correction would be that of one step later.
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in inner.state.values():
        state["step"].zero_()
    return engine


def compile_blocks(model: nn.Module) -> None:
    """Compile each transformer block in place: one graph, compiled once, serves all of a shape."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
