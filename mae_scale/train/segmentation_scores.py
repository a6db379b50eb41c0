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
_WINDOWS = 4  # that go through the model at a time


@dataclass
class SegmentationScores:
    """Counts over all images and ranks."""

    confusion: torch.Tensor
    """int64 [classes, classes], pixels by the label's class and the predicted one."""
    images: int

    def row(self) -> dict[str, Any]:
        """Give images, and in percent mIoU, mean accuracy over classes, accuracy over pixels."""
        right = self.confusion.diagonal().double()
        ious, accuracies = self.per_class(), right / self.confusion.sum(dim=1)
        return {
            "images": self.images,
            "miou": 100 * ious.nanmean().item(),
            "macc": 100 * accuracies.nanmean().item(),
            "aacc": 100 * (right.sum() / self.confusion.sum()).item(),
        }

    def per_class(self) -> torch.Tensor:
        """Return intersection over union of each class, float64; NaN where the class is nowhere."""
        right = self.confusion.diagonal().double()
        return right / (self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - right)


@dataclass(frozen=True)
class Sliding:
    """The windows into which an image is cut, and the sizes at which it is segmented."""

    window: int
    """Side of a window in pixels, which also is the short side of an image at scale 1."""
    stride: int
    """Pixels from one window to the next."""
    scales: Sequence[float] = (1.0,)
    """Scales of the short side; a scale below 1 counts as 1, as in BEiT's code."""
    flip: bool = False
    """Whether the mirror image is segmented as well."""

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """List height and width at each scale."""
        return [scaled_size(height, width, self.window * max(1.0, scale)) for scale in self.scales]

    def calls(self, height: int, width: int) -> int:
        """Count the calls of the model for an image."""
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
        logits_of: float32 [b, 3, S, S], normalised -> float32 [b, classes, S, S].
        image: uint8 [3, H, W], on the model's device.
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
    """Compare each pixel's predicted class with its label; all ranks call, and get the same.

    Images have different numbers of windows, and ranks different images. So that ranks stay
    together under ZeRO-3 those with fewer calls call the model on zeros.

    Args:
        logits_of: float32 [b, 3, S, S], normalised -> float32 [b, classes, S, S].
        loader: this rank's part of the data set.
        sliding: windows and scales.
        classes: number of classes that logits are of.
        device: of this rank.
        doing: is told what this rank does, as `Watchdog.doing` wants to be.
        what: how the work is named there.
        stop: asked before each image; where any rank says yes, all give up.

    Returns:
        The scores; None where it was stopped.

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
