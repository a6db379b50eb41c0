"""When numbers stop being finite: the step is not applied, and a replay finds where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from mae_scale.train.ds import DeepSpeedEngine


class StepGuard:
    """Lets the optimiser change nothing in a step whose loss or gradient is not finite.

    The decision stays on the device: fused AdamW takes a scalar `found_inf` (the way of torch's
    GradScaler), and where that is 1 weights, moments and step count stay as they are.

    Args:
        engine: with a fused AdamW, of any ZeRO stage.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._wrapper = engine.optimizer
        self._inner = getattr(self._wrapper, "optimizer", self._wrapper)
        self._device = engine.device
        self._loss_is_finite = torch.ones((), dtype=torch.bool, device=self._device)
        self._own_norm: torch.Tensor | None = None  # where DeepSpeed computes none: plain AdamW
        self._inner.register_step_pre_hook(self._before_step)

    def watch(self, loss: torch.Tensor) -> None:
        """Say what the loss of the coming step is: a scalar, the same on all ranks."""
        self._loss_is_finite = torch.isfinite(loss)

    @property
    def grad_norm(self) -> torch.Tensor:
        """L2 norm of the last step's gradient, over all ranks: a scalar."""
        norm = self._own_norm
        if norm is None:
            norm = torch.as_tensor(self._wrapper._global_grad_norm, device=self._device)
        return norm

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._wrapper is self._inner:
            self._own_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = self._loss_is_finite & torch.isfinite(self.grad_norm)
        # On the host under offload.
        optimizer.found_inf = (~finite).to(parameters[0].device, torch.float32)


@contextmanager
def first_nonfinite(model: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Watch every module and gradient of a model while it runs a step.

    Gives a function that tells, in words, the first value that was not finite, or None.
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
