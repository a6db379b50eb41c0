"""Access to the private state of a DeepSpeed engine, for which DeepSpeed 0.19 has no public way.

When an upgrade of DeepSpeed changes one of its attributes, this module is to be adapted. The
optimiser that steps is PyTorch's; DeepSpeed wraps it. It steps on masters, fp32 tensors of this
rank:

- stage 0 in fp32: the parameters themselves;
- stage 0 in bf16: a copy of each parameter;
- stages 1 and 2: this rank's share of each group, flat, into which DeepSpeed links the parameters;
- stage 3: this rank's share of each sub-group, flat; a parameter is gathered to be set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm

from mae_scale.train.ds import DeepSpeedEngine, FP16_UnfusedOptimizer, deepspeed

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # attributes of the engine


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """Return PyTorch's optimiser, from behind DeepSpeed's wrapper if there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def masters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Return the fp32 tensors of this rank that the optimiser steps on."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in inner_optimizer(engine).param_groups for p in group["params"]]


def grad_norm(engine: DeepSpeedEngine) -> torch.Tensor | None:
    """Return the L2 norm, over all ranks, of the gradient that is being applied: a scalar.

    At stage 0 in fp32 DeepSpeed neither wraps the optimiser nor computes the norm: None.
    """
    if engine.optimizer is inner_optimizer(engine):
        return None
    return torch.as_tensor(engine.optimizer._global_grad_norm, device=engine.device)


def keep_gradients_of_one_process(engine: DeepSpeedEngine) -> None:
    """Let stage 0 leave the gradients where they are if there is only one process.

    DeepSpeed would copy them into a bucket, sum them over the one rank, and copy them back. That
    takes a good part of the time of AdamW's step, and changes no bit.
    """
    alone = engine.world_size == 1 and engine.gradient_predivide_factor() == 1
    if alone and engine.communication_data_type == torch.float32:  # others would be rounded
        engine._reduce_non_expert_gradients = lambda gradients, elements_per_buffer: None


def wait_before_gathering(engine: DeepSpeedEngine) -> None:
    """Let ZeRO 3 gather the weights of a forward pass only after all earlier work on the device.

    DeepSpeed gathers them on a stream that does not wait for the optimiser's step by itself.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    stream = coordinator._PartitionedParameterCoordinator__allgather_stream
    accelerator = deepspeed.get_accelerator()

    def wait(module: nn.Module, inputs: Any) -> None:
        stream.wait_stream(accelerator.current_stream())

    if not accelerator.resolves_data_dependency():
        engine.module.register_forward_pre_hook(wait, prepend=True)


def step_without_reads(engine: DeepSpeedEngine) -> None:
    """Make stage 0 in bf16 step without waiting for a value from the device.

    DeepSpeed's wrapper checks each parameter's gradient for overflow and adds up the norms on the
    host. Here `nonfinite.StepGuard` decides on the device whether a step is applied. Weights and
    moments get the bits of DeepSpeed's own step, and checkpoints are the same, too.
    """
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.optimizer.__class__ = _UncheckedMasters


class _UncheckedMasters(FP16_UnfusedOptimizer):
    """DeepSpeed's wrapper of stage 0 in bf16, without its checks for overflow."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> bool:
        """Step on the fp32 masters with the bf16 gradients, and round the masters to bf16."""
        low = [p for group in self.fp16_groups for p in group]
        high = [p for group in self.fp32_groups for p in group]
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in low]
        grads = [torch.empty_like(p) for p in high]
        torch._foreach_copy_(grads, given)
        for master, grad in zip(high, grads, strict=True):
            master.grad = grad
        self._global_grad_norm = get_total_norm(grads)
        self._update_scale(False)  # counts the step; DeepSpeed saves the count
        self.optimizer.step()
        for master in high:
            master.grad = None
        torch._foreach_copy_(low, high)
        return False


