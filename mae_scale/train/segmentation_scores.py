"""mIoU of a segmenter on a data set: exact, each image once, the same at any world size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mae_scale.data.annotated import SegmentationEvalLoader
from mae_scale.data.annotated_transforms import (
    resize_plain,
    scaled_size,
)
from mae_scale.data.annotations import IGNORE
from mae_scale.data.transforms import normalize
from mae_scale.errors import RunError
from mae_scale.models.segmenter import sliding_logits, upsampled, window_starts
from mae_scale.train.validation import Stopped, batches_in_step

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
_WINDOWS = 4  # number of windows that go through the model at a time


@dataclass
class SegmentationScores:
    """Counts over all images and ranks."""

    confusion: torch.Tensor
    """int64 [classes, classes], pixels by the label's class and the predicted class."""
    images: int
    """Number of images."""

    def row(self) -> dict[str, Any]:
        """Return the number of images; mIoU, mean class accuracy and pixel accuracy in percent."""
        right = self.confusion.diagonal().double()
        ious, accuracies = self.per_class(), right / self.confusion.sum(dim=1)
        return {
            "images": self.images,
            "miou": 100 * ious.nanmean().item(),
            "macc": 100 * accuracies.nanmean().item(),
            "aacc": 100 * (right.sum() / self.confusion.sum()).item(),
        }

    def per_class(self) -> torch.Tensor:
        """Return each class's intersection over union, 0 to 1; NaN for a class without pixels."""
        right = self.confusion.diagonal().double()
        return right / (self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - right)


@dataclass(frozen=True)
class Sliding:
    """The windows into which an image is cut, and the sizes at which it is segmented."""

    window: int
    """Side of a window in pixels; also the short side of an image at scale 1."""
    stride: int
    """Pixels from one window to the next."""
    scales: Sequence[float] = (1.0,)
    """Scales of the short side; a scale below 1 counts as 1, as in BEiT's code."""
    flip: bool = False
    """Whether the mirror image is segmented as well."""

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """List the height and width of an image at each scale, in pixels."""
        return [scaled_size(height, width, self.window * max(1.0, scale)) for scale in self.scales]

    def calls(self, height: int, width: int) -> int:
        """Count the calls of the model for an image of this height and width in pixels."""
        each = 0
        for h, w in self.sizes(height, width):
            rows, columns = (len(window_starts(n, self.window, self.stride)) for n in (h, w))
            each += -(-rows * columns // _WINDOWS)
        return each * (2 if self.flip else 1)


def predict_classes(
    logits_of: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, sliding: Sliding
) -> torch.Tensor:
    """Return the class of each pixel, int64 [H, W].

    Args:
        logits_of: function of normalised images float32 [b, 3, S, S] that returns logits float32
            [b, classes, S, S].
        image: uint8 [3, H, W], on the model's device.
        sliding: windows and scales.
    """
    height, width = image.shape[1:]
    total: torch.Tensor | None = None
    for size in sliding.sizes(height, width):
        resized = normalize(resize_plain(image, *size))[None]
        for mirrored in (False, True) if sliding.flip else (False,):
            x = resized.flip(-1) if mirrored else resized
            logits = sliding_logits(logits_of, x, sliding.window, sliding.stride, _WINDOWS)
            logits = upsampled(logits.flip(-1) if mirrored else logits, (height, width))
            if len(sliding.scales) == 1 and not sliding.flip:
                return logits[0].argmax(dim=0)
            found = logits.softmax(dim=1)
            total = found if total is None else total + found
    assert total is not None
    return total[0].argmax(dim=0)


@torch.no_grad()
def evaluate_segmentation(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    loader: SegmentationEvalLoader,
    sliding: Sliding,
    *,
    classes: int,
    device: torch.device,
    doing: Callable[[str], None] = lambda what: None,
    what: str = "evaluating",
    stop: Callable[[], bool] = lambda: False,
) -> SegmentationScores | None:
    """Compare each pixel's predicted class with its label; all ranks call, and get the same scores.

    Images have different numbers of windows, and ranks have different images. Ranks with fewer
    calls of the model call it on zeros, so that all ranks stay together under ZeRO-3.

    Args:
        logits_of: function of normalised images float32 [b, 3, S, S] that returns logits float32
            [b, classes, S, S].
        loader: loader of this rank's part of the data set.
        sliding: windows and scales.
        classes: number of classes in the logits.
        device: device of this rank.
        doing: called with a description of what this rank does, as `Watchdog.doing` is.
        what: name of the work in that description.
        stop: asked before each image; if it returns True on any rank, all ranks give up.

    Returns:
        The scores; None if the evaluation was stopped.

    Raises:
        RunError: an image or its mask is damaged, or a shard cannot be read.
    """
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    images = torch.zeros((), dtype=torch.int64, device=device)
    try:
        for batch in batches_in_step(loader, doing=doing, what=what, stop=stop):
            own = 0 if batch is None else sliding.calls(*batch["image"].shape[2:])
            most = torch.tensor(own)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            for _ in range(int(most) - own):
                logits_of(torch.zeros(1, 3, sliding.window, sliding.window, device=device))
            if batch is None:
                continue
            image = batch["image"][0].to(device, non_blocking=True)
            found = predict_classes(logits_of, image, sliding)
            label = batch["segmentation"][0].to(device).long()
            counts = label != IGNORE
            if int(label[counts].max() if counts.any() else 0) >= classes:
                raise RunError(f"a mask holds the class {int(label[counts].max())} of {classes}")
            pairs = label[counts] * classes + found[counts]
            confusion += torch.bincount(pairs, minlength=classes * classes)
            images += 1
    except Stopped:
        return None
    dist.all_reduce(confusion)
    dist.all_reduce(images)
    return SegmentationScores(confusion.view(classes, classes).cpu(), int(images))
