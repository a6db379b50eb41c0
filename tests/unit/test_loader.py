"""The loaders: the same stream for any ranks and workers, damage, signals, and clean ends."""

from __future__ import annotations

import io
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import warm
from make_shards import make_shards
from PIL import Image

from mae_scale.data.loader import EvalLoader, TrainLoader
from mae_scale.data.order import SampleOrder
from mae_scale.data.reader import ShardReader
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.data.transforms import TRAIN_UNIFORMS, decode_image, eval_crop, train_crop
from mae_scale.errors import RunError, UserError
from mae_scale.launch.descriptors import room_for_shards
from mae_scale.models.masking import mask_noise
from mae_scale.randomness import Purpose, uniform

SAMPLES = [40, 1, 30, 9, 0, 17]  # 97 in all: prime
SEED = 3


@pytest.fixture(scope="module")
def photographs(imagenet_tree: Path) -> list[bytes]:
    """Give 97 real photographs, shrunk so that tests are quick."""
    small = []
    for path in sorted(imagenet_tree.glob("*/*.JPEG"))[: sum(SAMPLES)]:
        with Image.open(path) as image:
            image = image.convert("RGB")
            image.thumbnail((96, 96))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=90)
        small.append(stream.getvalue())
    return small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photographs: list[bytes]) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"), photographs, SAMPLES)


@pytest.fixture(scope="module")
def shards(folder: Path) -> ShardSet:
    return open_shards(folder)


def train_loader(shards: ShardSet, **changes: object) -> TrainLoader:
    settings: dict = {
        "img_size": 32, "seed": SEED, "lanes": 6, "window": 5, "global_batch_size": 24,
        "micro_batch_size": 24, "rank": 0, "world_size": 1, "workers": 0,
    }  # fmt: skip
    return TrainLoader(shards, **{**settings, **changes})


def stream(loader: TrainLoader, batches: int, start_step: int = 0) -> dict[str, torch.Tensor]:
    """Give the first micro-batches, one after the other."""
    got = list(islice(loader.batches(start_step), batches))
    loader.close()
    return {key: torch.cat([batch[key] for batch in got]) for key in got[0]}


@pytest.fixture(scope="module")
def alone(shards: ShardSet) -> dict[str, torch.Tensor]:
    """Give nine steps of one rank without workers: two epochs of four steps, and one step."""
    return stream(train_loader(shards), 9)


def test_a_batch_is_what_the_order_and_the_hash_say(
    alone: dict[str, torch.Tensor], photographs: list[bytes]
) -> None:
    assert alone["image"].shape == (9 * 24, 3, 32, 32)
    assert alone["image"].dtype == torch.uint8
    assert alone["epoch"].tolist() == [e for e in (0, 1) for _ in range(96)] + [2] * 24
    for epoch in (0, 1):
        seen = alone["sample"][alone["epoch"] == epoch]
        assert len(seen.unique()) == 96  # of 97 samples, each at most once
    assert torch.equal(alone["label"], alone["sample"] % 10)
    for i in range(0, 9 * 24, 7):
        epoch, sample = int(alone["epoch"][i]), int(alone["sample"][i])
        u = uniform(Purpose.AUGMENT, SEED, epoch, sample, np.arange(TRAIN_UNIFORMS))
        assert torch.equal(alone["image"][i], train_crop(decode_image(photographs[sample]), 32, u))


