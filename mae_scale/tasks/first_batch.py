"""The picture of what a run trains on: the first images of its first batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mae_scale.config.sections import RunConfig
from mae_scale.data.bands import Bands, for_display
from mae_scale.world import World

log = logging.getLogger("mae_scale")

FIRST_BATCH = "first_batch.png"  # name of the picture in the run folder
_IMAGES = 32
_GREY = 128


@dataclass(frozen=True)
class FirstBatch:
    """Draws the images of a run's first batch as the model gets them, on rank 0.

    It copies a few images to the host and draws no random number, so that training goes on as it
    would have without. A picture that cannot be written is a warning.
    """

    path: Path | None
    """PNG to write; None: this rank draws nothing."""
    bands: Bands
    classes: Sequence[str]
    """Names of the classes."""

    @classmethod
    def of(cls, config: RunConfig, world: World, classes: Sequence[str]) -> FirstBatch:
        """Make the picture of a run, which a replay leaves alone."""
        draws = world.rank == 0 and config.replay is None
        path = Path(config.run_dir) / FIRST_BATCH if draws else None
        return cls(path, Bands.of(config), classes)

    def draw(
        self,
        step: int,
        micro: int,
        images: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        grid: tuple[int, int] = (1, 1),
    ) -> None:
        """Draw the first micro-batch of the first step; do nothing at other times.

        Args:
            step: number of steps done.
            micro: number of the micro-batch in the step.
            images: float [b, C, H, W], augmented, mixed and normalised.
            labels: int64 [b], -1 where there is none; or float [b, classes], a distribution.
            mask: [b, L], 1 on hidden patches; each image is then drawn without them, too.
            grid: rows and columns of the L patches.
        """
        if self.path is None or step or micro:
            return
        from mae_scale.data.preview import PER_CLASS, sheet  # rank 0 alone needs its libraries

        shown = self.bands.denormalize(images[:_IMAGES].detach().cpu())
        pixels = for_display((shown * 255).round().to(torch.uint8))
        tiles = [
            (image, self._lines(label))
            for image, label in zip(pixels, labels[:_IMAGES].detach().cpu(), strict=True)
        ]
        if mask is not None:
            size = [side // n for side, n in zip(pixels.shape[-2:], grid, strict=True)]
            hidden = mask[:_IMAGES].detach().cpu().reshape(-1, *grid) > 0
            hidden = hidden.repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)
            masked = pixels.masked_fill(hidden[:, None], _GREY)
            pairs = zip(tiles, masked, strict=True)
            tiles = [tile for one, image in pairs for tile in (one, (image, ["masked"]))]
        try:
            sheet([tiles[i : i + PER_CLASS] for i in range(0, len(tiles), PER_CLASS)], self.path)
        except OSError as error:
            log.warning("%s is not drawn: %s", self.path, error)

    def _lines(self, label: torch.Tensor) -> list[str]:
        if label.ndim == 0:
            number = int(label)
            return [f"class {number}", self.classes[number]] if number >= 0 else ["no label"]
        # A distribution: mixed images have two classes above the floor of label smoothing.
        shares, numbers = label.float().topk(min(2, len(label)))
        lines: list[str] = []
        for share, number in zip(shares.tolist(), numbers.tolist(), strict=True):
            if not lines or share > float(label.min()):
                lines += [f"class {number}: {share:.2f}", self.classes[number]]
        return lines
