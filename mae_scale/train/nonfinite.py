"""Loss or gradient that is not finite: such a step is not applied, and a replay finds the cause."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from mae_scale.errors import RunError
from mae_scale.launch.distributed import gather_to_all
from mae_scale.train.deepspeed_state import grad_norm, inner_optimizer
from mae_scale.train.ds import DeepSpeedEngine

if TYPE_CHECKING:
    from mae_scale.train.step import StepResult

log = logging.getLogger("mae_scale")


class StepGuard:
    """Keeps the optimiser from applying a step whose loss or gradient is not finite.

    The decision is made on the device. Fused AdamW reads a scalar `found_inf`, which torch's
    GradScaler also sets; where it is 1, weights, moments and step count do not change.

    Args:
        engine: engine at any ZeRO stage, whose optimiser reads `found_inf`: fused AdamW or
            `GuardedLars`.
        clip_grad: largest L2 norm of an applied gradient; larger gradients are scaled down to it,
            as by torch's `clip_grad_norm_`. None: gradients are not clipped.
    """

    def __init__(self, engine: DeepSpeedEngine, clip_grad: float | None = None) -> None:
        self._engine, self._device, self._clip_grad = engine, engine.device, clip_grad
        self._loss_is_finite = torch.ones((), dtype=torch.bool, device=self._device)
        self._own_norm: torch.Tensor | None = None  # norm, where DeepSpeed computes none
        inner_optimizer(engine).register_step_pre_hook(self._before_step)

    def watch(self, loss: torch.Tensor) -> None:
        """Take the loss of the coming step: a scalar, the same on all ranks."""
        self._loss_is_finite = torch.isfinite(loss)

    @property
    def grad_norm(self) -> torch.Tensor:
        """L2 norm of the last step's gradient, over all ranks and before clipping: a scalar."""
        norm = grad_norm(self._engine)
        if norm is None:
            assert self._own_norm is not None, "no step has been taken yet"
            norm = self._own_norm
        return norm

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if grad_norm(self._engine) is None:
            self._own_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = self._loss_is_finite & torch.isfinite(self.grad_norm)
        # Under optimiser offload the parameters are on the host.
        device = parameters[0].device
        optimizer.found_inf = (~finite).to(device, torch.float32)
        if self._clip_grad is not None:
            factor = (self._clip_grad / (self.grad_norm.float() + 1e-6)).clamp(max=1)
            grads = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(grads, factor.to(device))


class BadSteps:
    """Counts the steps that were not applied, and ends a run that has too many in a row.

    Args:
        total: number of steps of the run so far that were not applied.
        most: number of such steps in a row that ends the run (`train.max_bad_steps`).
        name_of: function that names the shard and member of a sample id, for the message.
    """

    def __init__(self, *, total: int, most: int, name_of: Callable[[int], str]) -> None:
        self.total = total
        self._most, self._name_of = most, name_of
        self._in_row: list[StepResult] = []

    def count(self, result: StepResult) -> None:
        """Take in a step, and log a warning if it was not applied."""
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self._in_row = []
            return
        self.total += 1
        self._in_row.append(result)
        log.warning(
            "step %d was not applied: its loss is %g and its gradient norm %g (%d in a row)",
            *(result.step, result.loss, result.grad_norm, len(self._in_row)),
        )

    def check(self) -> None:
        """End the run if the last `most` steps were all bad; all ranks call, and decide alike.

        Raises:
            RunError: they were; the message names the first of them, and samples whose loss was
                not finite.
        """
        if len(self._in_row) == self._most:
            raise RunError(self._message())

    def _message(self) -> str:
        first = self._in_row[0]
        own = [
            self._name_of(int(sample))
            for loss, samples in zip(first.losses, first.samples, strict=True)
            if not math.isfinite(loss)
            for sample in samples[:8]
        ]
        names = [name for part in gather_to_all(own[:8]) for name in part]
        which = f"; samples with such a loss: {', '.join(names[:8])}" if names else ""
        more = ", ..." if len(names) > 8 else ""
        return (
            f"train.max_bad_steps = {self._most} steps in a row could not be applied "
            f"since their loss or gradient was not finite; the first is step {first.step}{which}"
            f"{more}. Nothing was saved after it; --replay {first.step} shows where it begins"
        )


@contextmanager
def first_nonfinite(model: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Watch every module and gradient of a model while it runs a step.

    Yields:
        A function that describes the first value that was not finite; it returns None if all were.
    """
    found: list[str] = []

    def check(what: str, values: Any) -> None:
        if found:
            return
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                bad = int((~torch.isfinite(value)).sum())
                if bad:
                    found.append(f"{what}: {bad} of {value.numel()} values are not finite")
                    return

    def largest(values: Any) -> str:
        sizes = [
            f"{value.detach().abs().max().item():.3g}"
            for value in values
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()
        ]
        return f" (largest input {', '.join(sizes)})" if sizes else ""

    def watch_module(name: str, module: nn.Module) -> list[Any]:
        def forward(module: nn.Module, inputs: Any, output: Any) -> None:
            if found:
                return
            for key, weight in module.named_parameters(recurse=False):
                check(f"the weights {name}.{key}", weight.detach())
            check(f"the output of {name}{largest(inputs)}", output)

        def backward(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
            check(f"the gradient behind {name}", grad_inputs)

        return [
            module.register_forward_hook(forward),
            module.register_full_backward_hook(backward),
        ]

    hooks = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            hooks += watch_module(name, module)
    hooks.append(model.register_forward_hook(lambda *call: check("the loss", call[2])))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hooks.append(
                parameter.register_hook(
                    lambda grad, name=name: check(f"the gradient of {name}", grad)
                )
            )
    try:
        yield lambda: found[0] if found else None
    finally:
        for hook in hooks:
            hook.remove()
