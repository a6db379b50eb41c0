"""Reading weights of any kind in Python; DeepSpeed is imported only for the weights of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from mae_scale.models import weights


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the state dict of a run, or of a file or folder of weights, with the authors' keys.

    Args:
        path: run folder (its best checkpoint is taken, or else its newest), a step folder in one,
            or a path that `mae_scale.models.weights.read_weights` takes.

    Raises:
        UserError: nothing is there, or it holds no weights.
    """
    path = Path(path)
    if path.is_dir() and not any((path / name).is_file() for name in weights.FILES):
        from mae_scale.tasks.trained import read_any

        return read_any(path)
    return weights.read_weights(path)
