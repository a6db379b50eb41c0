"""Commands as a user runs them on a GPU: exit codes, stopping and going on, bits of the losses.

They share the device and run at the same time: what counts is that they end well, not how fast.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

STAGES = ("zero0", "zero1", "zero2", "zero3")
SMALL_STAGES = ("zero3",)
LONGEST = 240  # seconds of a command
TINY = ("--model.img_size", 32, "--model.patch_size", 8, "--model.depth", 2)
Result = dict[str, Any]


def image_folder(folder: Path, count: int) -> Path:
    """Make two classes of noisy JPEGs, of the size that ImageNet's have."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375)).save(place / f"{number}.jpg", quality=90)
    return folder


def shards(folder: Path, count: int) -> Path:
    """Make a few shards by the project's own command."""
    images, out = image_folder(folder / "images", count), folder / "shards"
    done = run("shard", images, out, "--split", "train", "--workers", 2)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return out


def command_of(*arguments: object) -> list[str]:
    """Give the command line that runs mae-scale with these arguments."""
    return [sys.executable, "-m", "mae_scale", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run mae-scale to its end."""
    return subprocess.run(command_of(*arguments), capture_output=True, text=True, timeout=LONGEST)


def pretrain(data: Path, stage: str, small: bool) -> list[object]:
    """Give the arguments of a short pre-training."""
    return [
        *("pretrain", "--deepspeed", stage, "--data.train", data, "--data.workers", 1),
        *("--model.name", "mae_vit_tiny_patch16" if small else "mae_vit_base_patch16"),
        *("--optim.warmup_epochs", 1, "--train.epochs", 40, "--train.deterministic", "true"),
        *("--train.global_batch_size", 8, "--train.micro_batch_size", 4, "--train.log_every", 1),
        *("--train.reconstruct_every", "null", "--checkpoint.every_steps", 4),
        *(TINY if small else ()),
    ]  # fmt: skip


def stages(data: Path, folder: Path, small: bool) -> Iterator[Result]:
    """Train, stop on a signal, go on to the end, for each stage, beside a run without a stop."""
    names = SMALL_STAGES if small else STAGES
    with ThreadPoolExecutor(len(names)) as pool:
        yield from pool.map(partial(stage_result, data, folder, small), names)


def stage_result(data: Path, folder: Path, small: bool, stage: str) -> Result:
    """Run one stage with a stop and without, both with train.deterministic."""
    stopped, straight = folder / stage, folder / f"{stage} without a stop"
    arguments, limit = pretrain(data, stage, small), ("--train.max_steps", 12)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(run, *arguments, *limit, "--run_dir", straight)
        long = command_of(*arguments, "--train.max_steps", 500, "--run_dir", stopped)
        first = _until_signalled(long, stopped)
        again = run(*arguments, *limit, "--run_dir", stopped)
        other = beside.result()
    losses, wanted = _losses(stopped), _losses(straight)
    codes = [first, again.returncode, other.returncode]
    result: Result = {
        "stage": stage, "exit_codes": codes, "steps": len(losses),
        "seconds": round(time.monotonic() - began, 1),
        "same_losses": losses == wanted and len(wanted) == 12,
        "ok": codes == [85, 0, 0] and [*losses] == [*range(1, len(losses) + 1)],
    }  # fmt: skip
    if not result["ok"]:
        result["error"] = _last_lines(again) or _last_lines(other)
    return result


def _losses(run_dir: Path) -> dict[int, float]:
    metrics = run_dir / "metrics.jsonl"
    rows = map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else ()
    return {row["step"]: row["loss"] for row in rows}


def _last_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.strip().splitlines() if line][-3:]


def _until_signalled(command: list[str], run_dir: Path) -> int:
    """Start, send SIGTERM after the third step, and give the exit code."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics, ends = run_dir / "metrics.jsonl", time.monotonic() + LONGEST
    while process.poll() is None and time.monotonic() < ends:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 3:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    try:
        return process.wait(120)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def commands(data: Path, folder: Path, small: bool) -> Iterator[Result]:
    """Run what a user does with a pre-trained model; each row is a command with its exit code."""
    mae, images = folder / "mae", sorted((folder / "images").rglob("*.jpg"))[:2]
    yield _row("pretrain", *pretrain(data, "zero1", small), "--train.max_steps", 4,
               "--run_dir", mae)  # fmt: skip
    short = [
        *("--data.train", data, "--data.val", data, "--data.workers", 1, "--weights", mae),
        *("--train.global_batch_size", 16, "--train.micro_batch_size", 8, "--train.epochs", 1),
        *("--train.max_steps", 4, "--train.log_every", 1, "--optim.warmup_epochs", 0),
        *("--model.name", "mae_vit_tiny_patch16" if small else "mae_vit_base_patch16"),
        *(TINY if small else ()),
    ]  # fmt: skip
    tuned, later = folder / "finetuned", []
    if not small:
        wide = ("--deepspeed", "zero2", "--train.compile", "true", "--optim.clip_grad", 1)
        more = pretrain(data, "zero0", small)
        later += [
            ("linprobe", "linprobe", *short, "--run_dir", folder / "probed"),
            ("finetune, compiled, zero2", "finetune", *short, *wide, "--run_dir", folder / "two"),
            ("features", "features", mae, data, "--out", folder / "features.npy"),
            ("knn", "knn", mae, data),
            ("export", "export", mae, folder / "mae.pth", "--to", "official"),
            ("pretrain, compiled, zero0", *more, "--train.compile", "true", "--train.max_steps", 4,
             "--run_dir", folder / "compiled"),
            ("pretrain, fp32 weights", *more, "--train.autocast", "true", "--train.max_steps", 4,
             "--run_dir", folder / "autocast"),
            ("pretrain, zero3_offload", *pretrain(data, "zero3_offload", small),
             "--train.max_steps", 4, "--run_dir", folder / "offload"),
        ]  # fmt: skip
    later.append(("reconstruct", "reconstruct", mae, *images, "--out", folder / "out.png"))
    with ThreadPoolExecutor(len(later) + 1) as pool:
        first = pool.submit(_row, "finetune", "finetune", *short, "--run_dir", tuned)
        rows = [pool.submit(_row, *arguments) for arguments in later]
        yield from (row.result() for row in [first, *rows])
    if not small:
        yield _row("evaluate", "evaluate", tuned, f"val={data}")
        yield _row("predict", "predict", tuned, *images, "--out", folder / "predictions")


def _row(title: str, *arguments: object) -> Result:
    began = time.monotonic()
    try:
        done = run(*arguments)
    except subprocess.TimeoutExpired:
        return {"command": title, "error": f"it ran for more than {LONGEST} seconds"}
    result: Result = {"command": title, "exit_code": done.returncode}
    result["seconds"] = round(time.monotonic() - began, 1)
    if done.returncode:
        result["error"] = _last_lines(done)
    return result
