#!/usr/bin/env python3
"""Measure how fast images are loaded, beside the official pipeline, webdataset and plain decoding.

Each of them gives batches of 64 crops of 224 pixels out of the same full-size photographs, in
turns, with the workers bound to as many cores as there are workers (and the process that takes the
batches to other cores, where there are any):

- official: ImageFolder, PIL, torchvision's RandomResizedCrop, flip, ToTensor, Normalize; DataLoader
- webdataset: the same transforms, out of shards, with a shuffle buffer
- mae-scale: TrainLoader (uint8; the device normalises)
- decode: JPEGs in memory to pixels, nothing else, one process
- with --variants, mae-scale's loader with data.repeats 2 and 4, on shards whose short side is 320
  and 256 pixels, and with fine-tuning's RandAugment and random erasing

Then it measures how long the loader takes to its first batch at the start of an epoch and at 95 %.
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import simplejpeg
import torch
import webdataset
from machine import cpu_name
from PIL import Image
from sharding import make_source, with_shard_imagenet
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mae_scale.data.augment import Augment
from mae_scale.data.loader import TrainLoader
from mae_scale.data.shards import open_shards
from mae_scale.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from mae_scale.randomness import Purpose, permutation
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard

BATCH = 64
WARM_UP = 6  # batches that are not timed: workers start, and fill their queues

OFFICIAL = transforms.Compose(
    [
        transforms.RandomResizedCrop(
            224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


@contextmanager
def official(tree: Path, workers: int) -> Iterator[Iterator[Any]]:
    """Yield the batches of the official pipeline."""
    loader = DataLoader(
        ImageFolder(str(tree), OFFICIAL), BATCH, shuffle=True, num_workers=workers, drop_last=True
    )
    yield iter(loader)


@contextmanager
def with_webdataset(shards: Path, workers: int) -> Iterator[Iterator[Any]]:
    """Yield the batches of a usual webdataset pipeline."""
    dataset = (
        webdataset.WebDataset(
            [str(path) for path in sorted(shards.glob("*.tar"))],
            shardshuffle=100,
            resampled=True,
            nodesplitter=None,
        )
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(OFFICIAL, lambda label: label)
        .batched(BATCH)
    )
    yield iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def train_loader(shards: Path, workers: int, **more: Any) -> TrainLoader:
    return TrainLoader(
        open_shards(shards), img_size=224, seed=0, lanes=64, window=2048,
        global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1, workers=workers,
        **more,
    )  # fmt: skip


@contextmanager
def mae_scale(shards: Path, workers: int, **more: Any) -> Iterator[Iterator[Any]]:
    with closing(train_loader(shards, workers, **more)) as loader:
        yield loader.batches(0)


def variants(tree: Path, scratch: Path, cores: int) -> dict[str, tuple[Any, Path]]:
    """Give other settings of our loader, and the shards of each."""
    found: dict[str, tuple[Any, Path]] = {
        f"repeats {k}": (partial(mae_scale, repeats=k), scratch / "shards") for k in (2, 4)
    }
    for pixels in (320, 256):
        small = scratch / f"short {pixels}"
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):  # noqa: PTH123
            assert shard(tree, small, Options("train", resize_short=pixels), workers=cores) == 0
        size = sum(path.stat().st_size for path in small.glob("*.tar"))
        whole = sum(path.stat().st_size for path in (scratch / "shards").glob("*.tar"))
        found[f"short side {pixels}"] = mae_scale, small
        print(f"short side {pixels}: {size / whole:.2f} of the bytes")
    recipe = Augment((0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25)
    found["RandAugment"] = partial(mae_scale, augment=recipe), scratch / "shards"
    return found


def first_batch(shards: Path, workers: int, share: float) -> float:
    """Measure the seconds from opening the shards to the first batch, at a share of the first
    epoch."""
    began = time.perf_counter()
    with closing(train_loader(shards, workers)) as loader:
        next(loader.batches(int(share * loader.steps_per_epoch)))
        return time.perf_counter() - began


def decode_simplejpeg(data: bytes) -> None:
    """Decode a JPEG with simplejpeg."""
    simplejpeg.decode_jpeg(data, strict=False)


def decode_pil(data: bytes) -> None:
    """Decode an image with PIL."""
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB")


def loading_rate(
    start: Callable[[Path, int], Any], source: Path, workers: int, images: int
) -> tuple[float, float]:
    """Measure images per second of the clock, and per second of the workers' CPU time."""
    cores = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cores[:workers])
        with start(source, workers) as batches:
            for _ in range(WARM_UP):
                next(batches)
            os.sched_setaffinity(0, cores[workers:] or cores)
            children = psutil.Process().children()
            cpu, clock = cpu_seconds(children), time.perf_counter()
            for _ in range(images // BATCH):
                next(batches)
            clock, cpu = time.perf_counter() - clock, cpu_seconds(children) - cpu
            del batches
    finally:
        os.sched_setaffinity(0, cores)
    count = images // BATCH * BATCH
    return count / clock, count / cpu


def decoding_rate(decode: Callable[[bytes], None], files: list[bytes]) -> tuple[float, float]:
    """Measure the same two rates for decoding alone."""
    cores = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cores[:1])
        for data in files[:50]:
            decode(data)
        cpu, clock = time.process_time(), time.perf_counter()
        for data in files:
            decode(data)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    finally:
        os.sched_setaffinity(0, cores)
    return len(files) / clock, len(files) / cpu


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Give the CPU time of processes, in seconds."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of class folders of photographs")
    parser.add_argument("--gigabytes", type=float, default=2, help="to which they are repeated")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=3000, help="images that are timed")
    parser.add_argument("--variants", action="store_true", help="also other settings of ours")
    parser.add_argument("--only-ours", action="store_true", help="leave the peers out")
    parser.add_argument("--scratch", type=Path, help="folder with room for twice the gigabytes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))

    originals = sorted(path for path in args.images.rglob("*") if path.is_file())
    mean_bytes = statistics.mean(path.stat().st_size for path in originals)
    count = int(args.gigabytes * 1e9 / mean_bytes)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        tree, shards = Path(scratch) / "tree", Path(scratch) / "shards"
        total = make_source(args.images, tree, count)
        with_shard_imagenet(cores)(tree, shards)
        files = sorted(path for path in tree.rglob("*") if path.is_file())
        some = permutation(len(files), Purpose.WRITE_ORDER, 0)[: args.count]
        in_memory = [files[i].read_bytes() for i in some]

        ways: dict[tuple[str, int], Callable[[], tuple[float, float]]] = {
            ("decode, simplejpeg", 1): lambda: decoding_rate(decode_simplejpeg, in_memory),
            ("decode, PIL", 1): lambda: decoding_rate(decode_pil, in_memory),
        }
        peers = [("official", official, tree), ("webdataset", with_webdataset, shards)]
        ours: list[tuple[str, Any, Path]] = [("mae-scale", mae_scale, shards)]
        if args.variants:
            more = variants(tree, Path(scratch), cores)
            ours += [(name, *way) for name, way in more.items()]
        for n in args.workers:
            for name, start, source in ours if args.only_ours else [*peers, *ours]:
                ways[name, n] = lambda start=start, source=source, n=n: loading_rate(
                    start, source, n, args.count
                )
        rates: dict[tuple[str, int], list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(args.rounds):
            for way, measure in ways.items():
                rates[way].append(measure())
                print(f"round {number + 1}: {way[0]}, {way[1]}: {rates[way][-1][0]:.0f}/s",
                      file=sys.stderr)  # fmt: skip
        first: dict[tuple[int, float], list[float]] = {}
        for _ in range(2 * args.rounds):
            for n in (0, *args.workers):
                for share in (0.0, 0.95):
                    first.setdefault((n, share), []).append(first_batch(shards, n, share))

    print(
        f"{datetime.date.today()}  {cpu_name()}, {cores} cores, Python {sys.version.split()[0]}, "
        f"torch {torch.__version__},\n            simplejpeg {simplejpeg.__version__}, "
        f"Pillow {Image.__version__}, webdataset {webdataset.__version__}"
    )
    print(
        f"{count:,} JPEGs, {total / 1e9:.2f} GB, {args.count:,} timed, {args.rounds} rounds; "
        "medians of the rounds and of their ratios;\nimages/s, also for each core and for each "
        "second of the workers' CPU time; ratios are per core"
    )
    columns = f"{'x official':>12}{'x webdataset':>14}{'x decode':>10}"
    print(f"{'':20}{'workers':>8}{'img/s':>8}{'per core':>10}{columns}{'per CPU s':>12}{columns}")

    def per_core(way: tuple[str, int]) -> list[float]:
        return [clock / way[1] for clock, _ in rates[way]]

    def per_cpu_second(way: tuple[str, int]) -> list[float]:
        return [cpu for _, cpu in rates[way]]

    for name, n in ways:
        line = f"{name:20}{'' if 'decode' in name else n:>8}"
        line += f"{statistics.median(per_core((name, n))) * n:8.0f}"
        for of, width in ((per_core, 10), (per_cpu_second, 12)):
            line += f"{statistics.median(of((name, n))):{width}.0f}"
            beside = [("official", n), ("webdataset", n), ("decode, simplejpeg", 1)]
            for other, width in zip(beside, (12, 14, 10), strict=True):
                pairs = zip(of((name, n)), of(other), strict=True) if other in ways else []
                line += (
                    f"{statistics.median([a / b for a, b in pairs] or [float('nan')]):{width}.2f}"
                )
        print(line)

    if args.variants:
        print("\nper CPU second, times mae-scale's own without the setting")
        for name, n in ways:
            if name != "mae-scale" and name in {way[0] for way in ours}:
                pairs = zip(rates[name, n], rates["mae-scale", n], strict=True)
                print(f"{name:20}{n:>8}{statistics.median(a[1] / b[1] for a, b in pairs):8.2f}")

    print(f"\n{'first batch':20}{'workers':>8}{'start, s':>10}{'95 %, s':>9}{'ratio':>7}")
    for n in (0, *args.workers):
        start, late = (statistics.median(first[n, share]) for share in (0.0, 0.95))
        print(f"{'':20}{n:8}{start:10.3f}{late:9.3f}{late / start:7.2f}")


if __name__ == "__main__":
    main()
