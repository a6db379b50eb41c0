"""Sharding gives the same bytes for any workers, interruptions and layouts of the images."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_scale.data.preview import PREVIEW
from mae_scale.data.shards import open_shards
from mae_scale.data.tar import make_header
from mae_scale.errors import UserError
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import STOPPED, shard
from mae_scale.sharding.verify import verify
from mae_scale.sharding.writer import ShardingError

SCRIPT = Path(__file__).parents[2] / "data_prep" / "shard_imagenet.py"
OPTIONS = Options("train", seed=3, samples_per_shard=20)


def contents(folder: Path) -> dict[str, str]:
    """Give the SHA-256 of every file in a folder but its picture, including hidden files and
    subfolders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != PREVIEW
    }


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def script(*args: object) -> Result:
    """Run the command in this process: starting Python and importing torch takes seconds."""
    main = runpy.run_path(str(SCRIPT))["main"]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            code = main([*map(str, args)])
        except SystemExit as leave:
            code = leave.code
    return Result(code, out.getvalue(), err.getvalue())


def run_in_process(src: Path, out: Path, options: Options, **more: int) -> multiprocessing.Process:
    """Shard in a process of its own, which exits with shard's code."""

    def target() -> None:
        os.setpgrp()
        os._exit(shard(src, out, options, **more))  # type: ignore[arg-type]

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process  # type: ignore[return-value]


def wait_until(condition: Callable[[], bool], process: multiprocessing.Process) -> None:
    while not condition() and process.is_alive():
        time.sleep(0.001)


@pytest.fixture(scope="module")
def reference(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "train"
    assert shard(imagenet_tree, out, OPTIONS, workers=1) == 0
    return out


def test_images_keep_their_bytes_and_labels(imagenet_tree: Path, reference: Path) -> None:
    shards = open_shards(reference)
    classes = sorted(path.name for path in imagenet_tree.iterdir())
    assert shards.classes == classes
    assert list(shards.samples) == [20] * 12 + [10]
    expected = {
        hashlib.sha256(path.read_bytes()).digest(): classes.index(path.parent.name)
        for path in imagenet_tree.glob("*/*")
    }
    found = {}
    for number, file in enumerate(shards.files):
        tar = Path(file).read_bytes()
        assert len(tar) == shards.bytes[number]
        for offset, size, label in shards.index[shards.starts[number] : shards.starts[number + 1]]:
            found[hashlib.sha256(tar[offset : offset + size]).digest()] = label
    assert found == expected


def test_classes_are_mixed(reference: Path) -> None:
    labels = open_shards(reference).index["label"]
    assert np.abs(np.diff(labels)).mean() > len(labels) / 6  # a random order gives a third


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    imagenet_tree: Path, reference: Path, tmp_path: Path, workers: int
) -> None:
    assert shard(imagenet_tree, tmp_path / "out", OPTIONS, workers=workers) == 0
    assert contents(tmp_path / "out") == contents(reference)


def test_another_seed_gives_another_order(
    imagenet_tree: Path, reference: Path, tmp_path: Path
) -> None:
    other = Options("train", seed=4, samples_per_shard=20)
    assert shard(imagenet_tree, tmp_path / "out", other, workers=2) == 0
    mine, theirs = open_shards(tmp_path / "out").index, open_shards(reference).index
    assert not np.array_equal(mine["label"], theirs["label"])
    assert np.array_equal(np.sort(mine["label"]), np.sort(theirs["label"]))


def test_array_tasks_write_the_same_bytes(
    imagenet_tree: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tasks = [run_in_process(imagenet_tree, out, OPTIONS, num_tasks=3, task_index=i) for i in (2, 0)]
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="finish them with the same"):
        open_shards(out)
    assert shard(imagenet_tree, out, OPTIONS, num_tasks=3, task_index=1) == 0
    assert contents(out) == contents(reference)
    assert shard(imagenet_tree, out, OPTIONS, num_tasks=3, task_index=0) == 0


