"""The DeepSpeed engine of a run: initial weights, optimiser and sharding."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch import nn

from mae_scale.config.sections import OptimizerConfig
from mae_scale.launch.distributed import on_rank0
from mae_scale.train.deepspeed_config import zero_stage
from mae_scale.train.deepspeed_state import (
    inner_optimizer,
    keep_given,
    keep_gradients_of_one_process,
    own_share,
    step_without_reads,
    wait_before_gathering,
)
from mae_scale.train.ds import DeepSpeedEngine, deepspeed, restore_linear
from mae_scale.train.fewer_operators import use_fewer_operators
from mae_scale.train.optimizers import keep_moving_average, make_optimizer


def fill_in(
    model: nn.Module,
    seed: int,
    deepspeed_config: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Give initial weights to a model that was made on the meta device; all ranks call.

    The weights follow from the seed, whatever the ZeRO stage. Under stage 3 each module is sharded
    as soon as it has its weights, so that no rank but 0 ever holds the whole model.

    Args:
        model: model whose method `initialize_module` sets the parameters of one of its modules.
        seed: seed of the random weights.
        deepspeed_config: filled-in DeepSpeed config.
        weights: fp32 values by name, on rank 0, that replace the initial ones of some parameters
            and buffers.
    """
    torch.manual_seed(seed)
    _join_group()
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
            _shard(own, deepspeed_config)


def _join_group() -> None:
    """Let DeepSpeed take over the process group that is there."""
    deepspeed.init_distributed(dist_init_required=False)
    # DeepSpeed would make a second group of all ranks, because torch once could not translate the
    # ranks of the first. It would take as many connections again, and have its own time-out.
    deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD


def _shard(own: list[nn.Parameter], deepspeed_config: dict[str, Any]) -> None:
    """Cut parameters as ZeRO 3 does, in bf16 where the config says so; all ranks call.

    The attribute `given` then holds this rank's share before the cast, in fp32 on the CPU.
    """
    whole = [parameter.data for parameter in own]
    if deepspeed_config["bf16"]["enabled"]:
        for parameter in own:
            parameter.data = parameter.data.bfloat16()
    deepspeed.zero.Init(nn.ParameterList(own), config_dict_or_path=deepspeed_config)
    if deepspeed_config["bf16"]["enabled"]:
        for parameter, value in zip(own, whole, strict=True):
            parameter.given = own_share(parameter, value)  # type: ignore[attr-defined]


def build_engine(
    model: nn.Module, optim: OptimizerConfig, deepspeed_config: dict[str, Any]
) -> DeepSpeedEngine:
    """Wrap a model with its optimiser, sharded as the config says.

    `step.Stepper` sets the learning rate at each step.
    """
    stage = zero_stage(deepspeed_config)
    _join_group()
    if stage < 3:
        restore_linear()
    for module in model.modules() if stage == 3 else ():
        whole = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
        if whole:
            _shard(whole, deepspeed_config)
    given = {p: p.__dict__.pop("given", p.data) for p in model.parameters()}
    optimizer = make_optimizer(model, optim)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    if stage == 3:
        # Gather a block's weights at once, not layer by layer: fewer and larger messages, and
        # nothing of DeepSpeed's happens inside of a compiled block.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
        for block in (module for module in model.modules() if isinstance(module, Block)):
            if any(parameter.requires_grad for parameter in block.parameters()):
                block.register_forward_pre_hook(_want_gradient)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
    )
    # Under stage 0 in bf16 DeepSpeed 0.19 takes a trial step with zero gradients to make AdamW's
    # state, and leaves it counted: the bias correction would be that of one step later.
    for state in inner_optimizer(engine).state.values():
        if "step" in state:
            state["step"].zero_()
    for name, value in model.named_buffers():  # DeepSpeed cast them to bf16, too coarse for them
        value.data = buffers[name].to(value.device)
    engine.frozen = {}
    if engine.bfloat16_enabled():
        keep_given(engine, given)
    if stage == 0 and engine.bfloat16_enabled():
        _sum_in_fp32(engine)
        step_without_reads(engine)
    if stage == 0:
        keep_gradients_of_one_process(engine)
    if stage in (1, 2):
        use_fewer_operators(engine.optimizer)
    if stage == 3:
        wait_before_gathering(engine)
    if optim.average_decay is not None:
        keep_moving_average(engine, optim.average_decay)
    return engine


def _want_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the input of a trained block need a gradient, also behind frozen ones.

    DeepSpeed takes the gradients of a leaf module when the backward pass has reached its input.
    Where that needs no gradient, PyTorch calls DeepSpeed before it has computed any.
    """
    x, *others = inputs
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return (x, *others)


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
