"""Spoilt files: a command that reads one succeeds, or says in one line what is wrong.

Hypothesis changes bytes, values of JSON and YAML, headers of tars, tensors. MAE_SCALE_TEST_EXAMPLES
sets the number of files of each kind; hypothesis prints the choices of a failure.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from runs import Run

from mae_scale.cli import main

EXAMPLES = int(os.environ.get("MAE_SCALE_TEST_EXAMPLES", 4))
MOST_SECONDS = 20  # of CPU time; more is a hang
MOST_BYTES = 1 << 30
MOST_LETTERS = 2000  # of an error
STEP = "checkpoints/step-00000002"
TINY = {"model.depth": 1, "data.workers": 0, "data.lanes": 2, "data.window": 8, "train.epochs": 1,
        "train.max_steps": 2, "train.global_batch_size": 4, "optim.warmup_epochs": 0}  # fmt: skip

# Values that a program does not expect where it wrote another value.
STRANGE = [
    None, True, -5, 0, 1e30, -1e308, float("nan"), float("inf"), 10**30, 2**63, "", "x" * 5000,
    "a\nb", "\x1b[2J\x07", "<script>alert(1)</script>", "../x", "/etc/passwd", "pipe:touch X",
    "a\0b", "\ud800", "1e999", [], {}, [[]], [None], {"": {}}, [1e308, -1e308],
]  # fmt: skip
DOCUMENTS = [b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xef\xbb\xbf{}"]
YAML = [
    b"a0: &a0 {x: 1}\n" + b"".join(b"a%d: &a%d {x: *a%d, y: *a%d}\n" % (i, i, i - 1, i - 1)
                                   for i in range(1, 40)),
    b"a: &a [*a]\n", b"!!python/object/apply:os.system [touch X]\n", b"a: 2001-99-99\n",
    b"? [a]\n: b\n", b"{" * 2000, b"a: !!binary x\n", b"<<: 3\n", b"%YAML 9.9\n---\na\n",
    b"model: {1: 2}\n", b"train: []\n", b"data: null\n", b"---\n---\n", b"\0",
]  # fmt: skip
TENSORS = [torch.zeros(0), torch.zeros(2, 2), torch.tensor(3.0), torch.zeros(4).to_sparse(),
           torch.zeros(1).expand(10**9), torch.zeros(2, dtype=torch.complex64),
           torch.empty(10**12, device="meta")]  # fmt: skip


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Change, remove or double a few bytes, half of the times in the first 64."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        at = at % 64 if draw(st.booleans()) else at
        part = data[at : at + draw(st.sampled_from([1, 2, 8, 512]))]
        new = draw(st.sampled_from([b"", bytes(part) * 2, b"\xff" * len(part)]) | st.binary())
        data[at : at + len(part)] = new
    return bytes(data[: draw(st.sampled_from([len(data), len(data) // 2]))])


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Change, add or remove a few values anywhere in a document of lists and dictionaries."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = document, None
        while isinstance(holder, (dict, list)) and len(holder):
            inside, key = holder, draw(st.sampled_from(list(_keys(holder))))
            if draw(st.integers(0, 2)) == 0 or not isinstance(inside[key], (dict, list)):
                break
            holder = inside[key]
        if key is None:
            return draw(st.sampled_from(STRANGE))
        if draw(st.integers(0, 3)) == 0:
            del inside[key]
        else:
            inside[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
    return document


def _keys(holder: dict[Any, Any] | list[Any]) -> Iterator[Any]:
    yield from holder if isinstance(holder, dict) else range(len(holder))


@st.composite
def strange_header(draw: st.DrawFn, content: bytes) -> bytes:
    """Change a header of a tar, with the checksum that belongs to it."""
    tar = bytearray(content)
    at = 512 * draw(st.integers(0, len(tar) // 512 - 1))
    field, size = draw(st.sampled_from([(0, 100), (100, 8), (124, 12), (156, 1), (345, 155)]))
    values = [b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"\0" * 12,
              *(bytes([kind]) for kind in b"LKxgSX235")]  # fmt: skip
    value = draw(st.sampled_from(values) | st.binary(min_size=1, max_size=size))[:size]
    tar[at + field : at + field + len(value)] = value
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return bytes(tar)


@st.composite
def changed_state(draw: st.DrawFn, content: bytes) -> bytes:
    """Change a value in what `torch.save` has written."""
    state = torch.load(io.BytesIO(content), weights_only=False)
    holder = state
    while True:
        key = draw(st.sampled_from(list(_keys(holder))))
        if not isinstance(holder[key], (dict, list)) or not len(holder[key]):
            break
        holder = holder[key]
    holder[key] = draw(st.sampled_from(TENSORS + STRANGE))
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=draw(st.booleans()))
    return stream.getvalue()


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def versions(path: Path) -> st.SearchStrategy[bytes]:
    """Make a strategy of files that resemble this one."""
    content = path.read_bytes()
    kinds = [spoilt(content)]
    if path.suffix == ".json":
        kinds += [changed(json.loads(content)).map(dumped)] * 3 + [st.sampled_from(DOCUMENTS)]
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        kinds += [
            changed(rows).map(
                lambda rows: b"\n".join(map(dumped, rows if isinstance(rows, list) else [rows]))
            )
        ] * 3
        kinds += [st.just(b'{"step": 1, "x": "' + b"y" * (1 << 21) + b'"}\n' + content)]
    elif path.suffix == ".yaml":
        kinds += [st.sampled_from(YAML), st.sampled_from(YAML).map(lambda trick: content + trick)]
    elif path.suffix == ".tar":
        kinds += [strange_header(content)] * 2
    elif path.suffix in (".pt", ".pth"):
        kinds += [changed_state(content)] * 2
    elif path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = changed(json.loads(content[8 : 8 + size])).map(dumped)
        kinds += [header.map(lambda h: len(h).to_bytes(8, "little") + h + content[8 + size :])]
    return st.one_of(kinds)


@dataclass(frozen=True)
class Target:
    """A command that reads a file; {} is the folder, and {good} the one that nothing changes."""

    folder: str
    file: str
    command: str


TARGETS = [
    Target("tars", "x.tar", "index {} --workers 1"),
    Target("archives", "n01440764.tar", "shard {} {}-out --split train --workers 1"),
    Target("shards", "train-000000.tar", "verify {} --workers 1"),
    Target("shards", "manifest.json", "verify {} --workers 1"),
    Target("shards", "index.npy", "verify {} --workers 1"),
    Target("shards", "checksums.npy", "verify {} --workers 1"),
    Target("parquet", "train-0.parquet", "shard {} {}-out --split train --workers 1"),
    Target("listed", "list.csv", "shard {} {}-out --split train --workers 1 --list {}/list.csv"),
    Target("images", "a/0.jpg", "shard {} {}-out --split train --workers 1"),
    Target("images", "b/2.png", "predict {good}/finetune {}/b/2.png --out {}/out"),
    Target("coco", "annotations/instances_train2017.json",
           "shard {} {}-out --split train --workers 1"),
    Target("configs", "c.yaml", "pretrain --config {}/c.yaml --data.train {}/none"),
    Target("configs", "zero.json", "pretrain --config {}/c.yaml --deepspeed {}/zero.json"),
    Target("finetune", "config.yaml", "status {}"),
    Target("finetune", "metrics.jsonl", "status {}"),
    Target("finetune", "validation.jsonl", "report {} --out {}/out.html"),
    Target("finetune", "history.jsonl", "report {} --out {}/out.html"),
    Target("finetune", "classes.json", "predict {} {good}/images --out {}/out"),
    Target("finetune", f"{STEP}/COMMITTED.json", "export {} {}/out.pth --to official"),
    Target("finetune", f"{STEP}/mp_rank_00_model_states.pt", "export {} {}/o.pth --to official"),
    Target("exports", "official.pth", "predict {}/official.pth {good}/images --out {}/out"),
    Target("exports", "timm/model.safetensors", "predict {}/timm {good}/images --out {}/out"),
    Target("exports", "timm/config.json", "predict {}/timm {good}/images --out {}/out"),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(
    imagenet_tree: Path, shards: Path, val_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Make folders of good files: images in each form, and a run of two steps."""
    import pyarrow
    import pyarrow.parquet
    from test_detect import make_coco

    root = tmp_path_factory.mktemp("good")
    photographs = sorted(imagenet_tree.rglob("*.JPEG"))[:4]
    for name in ("tars", "archives", "parquet", "listed", "images/a", "images/b", "configs"):
        (root / name).mkdir(parents=True)
    rows = []
    with tarfile.open(root / "tars" / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, photograph in enumerate(photographs):
            with Image.open(photograph) as opened:
                small = opened.convert("RGB").resize((80, 60))
            path = root / "images" / "ab"[i // 2] / f"{i}.{'png' if i == 2 else 'jpg'}"
            small.save(path)
            small.save(root / "listed" / f"{i}.jpg")
            label = b"%d" % (i % 2)
            for ending, content in (("jpg", (root / "listed" / f"{i}.jpg").read_bytes()),
                                    ("cls", label)):  # fmt: skip
                member = tarfile.TarInfo(f"k{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            rows.append({"image": {"bytes": path.read_bytes(), "path": path.name}, "label": i % 2})
    table = pyarrow.table({key: [row[key] for row in rows] for key in ("image", "label")})
    pyarrow.parquet.write_table(table, root / "parquet" / "train-0.parquet")
    (root / "listed/list.csv").write_text("filename,label\n0.jpg,a\n1.jpg,b\n2.jpg,a\n3.jpg,b\n")
    for number in (1440764, 1443537):
        with tarfile.open(root / "archives" / f"n{number:08d}.tar", "w") as tar:
            tar.add(root / "listed" / "0.jpg", f"n{number:08d}_1.JPEG")
    shutil.copytree(root / "tars", root / "shards")
    (root / "shards/x.tar").rename(root / "shards/train-000000.tar")
    assert main(["index", str(root / "shards")]) == 0
    make_coco(root / "coco", photographs, images=3)
    (root / "configs/c.yaml").write_text(
        f"run_dir: {root}/none\nmodel: {{depth: 2}}\ntrain: {{epochs: 3}}\ndata: {{train: no}}\n"
    )
    (root / "configs/zero.json").write_text('{"zero_optimization": {"stage": 2}, "_x": [1]}')
    run = Run(root / "finetune", shards, {**TINY, "data.val": val_shards}, task="finetune")
    run.settings["train.validate_epochs"] = 1
    run.finish()
    row = {"step": 2, "epoch": 0.03, "samples": 8, "images": 250, "top1": 0.4, "top5": 2.0,
           "loss": 5.5, "time": 1.8e9}  # fmt: skip
    (root / "finetune/validation.jsonl").write_text(json.dumps(row) + "\n")
    (root / "exports").mkdir()
    for to, out in (("official", "official.pth"), ("timm", "timm")):
        assert main(["export", str(root / "finetune"), "--to", to, f"{root}/exports/{out}"]) == 0
    return root


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.command.split()[0]} {t.file}")
def test_spoilt_files_are_read_or_refused_in_a_line(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    monkeypatch.setattr("mae_scale.launch.stopping.catch_signals_early", lambda: None)
    source = good / target.folder

    def read(content: bytes) -> int:
        folder = tmp_path / "copy"
        for old in (folder, tmp_path / "copy-out"):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(source, folder, copy_function=os.link)
        path = folder / target.file
        path.unlink()
        path.write_bytes(content)
        if path.suffix == ".pt":  # the checksum of the spoilt file is right
            commit = json.loads((folder / STEP / "COMMITTED.json").read_text())
            facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            commit["files"][path.name] = facts
            del commit["sha256"]  # as an older version wrote it
            (folder / STEP / "COMMITTED.json").unlink()
            (folder / STEP / "COMMITTED.json").write_text(json.dumps(commit))
        words = target.command.split()
        return run_limited([w.replace("{good}", str(good)).replace("{}", str(folder))
                            for w in words])  # fmt: skip

    assert read((source / target.file).read_bytes()) == (2 if target.folder == "configs" else 0)

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(versions(source / target.file))
    def each(content: bytes) -> None:
        assert read(content) in (0, 1, 2)

    each()


def run_limited(words: list[str]) -> int:
    """Run a command in this process; check its error, its CPU time and its memory."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    out, err = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory
    before = highest()
    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    errors = re.findall("^mae-scale: error: .*", err.getvalue(), re.M)
    assert len(errors) <= 1 and (code != 2 or len(errors) == 1), err.getvalue()
    assert all(len(line) < MOST_LETTERS for line in errors)
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert highest() - before < MOST_BYTES
    return code


def highest() -> int:
    """Give the highest resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
