"""Masked Autoencoders (He et al., arXiv 2111.06377) from ViT-B to ViT-H on clusters.

In Python, without DeepSpeed and without a run (docs/api.md):

    model = mae_scale.build_mae("mae_vit_base_patch16", norm_pix_loss=True)
    dataset = mae_scale.ShardDataset("shards/train")
    loader = mae_scale.TrainLoader(dataset.shards, img_size=224, global_batch_size=256)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae_scale.data.images_dataset import ShardDataset as ShardDataset
    from mae_scale.data.loader import EvalLoader as EvalLoader
    from mae_scale.data.loader import TrainLoader as TrainLoader
    from mae_scale.data.shards import open_shards as open_shards
    from mae_scale.data.transforms import normalize as normalize
    from mae_scale.models import build_classifier as build_classifier
    from mae_scale.models import build_mae as build_mae
    from mae_scale.tasks.weights import read_weights as read_weights

__version__ = "0.1.0"

# Modules of the public names. They are imported when a name is asked for: the command line must
# not wait for torch.
_PUBLIC = {
    "EvalLoader": "mae_scale.data.loader",
    "ShardDataset": "mae_scale.data.images_dataset",
    "TrainLoader": "mae_scale.data.loader",
    "build_classifier": "mae_scale.models",
    "build_mae": "mae_scale.models",
    "normalize": "mae_scale.data.transforms",
    "open_shards": "mae_scale.data.shards",
    "read_weights": "mae_scale.tasks.weights",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mae_scale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
