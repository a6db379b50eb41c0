"""Parts of the command for the first hour on a GPU that need no process of their own."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu


def test_attention_kernels_and_upload() -> None:
    found = list(gpu.attention(small=True))
    assert [result["tokens"] for result in found] == [50, 197]
    assert all(any("_scaled_dot_product" in op for op in r["operators"]) for r in found)
    assert gpu.upload()["gb_per_second"] > 0
    assert 1.8 < gpu.planned_gb("mae_vit_base_patch16", 1, "fp32") < 2.5
