"""Small folders and tars of images for tests of sharding."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image

from mae_scale.sharding.sources import Source


def jpg(i: int) -> bytes:
    """Return a JPEG of one colour; each of 256 numbers gives another colour."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (i * 7 % 256, 9, 9)).save(stream, "JPEG")
    return stream.getvalue()


def tree(root: Path, *paths: str) -> Path:
    """Write an image to each path below a folder."""
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(jpg(i))
    return root


def write_tar(path: Path, names: list[str], mode: str = "w") -> None:
    """Write a tar of images with these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for i, name in enumerate(names):
            info, data = tarfile.TarInfo(name), jpg(i)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def counts(source: Source) -> dict[str, int]:
    """Return the number of images of each class."""
    names = [source.classes[label] for label in source.labels.tolist()]
    return {name: names.count(name) for name in source.classes}
