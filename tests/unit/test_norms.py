"""BatchNorm over processes with unequal numbers of values is BatchNorm of all values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mae_scale.models.norms import CountedBatchNorm

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from mae_scale.models.norms import CountedBatchNorm

dist.init_process_group("gloo")
rank = dist.get_rank()
inputs = torch.load(sys.argv[1])
norm = CountedBatchNorm(3)
norm.load_state_dict(inputs["state"])
share = slice(0, 0) if rank == 2 else slice(0, 2) if rank == 0 else slice(2, 7)
x = inputs["x"][share].requires_grad_()
(norm(x) * inputs["weight"][share]).sum().backward()
grads = [x.grad, norm.weight.grad, norm.bias.grad]
torch.save({"grads": grads, "state": norm.state_dict()}, f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_it_is_the_norm_of_all_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = CountedBatchNorm(3)
    torch.nn.init.normal_(norm.weight)
    x, weight = 2 + 3 * torch.randn(7, 3, 4, 4), torch.randn(7, 3, 4, 4)
    torch.save({"x": x, "weight": weight, "state": norm.state_dict()}, tmp_path / "in.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    subprocess.run([*command, tmp_path / "script.py", tmp_path / "in.pt", tmp_path], check=True)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    x.requires_grad_()
    (norm(x) * weight).sum().backward()
    found = torch.cat([result["grads"][0] for result in results])
    assert (found - x.grad).abs().max() <= 1e-5
    for i, parameter in enumerate((norm.weight, norm.bias), start=1):
        assert (sum(r["grads"][i] for r in results) - parameter.grad).abs().max() <= 1e-4
    for result in results:
        for key, value in norm.state_dict().items():
            assert (result["state"][key] - value).abs().max() <= 1e-5, key
