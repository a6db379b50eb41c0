"""The main job in one command: shard photographs, pre-train, stop, go on, and draw pictures.

    python examples/demo.py [FOLDER] [--steps N] [--out DIR]

FOLDER holds your own photographs; without it, the demo takes photographs that Python packages
contain (photographs.py). Finished parts are not done again: after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from matplotlib.figure import Figure
from photographs import write_own_photographs, write_sample_photographs

from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError
from mae_scale.launch.stopping import STOPPED
from mae_scale.train.records import read_metrics
from mae_scale.train.run_dir import read_history

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
BATCH = 32  # batch of the recipe


def demo(own: Path | None, steps: int, out: Path) -> None:
    """Run all parts, and print for each the command that does it."""
    out = out / ("sample-photographs" if own is None else own.resolve().name)
    say(1, "Photographs")
    tree = out / "photographs"
    if not tree.exists():
        write_sample_photographs(tree) if own is None else write_own_photographs(own, tree)
    count = len(list((tree / "train").rglob("*.jpg")))
    print(f"{count} pieces of photographs in {shown(tree)}")

    say(2, "Shards: WebDataset tars, a manifest and an index")
    shards, run = out / "shards", out / "run"
    script = REPOSITORY / "data_prep" / "shard_imagenet.py"
    command([sys.executable, script, tree / "train", shards, "--split", "train",
             "--samples-per-shard", 100])  # fmt: skip

    say(3, "Pre-training on two processes with DeepSpeed ZeRO-2, stopped half-way by SIGTERM")
    epochs = max(1, round(steps * BATCH / len(open_shards(shards))))
    pretrain = [
        # This module is `deepspeed`, whose script does not start from a path with a space in it.
        # It would call the stop below an error.
        sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=critical", "--num_gpus", 2,
        "--module", "--master_port", free_port(), "mae_scale", "pretrain", "--config", "demo",
        "--data.train", shards, "--run_dir", run, "--train.epochs", epochs,
        "--train.log_every", max(1, min(20, steps // 8)),
    ]  # fmt: skip
    code = command(pretrain, {0, STOPPED}, until=lambda: half_way(run, steps))
    if code == STOPPED:
        say(4, "The same command again: it goes on where it stopped")
        pretrain[8] = free_port()
        command(pretrain)

    say(5, "Pictures")
    reconstructions, loss = out / "reconstructions.png", out / "loss.png"
    seen = [middle(folder) for folder in sorted((tree / "train").iterdir())][:10]
    unseen = [middle(folder) for folder in sorted((tree / "val").iterdir())][:2]
    command([BIN / "mae-scale", "reconstruct", run, *seen, *unseen, "--out", reconstructions])
    rows = read_metrics(run / "metrics.jsonl")
    stops = [event["step"] for event in read_history(run) if event["event"] == "resumed"]
    draw_loss(loss, rows, stops)
    print(f"""
Done. Loss {rows[0]["loss"]:.3f} -> {rows[-1]["loss"]:.3f} in {rows[-1]["step"]} steps.

  {shown(reconstructions)}
      what the model sees (a quarter of each image) and what it makes of the rest; its own version
      of the visible patches means nothing, since they do not count in the loss. Photographs that
      it never saw come last: {", ".join(file.name for file in unseen)}
  {shown(loss)}
      one curve; the dashed line marks where it was stopped
  {shown(run)}
      config.yaml, metrics.jsonl, checkpoints/, reconstructions/, tensorboard/

Try next:
  make demo DATA=folder                     the same with your own photographs
  .venv/bin/mae-scale pretrain --help       every config key
  .venv/bin/mae-scale report {shown(run)} --out report.html
  docs/guide.md                             from here to a fine-tuned model, step by step
""")


def draw_loss(path: Path, rows: list[dict], stops: list[int]) -> None:  # type: ignore[type-arg]
    """Draw the loss against the step, with a dashed line at each stop."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="optimiser step", ylabel="loss (removed patches)")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    for number, step in enumerate(stops):
        label = None if number else "stopped, resumed"
        axes.axvline(step, color="tab:red", linestyle="--", label=label)
    if stops:
        axes.legend()
    figure.savefig(path)


def middle(folder: Path) -> Path:
    """Cut the middle piece out of a photograph."""
    files = sorted(folder.iterdir())
    return files[len(files) // 2]


def say(number: int, what: str) -> None:
    """Print the heading of a part of the demo."""
    print(f"\n== {number}. {what}", flush=True)


def shown(path: Path) -> str:
    """Give a path as one would type it from the repository."""
    return shlex.quote(os.path.relpath(path, Path.cwd()))


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def half_way(run: Path, steps: int) -> bool:
    """Return whether a run that was never stopped has done half of its steps."""
    rows = read_metrics(run / "metrics.jsonl")
    fresh = all(event["event"] == "started" for event in read_history(run))
    return fresh and bool(rows) and rows[-1]["step"] >= steps // 2


def command(words: list[object], good: set[int] | None = None, until=None) -> int:  # type: ignore[no-untyped-def]
    """Run a command; when `until()` is true, send SIGTERM to one of its processes.

    Ctrl-C reaches the command, too; it is then waited for until it has saved.
    """
    texts = [str(word) for word in words]
    print("$", " ".join(shown(Path(t)) if t.startswith("/") else t for t in texts), flush=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(texts, env=environment)
    family: list[psutil.Process] = []
    try:
        while process.poll() is None:
            time.sleep(0.1)  # a short run is soon past its half
            family = psutil.Process(process.pid).children(recursive=True) or family
            if until is not None and until():
                until = None
                rank = next(p for p in family if "RANK" in p.environ())
                print(f"$ kill -TERM {rank.pid}", flush=True)
                rank.send_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        psutil.wait_procs(family, timeout=60)
        raise UserError("interrupted; make demo goes on from here") from None
    if process.returncode not in (good or {0}):
        raise UserError(f"the command above failed with exit code {process.returncode}")
    return process.returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="photographs of your own")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps, about")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "demo", help="where all goes")
    arguments = parser.parse_args()
    try:
        demo(arguments.folder, arguments.steps, arguments.out)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
