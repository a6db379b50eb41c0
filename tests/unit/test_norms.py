"""BatchNorm over processes with unequal numbers of values is BatchNorm of all values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mae_scale.models.norms import CountedBatchNorm

WORKER = Path(__file__).with_name("norms_worker.py")


@pytest.mark.slow
def test_it_is_the_norm_of_all_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = CountedBatchNorm(3)
    torch.nn.init.normal_(norm.weight)
    x, weight = 2 + 3 * torch.randn(7, 3, 4, 4), torch.randn(7, 3, 4, 4)
    torch.save({"x": x, "weight": weight, "state": norm.state_dict()}, tmp_path / "in.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    subprocess.run([*command, WORKER, tmp_path / "in.pt", tmp_path], check=True)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    features = torch.nn.BatchNorm1d(3, affine=False)
    out = features(x[:3, :, 0, 0])
    torch.testing.assert_close(torch.cat([result["out"] for result in results]), out)
    for result in results:
        torch.testing.assert_close(result["own"], features.state_dict())
    x.requires_grad_()
    (norm(x) * weight).sum().backward()
    found = torch.cat([result["grads"][0] for result in results])
    assert (found - x.grad).abs().max() <= 1e-5
    for i, parameter in enumerate((norm.weight, norm.bias), start=1):
        assert (sum(r["grads"][i] for r in results) - parameter.grad).abs().max() <= 1e-4
    for result in results:
        for key, value in norm.state_dict().items():
            assert (result["state"][key] - value).abs().max() <= 1e-5, key
