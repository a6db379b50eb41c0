"""What one looks at before training: a short table of a finished folder, and its picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from mae_scale.data.preview import PREVIEW, is_preview, preview
from mae_scale.data.remote import printable
from mae_scale.data.shards import NO_LABEL, open_shards
from mae_scale.errors import RunError, UserError
from mae_scale.launch.console import say, warn


def look(folder: Path, left_out: Counter[str], reads_with: str | None = None) -> None:
    """Print what a finished folder of shards holds, and draw `preview.png` into it.

    A picture that cannot be drawn is a warning; a `preview.png` of others is not replaced.

    Args:
        folder: folder with a manifest.
        left_out: number of images that were left out for each reason.
        reads_with: value with which training reads the shards, if it is not the folder.
    """
    try:
        shards = open_shards(reads_with or folder)
    except UserError as error:  # tars at several addresses
        warn(f"warning: there is no table: {error}")
        return
    labels = np.asarray(shards.index["label"])
    count = Counter(labels[labels != NO_LABEL].tolist())
    say(f"  images     {len(labels):,}, of which {len(labels) - count.total():,} have no label")
    if count:
        names = dict(enumerate(map(printable, shards.classes)))
        ends = [min(count, key=lambda c: (count[c], c)), max(count, key=lambda c: (count[c], -c))]
        least, most = (f"class {c}, {names.get(c, c)} ({count[c]:,} images)" for c in ends)
        say(f"  classes    {len(count):,} of {len(names):,}; smallest {least}; largest {most}")
    for reason, number in left_out.most_common(3):
        say(f"  left out   {number:,}: {printable(reason)}")
    picture = folder / PREVIEW
    if reads_with or (picture.exists() and not is_preview(picture)):
        return  # the first tar of a command is not fetched twice
    try:
        found = preview(folder, picture)
    except (OSError, UserError, RunError) as error:
        warn(f"warning: {picture} was not drawn: {printable(str(error))}")
        return
    for file, label in [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})]:
        said = "no label" if label is None else f"class {label}, {printable(shards.classes[label])}"
        say(f"  sample     {printable(file)}: {said}")
    say(f"  picture    {picture}")