def test_repeats_are_other_views_of_the_samples_of_a_step(
    shards: ShardSet, alone: dict[str, torch.Tensor], photographs: list[bytes]
) -> None:
    """A step has three views of each sample, next to each other; the first is that without
    repeats."""
    loader = train_loader(shards, repeats=3)
    assert loader.steps_per_epoch == 97 // 8
    got = stream(loader, 13)
    assert torch.equal(got["sample"][::3][:96], alone["sample"][:96])
    assert torch.equal(got["image"][::3][:96], alone["image"][:96])
    assert got["sample"].view(-1, 3).eq(got["sample"][::3, None]).all()
    assert len(got["sample"][: 12 * 24].unique()) == 96  # an epoch has each sample at most once
    for i in range(0, 13 * 24, 7):
        epoch, sample = int(got["epoch"][i]), int(got["sample"][i])
        assert epoch == (i // 288) + (i % 3 << 32)
        u = uniform(Purpose.AUGMENT, SEED, epoch, sample, np.arange(TRAIN_UNIFORMS))
        assert torch.equal(got["image"][i], train_crop(decode_image(photographs[sample]), 32, u))
    ranks = [
        stream(
            train_loader(shards, repeats=3, rank=r, world_size=2, workers=r, micro_batch_size=6), 4
        )
        for r in (0, 1)
    ]
    both = {
        key: torch.cat([r[key].view(2, 12, *r[key].shape[1:]) for r in ranks], 1) for key in got
    }
    for step in (0, 1):  # up to the order of the ranks
        one, other = both["image"][step], got["image"][step * 24 : step * 24 + 24]
        assert sorted(map(hash, map(str, one.flatten(1).tolist()))) == sorted(
            map(hash, map(str, other.flatten(1).tolist()))
        )
    with pytest.raises(UserError, match="each comes 5 times"):
        train_loader(shards, repeats=5)


@pytest.mark.parametrize(("start", "workers", "micro"), [(5, 0, 24), (11, 2, 6), (14, 1, 12)])
def test_repeats_go_on_at_any_step(shards: ShardSet, start: int, workers: int, micro: int) -> None:
    """A run resumes within an epoch of twelve steps, at its end, in the next, and with other
    workers."""
    whole = stream(train_loader(shards, repeats=3), 17)
    rest = stream(
        train_loader(shards, repeats=3, workers=workers, micro_batch_size=micro),
        (17 - start) * 24 // micro,
        start,
    )
    for key, values in rest.items():
        assert torch.equal(values, whole[key][start * 24 :]), key


@pytest.mark.parametrize("sampling", ["random", "block"])
def test_repeats_have_masks_of_their_own(
    shards: ShardSet, alone: dict[str, torch.Tensor], sampling: str
) -> None:
    """The first view of a sample is masked as without repeats; each other view has another mask."""
    got = stream(train_loader(shards, repeats=3), 4)
    views = mask_noise(SEED, got["epoch"], got["sample"], 64, sampling).view(32, 3, 64)
    first = mask_noise(SEED, alone["epoch"][:32], alone["sample"][:32], 64, sampling)
    assert torch.equal(views[:, 0], first)
    kept = views.argsort(-1)[..., :16].sort(-1).values
    different = [(kept[:, i] != kept[:, j]).any(-1).float().mean() for i, j in ((0, 1), (1, 2))]
    assert min(different) > 0.9


def test_an_image_of_too_many_pixels_is_damaged(shards: ShardSet, photographs: list[bytes]) -> None:
    pixels = sorted(math.prod(Image.open(io.BytesIO(image)).size) for image in photographs)
    most = pixels[-5] - 1  # five or more have more
    with pytest.raises(UserError, match=f"pixels, more than {most:,}"):
        list(EvalLoader(shards, img_size=32, batch_size=8, max_pixels=most))
    with pytest.raises(RunError, match="are damaged"):
        list(islice(train_loader(shards, max_pixels=most).batches(0), 4))


@pytest.mark.parametrize(
    ("world_size", "workers", "accumulation", "start_step"),
    [
        (1, 1, 1, 0),
        (1, 3, 4, 2),
        (2, 2, 1, 0),
        (2, 0, 3, 5),
        (3, 1, 2, 1),
        (4, 2, 2, 3),
        (8, 0, 1, 7),
    ],
)
def test_the_stream_is_the_same_however_it_is_read(
    shards: ShardSet, alone: dict[str, torch.Tensor],
    world_size: int, workers: int, accumulation: int, start_step: int,
) -> None:  # fmt: skip
    steps = 9 - start_step
    micro = 24 // world_size // accumulation
    parts = []
    for rank in range(world_size):
        loader = train_loader(
            shards, micro_batch_size=micro, rank=rank, world_size=world_size, workers=workers
        )
        part = stream(loader, steps * accumulation, start_step)
        assert loader.steps_per_epoch == 4
        parts.append({key: value.unflatten(0, (steps, -1)) for key, value in part.items()})
    # Positions go round the ranks.
    for key, expected in alone.items():
        shape = (9, 24, *expected.shape[1:])
        at = [
            next(r for r in range(world_size) if ((start_step + s) % 4 * 24 + p) % world_size == r)
            for s in range(steps) for p in range(24)
        ]  # fmt: skip
        taken = [0] * world_size
        rebuilt = []
        for number, rank in enumerate(at):
            step, within = divmod(taken[rank], 24 // world_size)
            assert step == number // 24
            rebuilt.append(parts[rank][key][step, within])
            taken[rank] += 1
        got = torch.stack(rebuilt).view(steps, *shape[1:])
        assert torch.equal(got, expected.view(shape)[start_step:]), key


def test_start_step_and_iter_are_batches(shards: ShardSet, alone: dict[str, torch.Tensor]) -> None:
    loader = train_loader(shards, start_step=6, workers=1)
    first = next(iter(loader))
    again = next(iter(loader))  # a loader can be iterated again
    loader.close()
    assert torch.equal(first["sample"], alone["sample"][6 * 24 : 7 * 24])
    assert torch.equal(first["image"], again["image"])


def test_batches_stay_what_they_were_when_the_loader_goes_on(shards: ShardSet) -> None:
    loader = train_loader(shards, workers=2)
    kept = list(islice(loader.batches(0), 20))
    copies = list(islice(train_loader(shards).batches(0), 20))
    loader.close()
    for batch, copy in zip(kept, copies, strict=True):
        assert torch.equal(batch["image"], copy["image"])


def test_the_global_random_state_is_not_touched(shards: ShardSet) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    stream(train_loader(shards, workers=1), 2)
    expected = torch.Generator().manual_seed(0)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 97, 120])