def test_a_final_run_completes_an_array(
    imagenet_tree: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert shard(imagenet_tree, out, OPTIONS, num_tasks=4, task_index=3) == 0
    assert shard(imagenet_tree, out, OPTIONS, workers=2) == 0
    assert contents(out) == contents(reference)


def test_two_runs_at_once_do_not_disturb_each_other(
    imagenet_tree: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    runs = [run_in_process(imagenet_tree, out, OPTIONS, workers=2) for _ in range(3)]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert contents(out) == contents(reference)


# Interruptions


def send(process: int, number: int) -> None:
    """Send SIGKILL to the parent only, other signals also to its workers, as terminals and Slurm
    do."""
    with suppress(ProcessLookupError):
        if number != signal.SIGKILL:
            os.killpg(process, number)
            return
    os.kill(process, number)


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "at once": lambda out: True,
    "plan written": lambda out: (out / ".sharding" / "plan.json").exists(),
    "first shard begun": lambda out: any((out / ".sharding").glob("*.tar.*.tmp")),
    "first shard there": lambda out: any(out.glob("*.tar")),
    "some records there": lambda out: len(list((out / ".sharding").glob("*.tar.json"))) > 5,
    "all shards there": lambda out: len(list(out.glob("*.tar"))) == 13,
    "index there": lambda out: (out / "index.npy").exists(),
    "manifest there": lambda out: (out / "manifest.json").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moments"),
    [
        (signal.SIGKILL, list(MOMENTS)),
        (signal.SIGTERM, list(MOMENTS)[::2]),
        (signal.SIGINT, list(MOMENTS)[1::2]),
    ],
)
def test_stopped_at_any_moment_the_same_command_goes_on(
    imagenet_tree: Path, reference: Path, tmp_path: Path, number: int, moments: list[str]
) -> None:
    for name in moments:
        out = tmp_path / name
        run = run_in_process(imagenet_tree, out, OPTIONS, workers=2)
        wait_until(lambda: MOMENTS[name](out), run)  # noqa: B023
        send(run.pid, number)  # type: ignore[arg-type]
        run.join()
        assert run.exitcode in (0, STOPPED, -number), name
        # Every file with a final name is whole.
        for tar in out.glob("*.tar"):
            assert contents(reference)[tar.name] == hashlib.sha256(tar.read_bytes()).hexdigest()
        if number != signal.SIGKILL:
            assert not any((out / ".sharding").glob("train-*.tmp"))
        assert shard(imagenet_tree, out, OPTIONS, workers=2) == 0
        assert contents(out) == contents(reference), name


@pytest.mark.slow
def test_killed_again_and_again(imagenet_tree: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kill in range(1, 13):
        run = run_in_process(imagenet_tree, out, OPTIONS, workers=1 + kill % 2)
        wait_until(lambda: len(list(out.glob("*.tar"))) >= kill, run)  # noqa: B023
        run.kill()
        run.join()
    assert shard(imagenet_tree, out, OPTIONS) == 0
    assert contents(out) == contents(reference)


def test_finished_shards_are_kept(imagenet_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = run_in_process(imagenet_tree, out, OPTIONS)
    wait_until(lambda: len(list((out / ".sharding").glob("*.tar.json"))) >= 4, run)
    run.kill()
    run.join()
    before = {
        path.name[: -len(".json")]: (out / path.name[: -len(".json")]).stat().st_ino
        for path in (out / ".sharding").glob("*.tar.json")
    }
    assert len(before) >= 4
    assert shard(imagenet_tree, out, OPTIONS) == 0
    assert {name: (out / name).stat().st_ino for name in before} == before


def test_a_finished_shard_that_changed_is_not_trusted(
    imagenet_tree: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert shard(imagenet_tree, out, OPTIONS, num_tasks=2, task_index=0) == 0
    spoilt = sorted(out.glob("*.tar"))
    spoilt[0].write_bytes(spoilt[0].read_bytes()[:-512])
    data = bytearray(spoilt[1].read_bytes())
    data[5000] ^= 1
    spoilt[1].write_bytes(data)
    spoilt[2].unlink()
    os.utime(spoilt[3])  # only touched
    kept = spoilt[3].stat().st_ino
    whole = spoilt[5].stat().st_ino
    for path, change in ((spoilt[4], b"\1"), (spoilt[5], b"")):  # after a crash of the machine
        state = path.stat()
        with path.open("r+b") as stream:
            stream.seek(9000)
            stream.write(change)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        record = out / ".sharding" / f"{path.name}.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "boot": "before"}))
    assert shard(imagenet_tree, out, OPTIONS, workers=2) == 0
    assert contents(out) == contents(reference)
    assert spoilt[3].stat().st_ino == kept
    assert spoilt[5].stat().st_ino == whole


def test_workers_end_with_a_killed_run(imagenet_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = run_in_process(imagenet_tree, out, OPTIONS, workers=2)
    wait_until(lambda: any(out.glob("*.tar")), run)
    run.kill()
    run.join()
    group = run.pid
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)  # type: ignore[arg-type]
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("writer processes are still there")


def test_the_command_stops_on_a_signal_with_85(imagenet_tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(imagenet_tree), str(tmp_path / "out")]
    command += ["--split", "train", "--samples-per-shard", "10"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any((tmp_path / "out" / ".sharding").glob("train-*.json")):
        time.sleep(0.001)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate()
    assert run.returncode == STOPPED
    assert "the same command goes on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "going on: " in again.stdout
    assert verify(tmp_path / "out").problems == []


# A finished folder, and one that belongs to something else


def test_a_finished_folder_is_left_as_it_is(imagenet_tree: Path, reference: Path) -> None:
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in reference.iterdir()}
    result = script(
        imagenet_tree, reference, "--split", "train", "--seed", 3, "--samples-per-shard", 20
    )
    assert result.returncode == 0
    assert "is complete: 250 images in 13 shards" in result.stdout
    after = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in reference.iterdir()}
    after.pop(PREVIEW, None)  # drawn where it was not there
    before.pop(PREVIEW, None)
    assert after == before


def test_a_lost_shard_of_a_finished_folder_is_written_again(
    imagenet_tree: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    (out / "train-000003.tar").unlink()
    (out / "train-000007.tar").write_bytes(b"short")
    assert shard(imagenet_tree, out, OPTIONS, workers=2) == 0
    assert contents(out) == contents(reference)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (Options("train", seed=5, samples_per_shard=20), "seed 3 there, 5 now"),
        (Options("train", seed=3, samples_per_shard=30), "samples_per_shard 20 there, 30 now"),
        (Options("val", seed=3, samples_per_shard=20), "split train there, val now"),
        (
            Options("train", seed=3, samples_per_shard=20, resize_short=64),
            "resize_short None there, 64 now",
        ),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_options_are_an_error_that_shows_the_difference(
    imagenet_tree: Path,
    reference: Path,
    tmp_path: Path,
    options: Options,
    difference: str,
    finished: bool,
) -> None:
    out = reference
    if not finished:
        out = tmp_path / "out"
        assert shard(imagenet_tree, out, OPTIONS, num_tasks=2, task_index=0) == 0
    before = contents(out)
    with pytest.raises(UserError, match=difference):
        shard(imagenet_tree, out, options)
    assert contents(out) == before


def test_another_source_is_an_error(imagenet_tree: Path, reference: Path, tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(imagenet_tree, src)
    image = next(src.glob("*/*"))
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(UserError, match="source_sha256"):
        shard(src, reference, OPTIONS)


def test_tars_of_others_are_not_touched(imagenet_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds tars of something else"):
        shard(imagenet_tree, out, OPTIONS)
    assert contents(out).keys() == {"train-000000.tar"}


# Damage, quirks, options


def small_tree(imagenet_tree: Path, folder: Path, count: int = 12) -> Path:
    for path in sorted(imagenet_tree.glob("*/*"))[:count]:
        (folder / path.parent.name).mkdir(parents=True)
        shutil.copy(path, folder / path.parent.name)
    return folder


def test_damaged_images_are_named_left_out_and_counted(imagenet_tree: Path, tmp_path: Path) -> None:
    src = small_tree(imagenet_tree, tmp_path / "src")
    images = sorted(src.glob("*/*"))
    images[1].write_bytes(images[1].read_bytes()[:9000])
    images[4].write_bytes(b"")
    images[7].write_text("not an image")
    result = script(src, tmp_path / "out", "--split", "train", "--workers", 2)
    assert result.returncode == 0, result.stderr
    for i in (1, 4, 7):
        lines = [line for line in result.stderr.splitlines() if images[i].name in line]
        assert len(lines) == 1
        assert lines[0].startswith("damaged, left out: ")
    assert "9 images of 12 classes" in result.stdout
    assert "3 damaged images left out" in result.stdout
    assert len(open_shards(tmp_path / "out")) == 9
    assert len(open_shards(tmp_path / "out").classes) == 12  # labels don't move
    assert verify(tmp_path / "out").problems == []


def test_a_shard_of_damaged_images_only_is_not_written(imagenet_tree: Path, tmp_path: Path) -> None:
    src = small_tree(imagenet_tree, tmp_path / "src")
    sorted(src.glob("*/*"))[3].write_bytes(b"spoilt")
    assert shard(src, tmp_path / "out", Options("train", samples_per_shard=1), workers=2) == 0
    shards = open_shards(tmp_path / "out")
    assert list(shards.samples) == [1] * 11
    assert len(list((tmp_path / "out").glob("*.tar"))) == 11
    assert verify(tmp_path / "out").problems == []


def test_only_damaged_images_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "x.jpg").write_bytes(b"spoilt")
    result = script(tmp_path / "src", tmp_path / "out", "--split", "train")
    assert result.returncode == 2
    assert "none of the 1 images can be decoded" in result.stderr
    assert not (tmp_path / "out").exists()


def test_quirks_decode_to_the_rgb_that_pil_gives(imagenet_tree: Path, tmp_path: Path) -> None:
    photos = [Image.open(path) for path in sorted(imagenet_tree.glob("*/*"))[:6]]
    folder = tmp_path / "src" / "n02105855"
    folder.mkdir(parents=True)
    photos[0].convert("RGB").save(folder / "png.JPEG", "PNG")
    photos[1].convert("CMYK").save(folder / "cmyk.JPEG", "JPEG")
    photos[2].convert("L").save(folder / "grey.JPEG", "JPEG")
    photos[3].convert("RGB").save(folder / "exif.JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffbroken")
    photos[4].convert("RGBA").save(folder / "alpha.PNG", "PNG")
    photos[5].convert("P").save(folder / "palette.png", "PNG")
    assert shard(tmp_path / "src", tmp_path / "out", Options("train")) == 0
    shards = open_shards(tmp_path / "out")
    assert len(shards) == 6
    tar = Path(shards.files[0]).read_bytes()
    stored = {tar[o : o + s] for o, s, _ in shards.index.tolist()}
    assert stored == {path.read_bytes() for path in folder.iterdir()}
    for data in stored:
        assert Image.open(io.BytesIO(data)).convert("RGB").size


def test_names_that_are_no_keys(imagenet_tree: Path, tmp_path: Path) -> None:
    photos = sorted(imagenet_tree.glob("*/*"))[:4]
    undecodable = os.fsdecode(b"cat/\xff.jpg")
    names = ["dog/1.jpg", undecodable, "dog/a.b c.jpg", f"ünï cödé/{'long' * 50}.JPG"]
    for photo, name in zip(photos, names, strict=True):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, path)
    assert shard(tmp_path / "src", tmp_path / "out", Options("train")) == 0
    assert open_shards(tmp_path / "out").classes == ["cat", "dog", "ünï cödé"]
    assert verify(tmp_path / "out").problems == []


def test_resizing(imagenet_tree: Path, tmp_path: Path) -> None:
    src = small_tree(imagenet_tree, tmp_path / "src")
    for workers in (1, 2):
        options = Options("train", resize_short=48, quality=80, samples_per_shard=5)
        assert shard(src, tmp_path / f"out{workers}", options, workers=workers) == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    shards = open_shards(tmp_path / "out1")
    tar = Path(shards.files[0]).read_bytes()
    for offset, size, _ in shards.index[: shards.samples[0]].tolist():
        assert min(Image.open(io.BytesIO(tar[offset : offset + size])).size) == 48


def test_the_size_of_shards(imagenet_tree: Path, tmp_path: Path) -> None:
    assert shard(imagenet_tree, tmp_path / "out", Options("train", shard_size=5_000_000)) == 0
    sizes = open_shards(tmp_path / "out").bytes
    assert len(sizes) == round(sizes.sum() / 5_000_000)
    assert np.all(np.abs(sizes - 5_000_000) < 2_000_000)


def test_dry_run(imagenet_tree: Path, tmp_path: Path) -> None:
    result = script(
        imagenet_tree, tmp_path / "a" / "out", "--split", "train", "--dry-run",
        "--shard-size", "5MB",
    )  # fmt: skip
    assert result.returncode == 0
    size = sum(file.stat().st_size for file in imagenet_tree.rglob("*.JPEG"))
    for part in (f"images: 250 in 250 classes, {size / 1e6:.1f} MB\n", "free space: "):
        assert part in result.stdout
    pattern = r"shards: (\d) of (\d+) to (\d+) images, (\d+\.\d) MB in all"
    ((shards, least, most, in_all),) = re.findall(pattern, result.stdout)
    assert int(shards) == round(float(in_all) / 5) and float(in_all) > size / 1e6
    assert int(least) == 250 // int(shards) and int(most) == -(-250 // int(shards))
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_one_clear_error(
    imagenet_tree: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    biggest = max(path.stat().st_size for path in reference.glob("*.tar"))

    def target() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (biggest - 1, biggest - 1))
        try:
            shard(imagenet_tree, out, OPTIONS, workers=2)
        except ShardingError as error:
            (tmp_path / "error").write_text(str(error))

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    assert "no room for train-0000" in (tmp_path / "error").read_text()
    assert not (out / "manifest.json").exists()
    assert not any((out / ".sharding").glob("*.tar.*.tmp"))
    assert shard(imagenet_tree, out, OPTIONS, workers=2) == 0
    assert contents(out) == contents(reference)


# Bad input: one line, exit code 2, nothing left behind


def test_bad_input(imagenet_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "split" / "val" / "a").mkdir(parents=True)
    shutil.copy(next(imagenet_tree.glob("*/*")), tmp_path / "split" / "val" / "a")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "new" / "out"
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "missing", out], "does not exist"),
        ([tmp_path / "file", out], "is not a folder"),
        ([tmp_path / "empty", out], "holds no images"),
        ([tmp_path / "split", out], "has no train split; it has: val"),
        ([imagenet_tree, tmp_path / "file"], "is not a folder"),
        ([imagenet_tree, imagenet_tree / "out"], "lies inside the source"),
        ([imagenet_tree, out, "--task-index", 2, "--num-tasks", 2], "outside 0 to 1"),
        ([imagenet_tree, out, "--quality", 80], "only with --resize-short"),
        ([imagenet_tree, out, "--shard-size", "big"], "is no size"),
        ([imagenet_tree, out, "--samples-per-shard", 0], "no whole number above 0"),
    ]
    for args, message in cases:
        result = script(*args, "--split", "train")
        assert result.returncode == 2, args
        assert message in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", [0, 7, 511, 107_565, 8**11 - 1])
def test_tar_headers_are_those_of_tarfile(size: int) -> None:
    for name in ("a.jpg", "n01440764_10026.jpg", "x" * 100):
        info = tarfile.TarInfo(name)
        info.size = size
        assert make_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_the_manifest(reference: Path) -> None:
    manifest = json.loads((reference / "manifest.json").read_bytes())
    assert manifest["version"] == 1
    assert manifest["split"] == "train"
    assert manifest["num_samples"] == 250
    for entry in manifest["shards"]:
        data = (reference / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
