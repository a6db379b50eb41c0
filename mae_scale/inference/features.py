"""Computing and writing the features of images, for `mae-scale features`."""

from __future__ import annotations

import argparse
import csv
import io
import logging
from contextlib import closing
from pathlib import Path

import numpy as np

from mae_scale.data.reader import ShardReader, shard_cache
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.files import as_utf8, owner, write_atomically
from mae_scale.inference.model import TrainedModel, chosen_model
from mae_scale.launch.distributed import on_rank0
from mae_scale.launch.watchdog import Watchdog
from mae_scale.train.features import feature_batches
from mae_scale.world import World

log = logging.getLogger("mae_scale")

_ROWS = 8192  # number of rows that are written into a Parquet file at a time


def encoder_of(options: argparse.Namespace, world: World) -> TrainedModel:
    """Read the encoder that the options name, onto this rank's device.

    Args:
        options: arguments of `mae-scale features` or `mae-scale knn`.
        world: this process among the others.

    Raises:
        UserError: the weights cannot be used.
    """
    encoder = chosen_model(options, "encoder")
    encoder.put(world.device, options.precision)
    words = {"token": "class token", "mean": "mean of the patches"}
    log.info("features are the %s; encoder of %s", words[encoder.pool], encoder.source)
    return encoder


def run(options: argparse.Namespace, world: World, watchdog: Watchdog) -> None:
    """Compute the features on all ranks; rank 0 writes them, in the order of the shards.

    Args:
        options: arguments of `mae-scale features`.
        world: this process among the others.
        watchdog: watchdog of the process group.

    Raises:
        UserError: weights, data or options do not fit each other.
    """
    if options.out.suffix.lower() == ".parquet":
        _pyarrow()
    if not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: there is no folder {options.out.parent}")
    shards = open_shards(options.data, options.cache_dir)
    encoder = encoder_of(options, world)
    loader = encoder.loader(shards, options, world)
    unfinished = options.out.with_name(f".{options.out.stem}.{owner()}.npy")
    try:
        rows: np.memmap | None = None
        for ids, values in feature_batches(
            encoder.features, loader, world.device, doing=watchdog.doing
        ):
            if world.rank > 0:
                continue
            if rows is None:
                shape = (len(shards), values.shape[1])
                rows = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape)
            rows[ids.cpu().numpy()] = values.cpu().numpy()
        watchdog.doing("writing features")
        on_rank0(lambda: _write(options, shards, rows, unfinished))
    finally:
        unfinished.unlink(missing_ok=True)


def _write(
    options: argparse.Namespace, shards: ShardSet, rows: np.memmap | None, unfinished: Path
) -> None:
    assert rows is not None  # shards hold at least one sample
    rows.flush()
    labels = shards.index["label"].astype(np.int64)
    names = [shards.classes[i] if 0 <= i < len(shards.classes) else "" for i in labels.tolist()]
    keys = _keys(shards, options.cache_dir)
    if options.out.suffix.lower() == ".npy":
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["key", "label", "class"])
        table.writerows(zip(keys, labels.tolist(), names, strict=True))
        write_atomically(options.out.with_suffix(".csv"), text.getvalue())
        unfinished.replace(options.out)
    else:
        _write_parquet(options.out, unfinished, keys, labels, names, rows)
    log.info("wrote %s: %d images, %d values each", options.out, *rows.shape)


def _keys(shards: ShardSet, cache_dir: str | None) -> list[str]:
    """List the key of each image as webdataset has it: its name in the tar without the ending."""
    with closing(ShardReader(shards, shard_cache(shards, cache_dir, None))) as reader:
        names = [reader.name(sample) for sample in range(len(shards))]
    keys = []
    for name in names:
        folder, slash, base = name.rpartition("/")
        keys.append(folder + slash + base.partition(".")[0])
    return keys


def _pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("--out *.parquet needs pyarrow: pip install 'mae-scale[parquet]'") from None


def _write_parquet(
    path: Path,
    unfinished: Path,
    keys: list[str],
    labels: np.ndarray,
    names: list[str],
    rows: np.ndarray,
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [
            ("key", pa.string()),
            ("label", pa.int64()),
            ("class", pa.string()),
            ("features", pa.list_(pa.float32(), rows.shape[1])),
        ]
    )
    temporary = unfinished.with_suffix(".parquet")
    try:
        # pyarrow takes paths and texts in UTF-8 only.
        keys, names = ([as_utf8(text).decode() for text in texts] for texts in (keys, names))
        with temporary.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
            for start in range(0, len(rows), _ROWS):
                part = slice(start, start + _ROWS)
                flat = pa.array(np.asarray(rows[part]).reshape(-1))
                values = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
                columns = [keys[part], pa.array(labels[part]), names[part], values]
                writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