@pytest.mark.parametrize("batch_size", [1, 10, 200])
def test_evaluation_sees_each_sample_once(
    shards: ShardSet, world_size: int, batch_size: int
) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        loader = EvalLoader(
            shards, img_size=16, batch_size=batch_size, rank=rank, world_size=world_size, workers=0
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch["label"]) == len(batch["image"]) for batch in batches)
        seen += [int(sample) for batch in batches for sample in batch["sample"]]
    assert sorted(seen) == list(range(97))


def test_evaluation_with_workers_gives_the_centre_crops_each_time(
    shards: ShardSet, photographs: list[bytes]
) -> None:
    loader = EvalLoader(shards, img_size=32, batch_size=40, rank=0, world_size=1, workers=2)
    for _ in range(2):
        got = list(loader)
        assert [len(batch["label"]) for batch in got] == [40, 40, 17]
        image = torch.cat([batch["image"] for batch in got])
        for sample in range(0, 97, 8):
            assert torch.equal(image[sample], eval_crop(decode_image(photographs[sample]), 32))
    assert not warm.children()


# ---- bad input


def test_batches_that_cannot_be_made_are_refused(shards: ShardSet) -> None:
    with pytest.raises(UserError, match=r"97 samples, fewer than one global batch of 98"):
        train_loader(shards, global_batch_size=98, micro_batch_size=98)
    with pytest.raises(UserError, match=r"24 does not divide"):
        train_loader(shards, micro_batch_size=5)
    with pytest.raises(UserError, match=r"24 does not divide"):
        train_loader(shards, world_size=7, micro_batch_size=1)


