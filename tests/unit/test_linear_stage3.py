"""Linear layers of ZeRO 3: PyTorch's numbers, and no gathered weights kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mae_scale.train import linear_stage3
from mae_scale.train.linear_stage3 import linear, use_linear

Result = list[torch.Tensor]


def results(function, x, weight, bias, release: bool = False) -> Result:  # type: ignore[no-untyped-def]
    """Give the output and the gradients of all inputs that need one."""
    inputs = [t for t in (x, weight, bias) if t is not None]
    for tensor in inputs:
        tensor.grad = None
    out = function(x, weight, bias)
    values = weight.data
    if release:  # as between forward and backward pass
        weight.data = torch.empty(0, dtype=weight.dtype)
        weight.data = values.clone()
    (out.float() * torch.arange(out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(t.grad for t in inputs if t.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_numbers_are_pytorchs(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, 5, dtype=dtype))
    bias = nn.Parameter(torch.randn(4, dtype=dtype)) if biased else None
    expected = results(F.linear, x, weight, bias)
    found = results(linear, x, weight, bias, release=True)
    assert len(found) == len(expected) == 3 + biased
    assert torch.equal(found[0], expected[0])
    for own, pytorchs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(own, pytorchs)


def test_frozen_weights_and_autocast() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), nn.Parameter(torch.randn(4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad is not None
    assert x.grad is not None and x.grad.dtype == weight.grad.dtype == torch.float32
    weight.requires_grad_(False).grad = None
    linear(x, weight).sum().backward()
    assert weight.grad is None


def test_a_released_weight_takes_no_memory() -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    storage = torch.UntypedStorage._weak_ref(weight.untyped_storage())  # type: ignore[attr-defined]
    out = linear(torch.randn(3, 5, requires_grad=True), weight, nn.Parameter(torch.zeros(4)))
    weight.data = torch.empty(0)
    assert torch.UntypedStorage._expired(storage) and out.shape == (3, 4)  # type: ignore[attr-defined]


def test_each_run_has_its_own_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "linear", F.linear)  # restores it afterwards
    for stage, expected in ((3, linear), (1, linear_stage3.PYTORCHS)):
        use_linear(stage)
        assert nn.functional.linear is expected
