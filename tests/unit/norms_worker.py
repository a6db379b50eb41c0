"""A rank of test_norms.py: BatchNorm of its share of the values; rank 2 has none."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from mae_scale.models.norms import CountedBatchNorm, CountedBatchNorm1d

dist.init_process_group("gloo")
rank = dist.get_rank()
inputs = torch.load(sys.argv[1])
norm = CountedBatchNorm(3)
norm.load_state_dict(inputs["state"])
share = slice(0, 0) if rank == 2 else slice(0, 2) if rank == 0 else slice(2, 7)
x = inputs["x"][share].requires_grad_()
(norm(x) * inputs["weight"][share]).sum().backward()
grads = [x.grad, norm.weight.grad, norm.bias.grad]
features = CountedBatchNorm1d(3, affine=False)
out = features(inputs["x"][rank : rank + 1, :, 0, 0])  # one image on each rank
results = {"grads": grads, "state": norm.state_dict(), "out": out, "own": features.state_dict()}
torch.save(results, f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