@pytest.fixture
def damaged(tmp_path: Path, photographs: list[bytes]) -> Callable[[list[int]], ShardSet]:
    def make(which: list[int]) -> ShardSet:
        images = list(photographs)
        for sample in which:
            images[sample] = images[sample][: len(images[sample]) // 2]
        return open_shards(make_shards(tmp_path / "damaged", images, SAMPLES))

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_replaced_named_once_and_counted(
    damaged: Callable[[list[int]], ShardSet], alone: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture, workers: int,
) -> None:  # fmt: skip
    bad = alone["sample"][[5, 30]].tolist()
    shards = damaged(bad)
    with caplog.at_level(logging.WARNING, "mae_scale"):
        loader = train_loader(shards, workers=workers, max_bad_fraction=0.5)
        got = stream(loader, 9)
    assert loader.bad_samples == 2
    messages = [record.getMessage() for record in caplog.records if record.name == "mae_scale"]
    assert len(messages) == 2
    for sample in bad:
        assert any(f"sample {sample}: k{sample}.jpg cannot be decoded" in m for m in messages)
    was_bad = torch.isin(alone["sample"], torch.tensor(bad))
    assert was_bad.sum() >= 4
    assert not torch.isin(got["sample"], torch.tensor(bad)).any()
    assert torch.equal(got["sample"][~was_bad], alone["sample"][~was_bad])
    assert torch.equal(got["image"][~was_bad], alone["image"][~was_bad])
    assert torch.equal(got["label"], got["sample"] % 10)
    # The same replacements for two ranks that start in the middle.
    parts = [
        stream(
            train_loader(shards, micro_batch_size=12, rank=r, world_size=2, max_bad_fraction=0.5),
            5,
            start_step=4,
        )
        for r in range(2)
    ]
    together = torch.stack([part["sample"] for part in parts], 1).flatten()
    assert torch.equal(together, got["sample"][4 * 24 :])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_samples_end_the_run(
    damaged: Callable[[list[int]], ShardSet], workers: int
) -> None:
    loader = train_loader(damaged([10, 20, 30]), workers=workers, max_bad_fraction=2 / 97)
    with pytest.raises(RunError, match=r"3 of 97 samples are damaged.*max_bad_fraction"):
        stream(loader, 20)
    assert not warm.children()


def test_only_damaged_samples_end_the_run(damaged: Callable[[list[int]], ShardSet]) -> None:
    loader = train_loader(damaged(list(range(97))), max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"9 others .* cannot be decoded, .*mae-scale verify"):
        stream(loader, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_ends_an_evaluation(
    damaged: Callable[[list[int]], ShardSet], workers: int
) -> None:
    loader = EvalLoader(
        damaged([50]), img_size=16, batch_size=10, rank=0, world_size=1, workers=workers
    )
    with pytest.raises(UserError, match=r"k50\.jpg cannot be decoded"):
        list(loader)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", ["other size", "another image", "cut", "zeroed", "gone"])
def test_a_shard_that_changed_is_an_error(
    folder: Path, photographs: list[bytes], tmp_path: Path, change: str, workers: int
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shards = open_shards(copy)
    victim = copy / "train-000002.tar"
    content = victim.read_bytes()
    if change == "other size":
        victim.write_bytes(content + bytes(512))
    elif change == "another image":  # another length, in a file of the same length
        others = make_shards(tmp_path / "others", photographs[::-1], SAMPLES)
        other = (others / victim.name).read_bytes()
        victim.write_bytes(other[: len(content)].ljust(len(content), b"\0"))
    elif change == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif change == "zeroed":
        victim.write_bytes(bytes(len(content)))
    elif change == "gone":
        victim.unlink()
    loader = train_loader(shards, workers=workers)
    error, words = (OSError, "cannot be read") if change == "gone" else (UserError, "has changed")
    with pytest.raises(error, match=rf"train-000002\.tar {words}"):
        stream(loader, 8)
    assert not warm.children()


def test_a_read_that_fails_at_first_is_tried_again(
    shards: ShardSet, photographs: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the descriptor stands for a file system that answers "stale file handle" once."""
    monkeypatch.setattr("mae_scale.data.reader._READ_WAIT_S", 0.01)
    reader = ShardReader(shards)
    assert reader.read(3).data == photographs[3]
    null = os.open("/dev/null", os.O_WRONLY)  # reading it is an error
    os.dup2(null, reader._open[0])
    os.close(null)
    assert reader.read(4).data == photographs[4]
    reader.close()


def test_shards_are_closed_when_too_many_are_open(
    shards: ShardSet, photographs: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_scale.data.reader.room_for_shards", lambda: 2)
    reader = ShardReader(shards)
    before = psutil.Process().num_fds()
    for sample in [0, 40, 45, 71, 80, 0, 96]:
        assert reader.read(sample).data == photographs[sample]
    assert psutil.Process().num_fds() == before + 2
    reader.close()
    assert psutil.Process().num_fds() == before


def test_a_low_limit_of_open_files_leaves_room_for_all_else() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert room_for_shards() == 128
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- processes

PROGRAM = """
import sys, time, threading
from mae_scale.data.loader import TrainLoader
from mae_scale.data.shards import open_shards
loader = TrainLoader(
    open_shards(sys.argv[1]), img_size=32, seed=3, lanes=6, window=5, global_batch_size=24,
    micro_batch_size=24, rank=0, world_size=1, workers=3,
)
batches = loader.batches(0)
next(batches)
print("ready", flush=True)
"""


def start(folder: Path, then: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PROGRAM + then,
        str(folder),
    ]  # few cores: a warning
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 3
    return workers


@pytest.mark.slow
def test_workers_die_with_a_killed_parent(folder: Path) -> None:
    """They die also while their queue is full and the parent takes nothing from it."""
    process = start(folder, "time.sleep(600)")
    workers = workers_of(process)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert len(gone) == 3


@pytest.mark.slow
def test_signals_to_the_whole_group_leave_the_workers_at_work(folder: Path) -> None:
    """Slurm and a terminal signal the whole group; the parent still gets batches and ends well."""
    process = start(
        folder,
        "import signal\n"
        "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):\n"
        "    signal.signal(s, lambda *a: print('noted', flush=True))\n"
        "print('ready', flush=True)\n"
        "for _ in range(100): next(batches); time.sleep(0.01)\n"
        "loader.close()\nprint('done')",
    )
    workers_of(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1] * 3:
        os.killpg(process.pid, number)
        time.sleep(0.02)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "noted" in out
    assert out.endswith("done\n")


@pytest.mark.slow
def test_signals_meet_no_worker_before_it_ignores_them(folder: Path) -> None:
    """Each worker gets many signals from the moment that it exists."""
    process = start(
        folder,
        """
import os, psutil, signal
seen, stop = set(), threading.Event()
def storm():
    while not stop.is_set():
        for child in psutil.Process().children():
            seen.add(child.pid)
            for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                try: os.kill(child.pid, s)
                except ProcessLookupError: pass
threading.Thread(target=storm, daemon=True).start()
for _ in range(5):
    batches = loader.batches(0)
    for _ in range(10): next(batches)
loader.close()
stop.set()
print(len(seen))
""",
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert int(out.split()[1]) >= 15


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending", ["loader.close()", "", "raise SystemExit(0)", "del batches, loader", "1 / 0"]
)
def test_a_process_ends_by_itself_and_leaves_nothing(folder: Path, ending: str) -> None:
    before = set(os.listdir("/dev/shm"))  # noqa: PTH208
    process = start(folder, ending)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (1 if ending == "1 / 0" else 0), err
    assert ("ZeroDivisionError" in err) if ending == "1 / 0" else not err
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
    assert not left
    assert set(os.listdir("/dev/shm")) <= before  # noqa: PTH208


def test_workers_that_hang_do_not_keep_close_waiting(folder: Path, tmp_path: Path) -> None:
    """Opening a FIFO, which waits for a writer, stands for a file system that does not answer."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shards = open_shards(copy)
    loader = train_loader(
        shards, lanes=1, window=1, workers=2, global_batch_size=8, micro_batch_size=8
    )
    first_batch = SampleOrder(shards.samples, SEED, 1, 1).samples(0, np.arange(8))
    needed = np.searchsorted(shards.starts, first_batch, side="right") - 1
    for number in set(range(len(shards.files))) - set(needed.tolist()):
        Path(shards.files[number]).unlink()
        os.mkfifo(shards.files[number])
    batches = loader.batches(0)
    assert torch.equal(next(batches)["sample"], torch.from_numpy(first_batch))
    workers = warm.children()
    assert len(workers) == 2
    loader.close()
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_a_killed_worker_is_an_error_and_no_hang(folder: Path) -> None:
    process = start(
        folder,
        "import psutil\npsutil.Process().children()[1].kill()\nfor _ in batches: pass",
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is killed by signal" in err


def test_a_batch_is_announced_before_its_first_read(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is told all places of a batch at once; the reads follow."""
    seen: list[tuple[str, int, int]] = []
    advise, read = os.posix_fadvise, os.preadv

    def advised(fd: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        seen.append(("advise", offset, size))
        advise(fd, offset, size, advice)

    def read_at(fd: int, buffers: list[bytearray], offset: int) -> int:
        seen.append(("read", offset, sum(map(len, buffers))))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(os, "preadv", read_at)
    stream(train_loader(shards), 1)
    advised_places = [place for kind, *place in seen[:24] if kind == "advise"]
    assert len(advised_places) == 24  # of a batch, before anything is read
    assert [place for kind, *place in seen[24:48] if kind == "read"] == advised_places
