"""Computing mean, deviation and range of the bands of images, for `mae-scale stats`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
import yaml

from mae_scale.data.bands import Bands, raw_values, statistics
from mae_scale.data.reader import ShardReader, shard_cache
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import RunError, UserError
from mae_scale.files import write_atomically

_RANGE_IMAGES = 100  # number of images of which the range of the values is shown
_TAIL = 2  # per cent of the values that lie beyond the inner range on each side


def run(options: argparse.Namespace) -> None:
    """Print mean and deviation as YAML, and write them if `--out` is given.

    Args:
        options: arguments of `mae-scale stats`.

    Raises:
        UserError: there are no shards, or an option is out of its range.
        RunError: an image cannot be decoded.
    """
    for name in ("in_chans", "most", "max_pixels"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    value_range = None if options.value_range is None else tuple(options.value_range)
    if value_range is not None and not value_range[0] < value_range[1]:
        raise UserError(f"--value_range {value_range[0]:g} {value_range[1]:g} must rise")
    shards = open_shards(options.data, options.cache_dir)
    number = min(options.most, len(shards))
    samples = [i * len(shards) // number for i in range(number)]
    some = [0.0] * options.in_chans  # the statistics of `Bands` play no part in decoding
    bands = Bands(options.in_chans, tuple(some), tuple(some), value_range)
    with closing(ShardReader(shards, shard_cache(shards, options.cache_dir, None))) as reader:
        step = max(1, number // _RANGE_IMAGES)
        some_samples = samples[::step][:_RANGE_IMAGES]
        print(_range(shards, reader, some_samples, options.in_chans, options.max_pixels))
        try:
            mean, std = statistics(_decoded(shards, reader, samples, bands, options.max_pixels))
        except ValueError as error:
            raise RunError(str(error)) from None
    found: dict[str, object] = {
        "mean": [round(value, 5) for value in mean],
        "std": [round(value, 5) for value in std],
    }
    if value_range is not None:
        found["value_range"] = list(value_range)
    content: dict[str, object] = {"data": found}
    if options.in_chans != 3:
        content["model"] = {"in_chans": options.in_chans}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    print(f"# of {number} of {len(shards)} images\n{text}", end="")
    if options.out is not None:
        write_atomically(options.out, text)


def _decoded(
    shards: ShardSet,
    reader: ShardReader,
    samples: list[int],
    bands: Bands,
    max_pixels: int,
) -> Iterator[torch.Tensor]:
    for sample in samples:
        name, data = reader.read(sample)
        try:
            yield bands.decode(data, max_pixels)
        except ValueError as error:
            raise ValueError(f"{shards.root}: {name} {error}") from None


def _range(
    shards: ShardSet, reader: ShardReader, samples: list[int], count: int, max_pixels: int
) -> str:
    """Describe in lines of comment between which values each band of some images lies."""
    lines, values = [], []
    for sample in samples:
        name, data = reader.read(sample)
        try:
            image = raw_values(data, count, max_pixels)
        except ValueError as error:
            raise RunError(f"{shards.root}: {name} {error}") from None
        flat = image.reshape(-1, count)
        values.append(flat[:: max(1, len(flat) // 10_000)])
    joined = np.concatenate(values)
    for band in range(count):
        low, inner, outer, high = np.percentile(joined[:, band], [0, _TAIL, 100 - _TAIL, 100])
        lines.append(
            f"# band {band}: {low:g} to {high:g}, all but {_TAIL} % on each side from {inner:g} to "
            f"{outer:g} ({joined.dtype})"
        )
    return "\n".join(lines)
