#!/usr/bin/env python3
"""Compare MAE pre-training with training from scratch on CIFAR-10, in a table and curves.

    python benchmarks/cifar10/run.py DATA OUT [--setting gpu] [--figure docs/figures/cifar10.png]

DATA holds cifar10_train.tar and cifar10_test.tar, members <class>/<number>.jpg. OUT gets images,
shards and runs; what is there is not done again. The runs are those of the sweep cpu.yaml or
gpu.yaml beside this file. Ends with 1 unless pre-training wins with every seed: fine-tuned against
trained from scratch, and probed against a random encoder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mae_scale.commands.sweep import table
from mae_scale.train.records import METRICS, read_metrics

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
from machine import header  # noqa: E402

PER_CLASS = {"cpu": 1000, "gpu": 5000}  # training images
TRAINED, SCRATCH = "pre-trained", "random weights"  # rows of the sweeps


def unpack(tar: Path, folder: Path, per_class: int) -> None:
    """Unpack the first images of each class, by name."""
    if folder.exists():
        return
    with tarfile.open(tar) as file:
        members = sorted((m for m in file.getmembers() if m.isfile()), key=lambda m: m.name)
        taken: dict[str, int] = {}
        chosen = []
        for member in members:
            name = Path(member.name).parent.name
            taken[name] = taken.get(name, 0) + 1
            if taken[name] <= per_class:
                chosen.append(member)
        unfinished = folder.with_name(folder.name + ".unfinished")
        file.extractall(unfinished, chosen, filter="data")
        unfinished.rename(folder)


def make_shards(data: Path, out: Path, per_class: int) -> None:
    """Make shards of that many training images a class and of all test images."""
    for split, tar, number in (("train", "train", per_class), ("val", "test", 10**9)):
        unpack(data / f"cifar10_{tar}.tar", out / "images" / split, number)
        script = REPOSITORY / "data_prep" / "shard_imagenet.py"
        folders = (out / "images" / split, out / "shards" / split)
        subprocess.run([sys.executable, script, *folders, "--split", split], check=True)


def verdicts(results: list[dict[str, Any]]) -> list[tuple[str, list[float]]]:
    """Compute by how many points pre-training wins, for each seed."""
    rows = {row["name"]: row for row in results}
    found = []
    for task, what in (
        ("finetune", "fine-tuned - trained from scratch"),
        ("linprobe", "probed - a random encoder probed"),
    ):
        pairs = zip(rows[TRAINED][task], rows[SCRATCH][task], strict=True)
        found.append((what, [trained - other for trained, other in pairs]))
    return found


def draw(path: Path, runs: Path, results: list[dict[str, Any]], title: str) -> None:
    """Draw the loss of pre-training, the losses of training with and without it, and accuracies."""
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    pretraining, training, accuracy = figure.subplots(1, 3)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    blue, red = "#1f5fa8", "#b3261e"
    for seed in sorted(runs.glob("seed*")):
        first = seed.name == "seed0"
        rows = read_metrics(seed / "pretrain" / TRAINED / METRICS)
        pretraining.plot([r["epoch"] for r in rows], [r["loss"] for r in rows], color=blue)
        for name, color, label in (
            (TRAINED, blue, "pre-trained"),
            (SCRATCH.replace(" ", "-"), red, "from scratch"),
        ):
            rows = read_metrics(seed / "finetune" / name / METRICS)
            x, y = [r["epoch"] for r in rows], [r["loss"] for r in rows]
            training.plot(x, y, color=color, label=label if first else None)
    pretraining.set(title="Pre-training, a line a seed", xlabel="epoch", ylabel="loss")
    training.set(title="Training of all weights", xlabel="epoch", ylabel="cross-entropy")
    training.legend(frameon=False)
    bars = [
        (f"{row['name']}{': linear probe' if task == 'linprobe' else ''}", row[task], color)
        for row in results
        for task in ("finetune", "linprobe")
        for color in (red if row["name"] == SCRATCH else blue,)
        if task in row
    ]
    bars.sort(key=lambda bar: sum(bar[1]))
    for place, (_, values, color) in enumerate(bars):
        accuracy.barh(place, sum(values) / len(values), color=color, alpha=0.75)
        accuracy.plot(values, [place] * len(values), "o", color="black", markersize=3)
        accuracy.text(max(values) + 1, place, f"{sum(values) / len(values):.1f}", va="center")
    accuracy.set_yticks(range(len(bars)), [name for name, *_ in bars])
    accuracy.set(title="Top-1 on the test images, %; dots: seeds", xlim=(0, 100))
    for axes in (pretraining, training, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--setting", choices=PER_CLASS, default="cpu")
    parser.add_argument("--figure", type=Path, help="default: cifar10.png in OUT")
    options = parser.parse_args()
    began = time.monotonic()
    make_shards(options.data, options.out, PER_CLASS[options.setting])
    sweep, runs = HERE / f"{options.setting}.yaml", options.out / "runs"
    shards = [f"--data.{split}={options.out / 'shards' / split}" for split in ("train", "val")]
    command = [sys.executable, "-m", "mae_scale", "sweep", sweep, *shards, "--run_dir", runs]
    code = subprocess.run(command, stdout=sys.stderr).returncode
    if code:
        return code
    results = json.loads((runs / "sweep.json").read_text())
    title = f"MAE on CIFAR-10, {options.setting} setting"
    draw(options.figure or options.out / "cifar10.png", runs, results, title)
    print(header("deepspeed", "timm"))
    print(table(title, results))
    wins = True
    for what, points in verdicts(results):
        print(f"{what}: {', '.join(f'{p:+.2f}' for p in points)} points")
        wins = wins and min(points) > 0
    print(f"pre-training {'wins' if wins else 'does not win'} with every seed; "
          f"{(time.monotonic() - began) / 60:.0f} minutes")  # fmt: skip
    return 0 if wins else 1


if __name__ == "__main__":
    sys.exit(main())
