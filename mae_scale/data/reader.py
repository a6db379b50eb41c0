"""Images and annotations out of shards, read by offset."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_scale.data.cache import FetchError, ShardCache
from mae_scale.data.remote import is_remote, shown
from mae_scale.data.shards import ShardSet
from mae_scale.data.tar import BLOCK, read_header
from mae_scale.errors import UserError
from mae_scale.files import NotAFile, open_descriptor
from mae_scale.launch.descriptors import room_for_shards

_READ_TRIES = 4
_READ_WAIT_S = 0.5  # wait before the second try; it doubles after each
_FETCHES = 8  # number of remote shards that a worker fetches at a time


class Member(NamedTuple):
    """An image's file in a shard: its name and content."""

    name: str
    data: bytearray


class ShardReader:
    """Reader of the images of any samples: one `preadv` of header and data on a file kept open.

    Args:
        shards: set to read from.
        cache: cache in which remote shards are staged; None for local shards.
    """

    def __init__(self, shards: ShardSet, cache: ShardCache | None = None) -> None:
        self._shards = shards
        self._cache = cache
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, last used last
        self._most_open = room_for_shards()

    def prepare(self, samples: npt.NDArray[np.int64]) -> None:
        """Fetch the remote shards that these samples lie in, several at a time.

        Raises:
            FetchError: a shard cannot be fetched, after several tries; the message names it.
        """
        if self._cache is None:
            return
        shards = np.unique(self._shard_of(samples)).tolist()
        missing = [shard for shard in shards if shard not in self._open]
        if not missing:
            return
        for shard in set(self._open) - set(shards):
            if os.fstat(self._open[shard]).st_nlink == 0:
                self._close(shard)  # removed from the cache, it takes room until it is closed
        with ThreadPoolExecutor(_FETCHES) as pool:
            for shard, descriptor in zip(missing, pool.map(self._open_file, missing), strict=True):
                self._keep(shard, descriptor)

    def announce(self, samples: npt.NDArray[np.int64]) -> None:
        """Tell the kernel what will be read, so that it reads many places at the same time.

        This leaves out copies in the cache, which have just been written, and shards that cannot be
        opened: `read` raises the error.
        """
        for sample in samples:
            shard = int(self._shard_of(sample))
            if is_remote(self._shards.files[shard]):
                continue
            entry = self._shards.index[sample]
            fields = [("offset", "size"), ("extra_offset", "extra_size")]  # image, annotation
            for place, length in fields[: 1 + ("extra_offset" in entry.dtype.names)]:
                start, size = int(entry[place]) - BLOCK, int(entry[length]) + BLOCK
                with suppress(OSError, UserError):
                    os.posix_fadvise(self._descriptor(shard), start, size, os.POSIX_FADV_WILLNEED)

    def read(self, sample: int) -> Member:
        """Read the image file of a global sample id.

        Raises:
            UserError: the shard has changed since it was indexed.
            OSError: the shard cannot be read, after several tries; the message names it.
        """
        return self._member(sample, "offset", "size")

    def name(self, sample: int) -> str:
        """Read the name of the image of a global sample id; errors are those of `read`."""
        shard, header = int(self._shard_of(sample)), bytearray(BLOCK)
        offset = int(self._shards.index[sample]["offset"])
        os.preadv(self._descriptor(shard), [header], offset - BLOCK)
        found = read_header(header)
        if found is None:
            raise self._changed(shard, f"no member lies at offset {offset}")
        return found.name

    def read_annotation(self, sample: int) -> Member:
        """Read the annotation file of a global sample id, if shards have them; see `read`."""
        return self._member(sample, "extra_offset", "extra_size")

    def _member(self, sample: int, offset_field: str, size_field: str) -> Member:
        shard = int(self._shard_of(sample))
        entry = self._shards.index[sample]
        offset, size = int(entry[offset_field]), int(entry[size_field])
        header, data = bytearray(BLOCK), bytearray(size)
        for attempt in range(_READ_TRIES):
            try:
                got = os.preadv(self._descriptor(shard), [header, data], offset - BLOCK)
                break
            except FetchError:
                raise
            except OSError as error:
                self._close(shard)  # a stale handle never works again
                file = shown(self._shards.files[shard])
                if isinstance(error, NotAFile):
                    raise UserError(f"{file} cannot be read: {error.strerror}") from None
                if attempt + 1 == _READ_TRIES:
                    raise OSError(
                        f"{file} cannot be read ({_READ_TRIES} tries): {error}"
                    ) from error
                time.sleep(_READ_WAIT_S * 2**attempt)
        found = read_header(header) if got == BLOCK + size else None
        if found is None:
            raise self._changed(shard, f"no member lies at offset {offset}")
        # No image is so large that a ustar header cannot hold its size.
        if size != found.size:
            raise self._changed(shard, f"{found.name} is not of the indexed {size} bytes")
        return Member(found.name, data)

    def _shard_of(self, samples: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._shards.starts, samples, side="right") - 1

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            self._keep(shard, self._open_file(shard))
        self._open.move_to_end(shard)
        descriptor = self._open[shard]
        if self._cache is not None and is_remote(self._shards.files[shard]):
            self._cache.used(descriptor)
        return descriptor

    def _open_file(self, shard: int) -> int:
        file, size = self._shards.files[shard], int(self._shards.bytes[shard])
        if self._cache is not None and is_remote(file):
            descriptor = self._cache.open(file, size, self._shards.sha256[shard] or None)
        else:
            descriptor = open_descriptor(file)
        found = os.fstat(descriptor).st_size
        if found != size:
            os.close(descriptor)
            raise self._changed(shard, f"it has {found} bytes, indexed {size}")
        return descriptor

    def _keep(self, shard: int, descriptor: int) -> None:
        self._open[shard] = descriptor
        while len(self._open) > self._most_open:
            os.close(self._open.popitem(last=False)[1])

    def _changed(self, shard: int, what: str) -> UserError:
        return UserError(
            f"{shown(self._shards.files[shard])} has changed since it was indexed: {what}; "
            "check it with `mae-scale verify`, or index it again"
        )

    def _close(self, shard: int) -> None:
        if shard in self._open:
            os.close(self._open.pop(shard))

    def close(self) -> None:
        """Close all files."""
        for shard in list(self._open):
            self._close(shard)


def shard_cache(
    shards: ShardSet, folder: str | Path | None, max_bytes: int | None
) -> ShardCache | None:
    """Make the cache that stages the remote shards of a set; return None if all shards are local.

    Raises:
        UserError: there are remote shards, but no folder for them.
    """
    if not any(is_remote(file) for file in shards.files):
        return None
    if folder is None:
        raise UserError(f"{shards.root}: remote shards need a folder to be staged in, cache_dir")
    return ShardCache(folder, max_bytes, shards.fingerprint)
