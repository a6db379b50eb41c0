"""Features of the images of a data set: computed once for each image, at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from mae_scale.data.loader import EvalLoader
from mae_scale.train.validation import whole_batches

Features = Callable[[torch.Tensor], torch.Tensor]  # normalised images [b, C, H, W] -> [b, D]


@torch.no_grad()
def feature_batches(
    features: Features,
    loader: EvalLoader,
    device: torch.device,
    *,
    doing: Callable[[str], None],
    what: str = "computing features",
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the features of all ranks' batches, on every rank; all ranks call.

    Args:
        features: function of normalised images [b, C, H, W] that returns their features [b, D].
        loader: loader of this rank's part of the data set.
        device: device of this rank.
        doing, what, stop: the same as for `validation.evaluate`.

    Yields:
        Sample ids int64 [n], in no order, and their features float32 [n, D], both on the device.

    Raises:
        Stopped: `stop` returned True on any rank.
        RunError: an image is damaged, or a shard cannot be read.
    """
    ranks = dist.get_world_size()
    for image, _, sample in whole_batches(loader, doing=doing, what=what, stop=stop):
        inputs = loader.bands.normalize(image.to(device, non_blocking=True))
        own = features(inputs).float().contiguous()
        ids = torch.full((len(own),), -1, dtype=torch.int64)
        ids[: len(sample)] = sample
        ids = ids.to(device)
        all_ids = [torch.empty_like(ids) for _ in range(ranks)]
        all_features = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(all_ids, ids)
        dist.all_gather(all_features, own)
        numbers = torch.cat(all_ids)
        yield numbers[numbers >= 0], torch.cat(all_features)[numbers >= 0]


def features_of(
    features: Features,
    loader: EvalLoader,
    device: torch.device,
    *,
    doing: Callable[[str], None],
    what: str = "computing features",
    stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Compute the features of a whole data set, float32 [N, D], in the order of its samples.

    All ranks call and get the same result. Arguments and errors are those of `feature_batches`.
    """
    found: torch.Tensor | None = None
    for ids, values in feature_batches(features, loader, device, doing=doing, what=what, stop=stop):
        if found is None:
            found = torch.empty(loader.num_samples, values.shape[1], device=device)
        found[ids] = values
    assert found is not None  # shards hold at least one sample
    return found
