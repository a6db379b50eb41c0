"""The demo, shortened, on the user's own photographs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image
from runs import REPOSITORY

from mae_scale.train.run_dir import read_history


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "examples" / "demo.py", *arguments]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=400)


def test_demo_on_own_photographs_is_stopped_and_goes_on(
    tmp_path: Path, imagenet_tree: Path
) -> None:
    own = tmp_path / "my photographs"
    own.mkdir()
    for file in sorted(imagenet_tree.rglob("*.JPEG"))[:3]:
        (own / file.name).write_bytes(file.read_bytes())
    (own / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    done = demo(own, "--out", out, "--steps", "32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broken.jpg cannot be read" in done.stderr
    assert "the same command goes on" in done.stderr and "going on from step-" in done.stderr
    assert "Traceback" not in done.stderr
    place = out / own.name
    for picture in ("reconstructions.png", "loss.png"):
        with Image.open(place / picture) as image:
            assert min(image.size) > 300
    events = [event["event"] for event in read_history(place / "run")]
    assert events == ["started", "saved", "stopped", "resumed", "finished"]
    again = demo(own, "--out", out, "--steps", "32")
    assert again.returncode == 0 and "is finished" in again.stderr


def test_demo_without_photographs(tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "holds no images"), (tmp_path / "no", "there is no folder")):
        done = demo(folder, "--out", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
