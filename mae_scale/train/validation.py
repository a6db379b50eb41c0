"""Evaluation at any world size: ranks stay in step; a classifier's accuracy and loss are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from mae_scale.config.sizes import sides
from mae_scale.data.loader import EvalLoader
from mae_scale.errors import RunError, UserError
from mae_scale.train.deepspeed_state import EngineState
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.optimizers import EMA

Batch = dict[str, torch.Tensor]


class Stopped(Exception):
    """Exception that ends an evaluation on all ranks when one of them was asked to stop."""


def batches_in_step(
    loader: EvalLoader,
    *,
    doing: Callable[[str], None],
    what: str,
    stop: Callable[[], bool],
) -> Iterator[Batch | None]:
    """Yield the batches of this rank's part of a data set, the same number of them on every rank.

    Ranks stay together, which ZeRO-3 needs: a rank without a batch left gets None.

    Args:
        loader: loader of this rank's part of the data set.
        doing: called with a description of what this rank does, as `Watchdog.doing` is.
        what: name of the work in that description.
        stop: asked before each batch.

    Raises:
        Stopped: `stop` returned True on any rank.
        RunError: an image is damaged, or a shard cannot be read.
    """
    batches = iter(loader)
    for number in range(loader.most_batches):
        doing(f"{what}, batch {number + 1} of {loader.most_batches}")
        stopping = torch.tensor(float(stop()))
        dist.all_reduce(stopping)
        if stopping:
            loader.close()
            raise Stopped
        try:
            batch = next(batches, None)
        except (UserError, OSError) as error:
            raise RunError(str(error)) from error  # on this rank alone
        yield batch


def filled(batch: Batch | None, loader: EvalLoader) -> torch.Tensor:
    """Return the images of a batch, uint8 [batch_size, C, H, W], filled up with black images."""
    if batch is None:
        shape = (loader.batch_size, loader.bands.count, *sides(loader.img_size))
        return torch.zeros(shape, dtype=torch.uint8)
    image = batch["image"]
    missing = loader.batch_size - len(image)
    if not missing:
        return image
    # The layout is that of the loader's images: with another the convolution rounds differently.
    black = image.new_zeros(missing, *image.shape[1:]).to(memory_format=torch.channels_last)
    return torch.cat([image, black])


def whole_batches(
    loader: EvalLoader,
    *,
    doing: Callable[[str], None],
    what: str,
    stop: Callable[[], bool],
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield the same number of batches on each rank, all of one size, filled up with black images.

    So the result for an image does not depend on the number of images in its batch. Arguments and
    errors are those of `batches_in_step`.

    Yields:
        Images uint8 [batch_size, C, H, W], the real ones first; labels and sample ids of the b real
        ones, int64 [b].
    """
    none = torch.zeros(0, dtype=torch.int64)
    for batch in batches_in_step(loader, doing=doing, what=what, stop=stop):
        label, sample = (none, none) if batch is None else (batch["label"], batch["sample"])
        yield filled(batch, loader), label, sample


@dataclass
class Scores:
    """Counts over all ranks, by the label's class."""

    images: torch.Tensor
    """int64 [classes], number of images."""
    top1: torch.Tensor
    """int64 [classes], images whose label has the highest logit."""
    top5: torch.Tensor
    """int64 [classes], images whose label is among the five highest logits."""
    loss: float
    """Mean cross-entropy over all images."""
    confusion: torch.Tensor | None = None
    """int64 [classes, classes], images by their label and the class with the highest logit; None
    unless it was asked for."""

    def row(self) -> dict[str, Any]:
        """Return the number of images, top-1 and top-5 in percent, and the loss."""
        images = int(self.images.sum())
        return {
            "images": images,
            "top1": 100 * int(self.top1.sum()) / images,
            "top5": 100 * int(self.top5.sum()) / images,
            "loss": self.loss,
        }

    def per_class(self) -> list[float | None]:
        """Return the top-1 of each class in percent; None for a class without images."""
        counts = zip(self.top1.tolist(), self.images.tolist(), strict=True)
        return [100 * right / images if images else None for right, images in counts]


def rank_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count, for each image, the classes whose logit comes before the label's: int64 [B].

    Of equal logits the lower class comes first, so that the result does not depend on the device or
    a sort. If any logit of an image is not finite, its label comes last.

    Args:
        logits: float [B, classes].
        labels: int64 [B].
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    return torch.where(logits.isfinite().all(dim=1), before.sum(dim=1), logits.shape[1])


@torch.no_grad()
def evaluate(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    loader: EvalLoader,
    *,
    classes: int,
    device: torch.device,
    doing: Callable[[str], None] = lambda what: None,
    what: str = "evaluating",
    stop: Callable[[], bool] = lambda: False,
    label_of: torch.Tensor | None = None,
    confusion: bool = False,
) -> Scores | None:
    """Run a classifier over each image once; all ranks call, and get the same scores.

    Args:
        logits_of: function of normalised images float32 [b, C, H, W] that returns logits float32
            [b, classes].
        loader: loader of this rank's part of the data set.
        classes: number of classes in the logits.
        device: device of this rank.
        doing: called with a description of what this rank does, as `Watchdog.doing` is.
        what: name of the work in that description.
        stop: asked before each batch; if it returns True on any rank, all ranks give up.
        label_of: int64 [labels], the model's class for each label of the data set; None: they are
            the same.
        confusion: whether to count, too, which class is taken for which.

    Returns:
        The scores; None if the evaluation was stopped.

    Raises:
        RunError: an image is damaged, or a shard cannot be read.
    """
    counts = torch.zeros(3, classes, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    pairs = torch.zeros(classes**2 if confusion else 0, dtype=torch.int64, device=device)
    try:
        for image, label, _ in whole_batches(loader, doing=doing, what=what, stop=stop):
            logits = logits_of(loader.bands.normalize(image.to(device, non_blocking=True)))
            logits = logits[: len(label)].float()
            label = (label if label_of is None else label_of[label]).to(device)
            rank = rank_of_label(logits, label)
            for count, right in zip(counts, (rank >= 0, rank < 1, rank < 5), strict=True):
                count += torch.bincount(label[right], minlength=classes)
            loss += F.cross_entropy(logits, label, reduction="none").double().sum()
            if confusion:
                pairs += torch.bincount(label * classes + logits.argmax(1), minlength=classes**2)
    except Stopped:
        return None
    dist.all_reduce(counts)
    dist.all_reduce(loss)
    if confusion:
        dist.all_reduce(pairs)
    counts = counts.cpu()
    table = pairs.view(classes, classes).cpu() if confusion else None
    return Scores(counts[0], counts[1], counts[2], loss.item() / int(counts[0].sum()), table)


@contextmanager
def averaged_weights(engine: DeepSpeedEngine) -> Iterator[None]:
    """Replace the trained weights by their moving average inside the context; all ranks call."""
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    state, sharded = EngineState(engine), engine.zero_optimization_stage() > 0
    before = [] if sharded else [state.weight(p) for p in trained]
    state.release()
    for parameter in trained:
        state.set_weight(parameter, state.state(parameter, EMA))
    try:
        yield
    finally:
        # Under ZeRO the weights are restored from their masters, so that no copy is needed.
        state.release()
        for number, parameter in enumerate(trained):
            value = state.weight(parameter) if sharded else before[number]
            state.set_weight(parameter, value)