def layout(engine: DeepSpeedEngine) -> str:
    """Return a fingerprint of how parameters lie in the optimiser's groups: 16 hexadecimal digits.

    Two engines of the same world size, stage and precision can read each other's files only if
    their fingerprints are equal. `sub_group_size`, `round_robin_gradients` and the optimiser's
    groups change it.
    """
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    name_of = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups: Iterable[Iterable[torch.Tensor]]
    if stage == 3:
        groups = wrapper.fp16_groups
    elif stage > 0:
        groups = wrapper.round_robin_bit16_groups
    elif hasattr(wrapper, "fp16_groups"):
        groups = wrapper.fp16_groups
    else:
        groups = [group["params"] for group in wrapper.param_groups]
    content = {
        "groups": [[name_of[id(parameter)] for parameter in group] for group in groups],
        "masters": [master.numel() for master in masters(engine)],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def own_share(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of a value under ZeRO 3: flat, padded with zeros, and a copy.

    Args:
        parameter: parameter that ZeRO 3 has cut.
        value: whole value, of any shape.
    """
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank = dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    share = value.new_zeros(size)
    mine = value.flatten()[size * rank :][:size]
    share[: len(mine)].copy_(mine)
    return share


def keep_given(engine: DeepSpeedEngine, given: dict[nn.Parameter, torch.Tensor]) -> None:
    """Put the weights that a bf16 engine was built from into its masters, without rounding.

    DeepSpeed casts the weights first, and copies the masters from the cast ones. A frozen parameter
    has no master; `engine.frozen` keeps its value by name, for checkpoints.

    Args:
        engine: engine that was just built, in bf16.
        given: weights of the parameters, fp32: whole ones, under ZeRO 3 shares of this rank.
    """
    state, stage = EngineState(engine), engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        value = given[parameter]
        if parameter.requires_grad:
            if stage == 3:
                deepspeed.utils.safe_set_local_fp32_param(parameter, value)
            else:
                state.set_master(parameter, value)
        elif stage == 3 or engine.global_rank == 0:  # rank 0 saves what is not sharded
            engine.frozen[name] = value.float()


class FrozenWeights:
    """The frozen weights of a bf16 engine in checkpoints: the given ones, not their bf16 copies.

    Args:
        values: attribute `frozen` of the engine.
    """

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self._values = values

    def put_into(self, state: dict[str, Any]) -> None:
        """Replace the bf16 copies in what DeepSpeed saves to a file."""
        for place, name, value in self._found(state):
            place[name] = value

    def take_from(self, state: dict[str, Any]) -> None:
        """Take the values from what DeepSpeed has saved to a file."""
        for place, name, value in self._found(state):
            value.copy_(place[name])

    def _found(self, state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
        # Under ZeRO 3 the fragments are this rank's shares, and the module's weights are empty.
        for key in ("module", "frozen_param_fragments"):
            place = state.get(key) or {}
            for name, value in self._values.items():
                if name in place and place[name].numel() == value.numel():
                    yield place, name, value


class EngineState:
    """Reads and sets the whole value of each parameter, at any stage; all ranks call alike.

    Args:
        engine: engine between two steps.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine, self._wrapper = engine, engine.optimizer
        self._inner = inner_optimizer(engine)
        self._stage = engine.zero_optimization_stage()
        self._master_of: dict[int, torch.Tensor] = {}
        if self._stage in (1, 2):
            self._link()
        elif self._stage == 0 and hasattr(self._wrapper, "fp16_groups"):
            low = (p for group in self._wrapper.fp16_groups for p in group)
            high = (p for group in self._wrapper.fp32_groups for p in group)
            self._master_of = {id(a): b for a, b in zip(low, high, strict=True)}

    def _link(self) -> None:
        """Link the parameters to the present states; DeepSpeed may still hold older ones."""
        self._wrapper._hp_optimizer_states_linked = False
        self._wrapper._lazy_init_hp_params_optimizer_state()

    def _master(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the master of a parameter at stage 0; it may be the parameter itself."""
        return self._master_of.get(id(parameter), parameter)

    def make_states(self, keys: Iterable[str], step: float | None) -> None:
        """Give every master states of zeros under `keys`, and `step` as its count unless None."""
        for master in masters(self._engine):
            state = {key: torch.zeros_like(master, requires_grad=False) for key in keys}
            if step is not None:
                state["step"] = torch.tensor(step, dtype=torch.float32, device=master.device)
            self._inner.state[master] = state
        if self._stage in (1, 2):
            self._link()

    def release(self) -> None:
        """Release the weights that stage 3 has gathered or is gathering, so that they can be set.

        A forward pass ends with some on their way, for a backward pass that validation has not.
        """
        if self._stage == 3:
            self._wrapper._partition_all_parameters()

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a copy of the weight of the forward pass; under ZeRO, of its fp32 master."""
        if self._stage > 0:
            return deepspeed.utils.safe_get_full_fp32_param(parameter)
        return parameter.detach().clone()

    def set_weight(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set the weight that the forward pass uses, and not its master.

        At stage 3 the value of rank 0 counts, and `release` comes first.
        """
        if self._stage < 3:
            parameter.data.copy_(value)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self._engine.global_rank == 0:
                parameter.data.copy_(value.view_as(parameter))

    def set_frozen(self, name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set a frozen parameter, and the unrounded value that checkpoints hold of it."""
        self.set_weight(parameter, value)
        kept = self._engine.frozen.get(name)
        if kept is not None:
            kept.copy_(own_share(parameter, value) if self._stage == 3 else value)

    def set_master(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set the master that the optimiser steps on, and not the weight of the forward pass."""
        self._set(parameter, None, value)

    def state(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """Return the whole state of a trained parameter under a key such as `exp_avg`."""
        if self._stage > 0:
            return deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        return self._inner.state[self._master(parameter)][key]

    def set_state(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set the whole state of a trained parameter under a key that `make_states` was given."""
        self._set(parameter, key, value)

    def _set(self, parameter: nn.Parameter, key: str | None, value: torch.Tensor) -> None:
        if self._stage == 0:
            master = self._master(parameter)
            (master.data if key is None else self._inner.state[master][key]).copy_(value)
        elif self._stage < 3:
            parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
        else:
            share, _ = self._wrapper._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            mine = value.flatten()[share.numel() * self._engine.global_rank :][: share.numel()]
            share.data.zero_()  # the last rank's share may be padded
            share.data[: mine.numel()].copy_(mine)
