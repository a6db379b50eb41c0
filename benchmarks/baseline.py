#!/usr/bin/env python3
"""Measure what `mae-scale shard --baseline` gains and costs on progressive JPEGs.

The photographs are encoded as progressive JPEGs with their own tables (Pillow, quality "keep"), and
these are made baseline. Both are decoded in turns as the loader does; the pixels must be equal.
"""

from __future__ import annotations

import argparse
import datetime
import io
import statistics
import sys
import time
from pathlib import Path

import jpeglib
import numpy as np
import simplejpeg
from machine import cpu_name
from PIL import Image

from mae_scale.sharding.baseline import make_baseline


def progressive(path: Path) -> bytes | None:
    """Encode a photograph as a progressive JPEG; return None where it is no JPEG in colour."""
    with Image.open(path) as image:
        if image.format != "JPEG" or image.mode != "RGB":
            return None
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality="keep", progressive=True)
    return stream.getvalue()


def cpu_ms(data: bytes) -> float:
    """Measure the CPU milliseconds for decoding an image."""
    start = time.process_time()
    simplejpeg.decode_jpeg(data, strict=False)
    return (time.process_time() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    before, after, making = [], [], 0.0
    for path in sorted(p for p in args.images.rglob("*") if p.is_file())[: args.count]:
        if (data := progressive(path)) is None:
            continue
        start = time.process_time()
        made = make_baseline(data)
        making += time.process_time() - start
        if made is None:
            sys.exit(f"{path} could not be made baseline")
        decoded = (simplejpeg.decode_jpeg(d, strict=False) for d in (data, made))
        if not np.array_equal(*decoded):
            sys.exit(f"{path} has other pixels")
        before.append(data)
        after.append(made)
    ratios, times = [], []
    for _ in range(args.rounds):
        pairs = [(cpu_ms(a), cpu_ms(b)) for a, b in zip(before, after, strict=True)]
        slow, fast = (sum(t) for t in zip(*pairs, strict=True))
        ratios.append(slow / fast)
        times.append((slow / len(before), fast / len(before)))
    slow, fast = (statistics.median(t) for t in zip(*times, strict=True))
    print(
        f"{datetime.date.today()}  {cpu_name()}, Python {sys.version.split()[0]}, "
        f"jpeglib {jpeglib.__version__}, simplejpeg {simplejpeg.__version__}"
    )
    print(f"{len(before)} photographs, all with equal pixels; medians of {args.rounds} rounds, CPU")
    print(f"decoding   progressive {slow:.2f} ms, baseline {fast:.2f} ms")
    print(f"           {statistics.median(ratios):.2f} times as fast")
    print(f"bytes      {sum(map(len, after)) / sum(map(len, before)):.3f} times those before")
    print(
        f"making it  {making / len(before) * 1e3:.1f} ms an image, with both decoded and compared"
    )


if __name__ == "__main__":
    main()
