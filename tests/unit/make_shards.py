"""Shards for tests of readers, written with plain Python."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae_scale.data.shards import INDEX_DTYPE, Shard, write_shard_set


def make_shards(folder: Path, images: Sequence[bytes], samples: Sequence[int]) -> Path:
    """Write shards of `samples[i]` images each; image i has the key k{i} and the label i mod 10."""
    folder.mkdir(parents=True, exist_ok=True)
    index: list[tuple[int, int, int]] = []
    shards = []
    for number, count in enumerate(samples):
        path = folder / f"train-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(len(index), len(index) + count):
                label = i % 10
                for ending, content in (("jpg", images[i]), ("cls", b"%d" % label)):
                    if ending == "jpg":
                        index.append((tar.offset + 512, len(content), label))
                    member = tarfile.TarInfo(f"k{i}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        shards.append(Shard(path.name, count, path.stat().st_size, ""))
    assert len(index) == len(images)
    classes = [str(label) for label in range(10)]
    checksums = np.array([zlib.crc32(image) for image in images], np.uint32)
    entries = np.array(index, INDEX_DTYPE)
    write_shard_set(folder, "train", classes, shards, entries, checksums, {})
    return folder
