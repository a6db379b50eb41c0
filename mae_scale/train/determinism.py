"""Reproducible algorithms, which a GPU does not use by default: the same bits each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Ask PyTorch, cuDNN and cuBLAS for reproducible algorithms, if that is wanted.

    An operation without such an algorithm warns and goes on; docs/training.md says what is
    promised. This context must be entered before anything is computed on a GPU, since cuBLAS reads
    its setting only once.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn: Any = torch.backends.cudnn
    checks: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        checks.fill_uninitialized_memory,
        cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    checks.fill_uninitialized_memory = False  # only finds bugs, for a pass over each tensor
    cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        checks.fill_uninitialized_memory, cudnn.benchmark = before[2:]
