"""Computing mean, deviation and range of the bands of images, for `mae-scale stats`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from mae_scale.data.bands import Bands, checked_range, raw_values, statistics
from mae_scale.data.reader import ShardReader, shard_cache
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import RunError, UserError
from mae_scale.files import write_atomically
from mae_scale.world import World

AUTO = "auto"  # word for a range that follows from the values
_RANGE_IMAGES = 100  # number of images of which the range of the values is shown
_TAIL = 2  # per cent of the values that lie beyond the inner range on each side


def run(options: argparse.Namespace, world: World) -> None:
    """Print mean and deviation as YAML, and write them if `--out` is given.

    Args:
        options: arguments of `mae-scale stats`.
        world: this process, which is alone.

    Raises:
        UserError: there are no shards, or an option is out of its range.
        RunError: an image cannot be decoded.
    """
    value_range = given_range(options.value_range, options.in_chans)
    shards = open_shards(options.data, options.cache_dir)
    number = min(options.most, len(shards))
    samples = [i * len(shards) // number for i in range(number)]
    some = [0.0] * options.in_chans  # the statistics of `Bands` play no part in decoding
    with closing(ShardReader(shards, shard_cache(shards, options.cache_dir, None))) as reader:
        step = max(1, number // _RANGE_IMAGES)
        some_samples = samples[::step][:_RANGE_IMAGES]
        values = _values(shards, reader, some_samples, options.in_chans, options.max_pixels)
        print(_ranges_text(values))
        if value_range == AUTO:
            value_range = inner_ranges(values)
        bands = Bands(options.in_chans, tuple(some), tuple(some), value_range)
        try:
            mean, std = statistics(_decoded(shards, reader, samples, bands, options.max_pixels))
        except ValueError as error:
            raise RunError(str(error)) from None
    found: dict[str, object] = {
        "mean": [round(value, 5) for value in mean],
        "std": [round(value, 5) for value in std],
    }
    if value_range is not None:
        found["value_range"] = np.array(value_range).tolist()
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


def given_range(words: list[str] | None, count: int) -> Any:
    """Read what `--value_range` has.

    Args:
        words: the words behind the option; None: it is not given.
        count: number of bands.

    Returns:
        A pair of numbers, a pair for each band, `AUTO`, or None.

    Raises:
        UserError: the words are something else.
    """
    if words is None or words == [AUTO]:
        return None if words is None else AUTO
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 2 * count) or not np.isfinite(numbers).all():
        raise UserError(
            f"--value_range {' '.join(words)}: expected two numbers, two for each of the {count} "
            "bands, or auto"
        )
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    try:
        return checked_range(pairs[0] if len(numbers) == 2 else pairs, count)
    except ValueError as error:
        raise UserError(f"--value_range {error}") from None


def inner_ranges(values: npt.NDArray[Any]) -> tuple[tuple[float, float], ...]:
    """Return for each band the range of all but `_TAIL` per cent of its values on each side.

    A band whose inner values are all the same gets the range of all its values.

    Args:
        values: [N, bands].

    Raises:
        RunError: all values of a band are the same, or some are not finite.
    """
    ranges = []
    for band, column in enumerate(values.astype(np.float64).T):
        low, inner, outer, high = np.percentile(column, [0, _TAIL, 100 - _TAIL, 100]).tolist()
        if not inner < outer:
            inner, outer = low, high
        if not inner < outer or not np.isfinite([inner, outer]).all():
            raise RunError(f"band {band}: the values from {low:g} to {high:g} give no range")
        short = float(f"{inner:.6g}"), float(f"{outer:.6g}")
        ranges.append(short if short[0] < short[1] else (inner, outer))
    return tuple(ranges)


def _values(
    shards: ShardSet, reader: ShardReader, samples: list[int], count: int, max_pixels: int
) -> npt.NDArray[Any]:
    """Read some values of some images, [N, bands], of the images' numeric type."""
    values = []
    for sample in samples:
        name, data = reader.read(sample)
        try:
            image = raw_values(data, count, max_pixels)
        except ValueError as error:
            raise RunError(f"{shards.root}: {name} {error}") from None
        flat = image.reshape(-1, count)
        values.append(flat[:: max(1, len(flat) // 10_000)])
    return np.concatenate(values)


def _ranges_text(values: npt.NDArray[Any]) -> str:
    """Describe in lines of comment between which values each band of some images lies."""
    lines = []
    for band, column in enumerate(values.T):
        low, inner, outer, high = np.percentile(column, [0, _TAIL, 100 - _TAIL, 100])
        lines.append(
            f"# band {band}: {low:g} to {high:g}, all but {_TAIL} % on each side from {inner:g} to "
            f"{outer:g} ({values.dtype})"
        )
    return "\n".join(lines)
