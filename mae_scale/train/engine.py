"""The DeepSpeed engine: a JSON from ds_configs/ with every "auto" filled in from the recipe."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hjson
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch import nn

from mae_scale.config import FinetuneOptimConfig, LarsConfig, OptimConfig, TrainConfig, flatten
from mae_scale.errors import UserError
from mae_scale.train.distributed import World, on_rank0
from mae_scale.train.ds import (
    DeepSpeedBF16Config,
    DeepSpeedConfig,
    DeepSpeedConfigError,
    DeepSpeedEngine,
    deepspeed,
)
from mae_scale.train.optimizers import inner_optimizer, keep_moving_average, make_optimizer

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

    As for DeepSpeed itself, comments and trailing commas may be in it.

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
        config = hjson.loads(path.read_text(), object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise UserError(f"deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {path} is not a JSON object")
    return config


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key '{key}' stands twice in one object")
    return dict(pairs)


# Sections of DeepSpeed's whose work is done by the recipe or this program, and by what.
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

# Other spellings that DeepSpeed takes.
SPELLINGS = {"float32": "fp32", "torch.float32": "fp32", "bfloat16": "bf16"}


def fill_deepspeed_config(
    name: str, train: TrainConfig, world: World, precision: str
) -> dict[str, Any]:
    """The DeepSpeed config of a run: "auto" and missing keys come from the recipe.

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
    decided: dict[str, tuple[object, str]] = {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "the accumulation that follows from it"),
        "gradient_clipping": (0.0, "the recipe's gradient clipping"),
        "bf16.enabled": (precision == "bf16", f"train.precision {precision}"),
        "communication_data_type": (train.grad_reduce, "train.grad_reduce"),
        "data_types.grad_accum_dtype": ("fp32", "the sum of gradients, which is fp32"),
        "zero_force_ds_cpu_optimizer": (False, "the recipe's AdamW, which is PyTorch's"),
    }
    fixed: dict[str, tuple[object, str]] = {  # not filled in: not every DeepSpeed has them
        "bf16.bf16_master_weights_and_grads": (False, "the recipe's fp32 master weights"),
        "bf16.bf16_optimizer_states": (False, "the recipe's fp32 optimiser states"),
        "gradient_allreduce_op": ("mean", "the loss, a mean over the global batch"),
    }
    if precision == "bf16" and "check_grad_overflow" in DeepSpeedBF16Config.model_fields:
        # The check asks the device at each step; StepGuard does without.
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
    if stage == 0:  # DeepSpeed knows no other there; `_sum_in_fp32` does it
        config["data_types"]["grad_accum_dtype"] = precision
    _check_with_deepspeed(config, name)
    return config


def _is_on(section: Any) -> bool:
    """Whether a section, or a value in it, asks for anything."""
    if not isinstance(section, dict):
        return section not in (None, False, 0, "", "auto")
    if "enabled" in section:
        return _is_on(section["enabled"])
    return any(_is_on(value) for value in section.values())


def _check_with_deepspeed(config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed read it, so that a key it does not know is found before anything is made."""
    # Its world size is 1 as long as no process group is there; without this key it fits any.
    alone = {key: value for key, value in config.items() if key != "train_batch_size"}
    try:
        DeepSpeedConfig(alone)
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        text = " ".join(str(error).split()).split(" For further information")[0]
        raise UserError(f"deepspeed: DeepSpeed refuses {name}: {text}") from None


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a filled-in DeepSpeed config, 0 to 3."""
    return config["zero_optimization"]["stage"]


def fill_in(
    model: nn.Module,
    seed: int,
    deepspeed_config: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Give initial weights to a model that was made on the meta device; all ranks call.

    They follow from the seed, whatever the ZeRO stage. Under stage 3 each module is sharded as
    soon as it has its weights, so that no rank but 0 ever holds the whole model.

    Args:
        model: has a method `initialize_module` that sets the parameters of one of its modules.
        weights: on rank 0, fp32 values of some parameters and buffers that count instead.
    """
    torch.manual_seed(seed)
    deepspeed.init_distributed(dist_init_required=False)  # takes over the group that is there
    given = on_rank0(lambda: set(weights or ()))
    for prefix, module in model.named_modules():
        module.to_empty(device="cpu", recurse=False)
        model.initialize_module(module)  # type: ignore[operator]
        own = list(module.parameters(recurse=False))
        for name, value in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            key = f"{prefix}.{name}" if prefix else name
            if key in given:
                if weights:
                    value.data.copy_(weights[key])
                dist.broadcast(value.data, src=0)
        if own and zero_stage(deepspeed_config) == 3:
            if deepspeed_config["bf16"]["enabled"]:
                for parameter in own:
                    parameter.data = parameter.data.bfloat16()
            deepspeed.zero.Init(nn.ParameterList(own), config_dict_or_path=deepspeed_config)


def build_engine(
    model: nn.Module, optim: OptimConfig | LarsConfig, deepspeed_config: dict[str, Any]
) -> DeepSpeedEngine:
    """Wrap a model with its optimiser, sharded as the config says.

    The learning rate is set by the loop at each step.
    """
    stage = zero_stage(deepspeed_config)
    optimizer = make_optimizer(model, optim, stage)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    if stage == 3:
        # Gather a block's weights at once, not layer by layer: fewer and larger messages, and
        # nothing of DeepSpeed's happens inside of a compiled block.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
    )
    # Under stage 0 in bf16 DeepSpeed 0.19 takes a trial step with zero gradients to make AdamW's
    # state, and leaves it counted: the bias correction would be that of one step later.
    for state in inner_optimizer(engine).state.values():
        if "step" in state:
            state["step"].zero_()
    for name, value in model.named_buffers():  # DeepSpeed has cast them: bf16 loses statistics
        value.data = buffers[name].to(value.device)
    if stage == 0 and engine.bfloat16_enabled():
        _sum_in_fp32(engine)
    if isinstance(optim, FinetuneOptimConfig) and optim.ema_decay is not None:
        keep_moving_average(engine, optim.ema_decay)
    return engine


def _sum_in_fp32(engine: DeepSpeedEngine) -> None:
    """Sum the gradients of micro-batches in fp32 where each parameter's `grad` is bf16.

    The sum is rounded once, to the bf16 that stage 0 reduces and gives to the optimiser.
    """
    if engine.gradient_accumulation_steps() == 1:
        return
    sums: dict[nn.Parameter, torch.Tensor] = {}

    def take(parameter: nn.Parameter) -> None:
        grad = parameter.grad
        assert grad is not None
        total = sums.pop(parameter).add_(grad) if parameter in sums else grad.float()
        if engine.is_gradient_accumulation_boundary():
            parameter.grad = total.to(grad.dtype)
        else:
            sums[parameter] = total
            parameter.grad = None

    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(take)


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer blocks in place: one graph serves all blocks of a shape.

    Only what is within a block's hooks, where ZeRO-3 gathers and releases weights, is compiled.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = torch.compile(module.forward, dynamic=False)  # type: ignore[method-assign]
