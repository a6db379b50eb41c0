#!/usr/bin/env python3
"""Measure how fast shards are written, beside webdataset.ShardWriter in one process and plain tar.

All programs read the same files in the same random order (tar in the order of the folder) and write
to the same disk, in turns. ShardWriter and tar don't look into the images, compute no checksums,
and don't wait until data is on the disk; shard_imagenet.py does all three.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import webdataset

from mae_scale.randomness import Purpose, permutation
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard


def make_source(images: Path, src: Path, count: int) -> int:
    """Make a tree of `count` copies of the images, and give the bytes in all."""
    files = sorted(path for path in images.rglob("*") if path.is_file())
    if not files:
        sys.exit(f"error: {images} holds no files; give a folder of photographs")
    total = 0
    for i in range(count):
        path = files[i % len(files)]
        target = src / path.parent.name / f"{path.stem}_{i // len(files)}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        total += target.stat().st_size
    return total


def with_tar(src: Path, out: Path) -> None:
    subprocess.run(["tar", "cf", out / "all.tar", "-C", src, "."], check=True)


def with_shard_writer(src: Path, out: Path) -> None:
    files = sorted(src.glob("*/*"))
    classes = {name: i for i, name in enumerate(sorted({path.parent.name for path in files}))}
    with webdataset.ShardWriter(f"{out}/train-%06d.tar", maxsize=256e6, verbose=0) as writer:
        for i in permutation(len(files), Purpose.WRITE_ORDER, 0):
            path = files[i]
            sample = {"__key__": path.stem, "jpg": path.read_bytes()}
            writer.write({**sample, "cls": classes[path.parent.name]})


def with_shard_imagenet(workers: int) -> Callable[[Path, Path], None]:
    def run(src: Path, out: Path) -> None:
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):  # noqa: PTH123
            assert shard(src, out, Options("train"), workers=workers) == 0

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of photographs, repeated to --count")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    ways = {
        "tar cf": with_tar,
        "webdataset.ShardWriter": with_shard_writer,
        "shard_imagenet, 1 worker": with_shard_imagenet(1),
        f"shard_imagenet, {cores} workers": with_shard_imagenet(cores),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        src = Path(scratch) / "src"
        total = make_source(args.images, src, args.count)
        for _ in range(args.rounds):
            for name, way in ways.items():
                out = Path(scratch) / "out"
                out.mkdir()
                os.sync()
                start, before = time.perf_counter(), sum(os.times()[:4])
                way(src, out)
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(sum(os.times()[:4]) - before)  # children that have ended, too
                shutil.rmtree(out)
    python = sys.version.split()[0]
    print(f"{datetime.date.today()}  {platform.machine()}, {cores} cores, Python {python}")
    print(f"{args.count:,} JPEGs, {total / 1e9:.2f} GB, best of {args.rounds} rounds")
    columns = f"{'seconds':>8}{'images/s':>10}{'MB/s':>7}{'x ShardWriter':>15}{'x tar':>7}"
    print(f"{'':30}{columns}{'CPU ms an image':>17}{'x ShardWriter':>15}")
    best = {name: min(times) for name, times in seconds.items()}
    for name, time_s in best.items():
        print(
            f"{name:30}{time_s:8.2f}{args.count / time_s:10,.0f}{total / time_s / 1e6:7.0f}"
            f"{best['webdataset.ShardWriter'] / time_s:15.2f}{best['tar cf'] / time_s:7.2f}"
            f"{min(cpu[name]) / args.count * 1e3:17.3f}"
            f"{min(cpu['webdataset.ShardWriter']) / min(cpu[name]):15.2f}"
        )


if __name__ == "__main__":
    main()
