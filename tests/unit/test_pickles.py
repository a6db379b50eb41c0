"""Short files that ask for much memory are refused in a line, before any of it is taken."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mae_scale.errors import UserError
from mae_scale.models.weights import read_weights
from mae_scale.train.reading import load_tensors

GB = 1 << 30
READ = """
import resource, sys
from pathlib import Path
from mae_scale.errors import UserError
from mae_scale.models.weights import read_weights
from mae_scale.train.reading import load_tensors

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmPeak:")[1].split()[0])

def read_all(path):
    for read in (read_weights, load_tensors, lambda p: load_tensors(p, mapped=False)):
        try:
            read(path)
        except UserError as error:
            print("=", error)
        else:
            print("= read")

read_all(Path(sys.argv[1]))
before = peak()
resource.setrlimit(resource.RLIMIT_AS, (before + (3 << 30),) * 2)  # spares the machine
for path in sys.argv[2:]:
    read_all(Path(path))
print("took", peak() - before)
"""


def name(text: str) -> bytes:
    return b"c" + text.replace(" ", "\n").encode() + b"\n"


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(kind: str, items: int, legacy: bool) -> bytes:
    pid = text("storage") + name(kind) + text("0") + text("cpu") + number(items)
    return b"(" + pid + (b"N" if legacy else b"") + b"tQ"


def tensor(items: int, size: int, stride: int, legacy: bool) -> bytes:
    made = storage("torch FloatStorage", items, legacy)
    places = number(0) + number(size) + b"\x85" + number(stride) + b"\x85"
    return name("torch._utils _rebuild_tensor_v2") + b"(" + made + places + b"\x89" + EMPTY + b"tR"


EMPTY = name("collections OrderedDict") + b")R"
ITEMS = b"(" + b"K\0" * 20_000 + b"lq\0"  # a list, which stays in the memo
PAIRS = b"}q\0(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(20_000)) + b"u"
# What a pickle puts into a dict under "x", by what it asks for.
BOMBS: dict[str, Callable[[bool], bytes]] = {
    "bytearray": lambda legacy: name("__builtin__ bytearray") + number(GB) + b"\x85R",
    "encode": lambda legacy: name("_codecs encode") + text("a") + text("hex") + b"\x86R",
    "tensor class": lambda legacy: name("torch FloatTensor") + number(GB // 4) + b"\x85R",
    "tensor class with state": lambda legacy: name("torch._tensor _rebuild_from_type_v2")
    + b"(" + name("torch Tensor") * 2 + number(GB // 4) + b"\x85}tR",
    "untyped": lambda legacy: name("torch.storage UntypedStorage") + number(GB) + b"\x85R",
    "new": lambda legacy: name("torch.storage UntypedStorage") + number(GB) + b"\x85\x81",
    "storage": lambda legacy: tensor(GB // 4, 1, 1, legacy),
    "tensor beyond its storage": lambda legacy: tensor(1, GB // 4, 1, legacy),
    "stride beyond its storage": lambda legacy: tensor(1, 2, GB // 4, legacy),
    "copies of a list": lambda legacy: ITEMS
    + b"0(" + (name("torch Size") + b"h\0\x85R") * 9_000 + b"l",
    "copies of a dict": lambda legacy: PAIRS + b"0("
    + (name("collections OrderedDict") + b"h\0\x85R") * 9_000 + b"l",
    "copies of a state": lambda legacy: PAIRS + b"0(" + (EMPTY + b"h\0b") * 9_000 + b"l",
    "a long string": lambda legacy: b"X\0\0\0\x40",
    "a bytearray of protocol 5": lambda legacy: b"\x96" + struct.pack("<Q", GB),
    "a long number": lambda legacy: b"\x8b\0\0\0\x40",
}  # fmt: skip


def write(path: Path, bomb: Callable[[bool], bytes], legacy: bool) -> None:
    content = b"\x80\x02}" + text("x") + bomb(legacy) + b"s."
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/data/0", bytes(4))
            archive.writestr("archive/version", b"3\n")
        return
    whole = io.BytesIO()
    torch.save({"x": torch.ones(1)}, whole, _use_new_zipfile_serialization=False)
    stream = io.BytesIO(whole.getvalue())
    for _ in range(3):
        pickle.load(stream)
    path.write_bytes(whole.getvalue()[: stream.tell()] + content + pickle.dumps(["0"], 2))


@pytest.mark.parametrize("legacy", [False, True])
def test_memory_is_bounded_by_the_file(tmp_path: Path, legacy: bool) -> None:
    for title, bomb in BOMBS.items():
        write(tmp_path / f"{title}.pth", bomb, legacy)
    paths = [tmp_path / f"{title}.pth" for title in ("bytearray", *BOMBS)]
    command = [sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("=")]
    assert done.returncode == 0 and len(lines) == 3 * len(paths), done.stderr
    for line in lines:
        assert "cannot be read" in line
    assert int(done.stdout.split()[-1]) < GB / 4


def test_parts_that_share_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(1 << 16))
        archive.filelist += [archive.filelist[-1]] * 50
    for read in (read_weights, load_tensors):
        with pytest.raises(UserError, match="parts together are larger"):
            read(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_all_that_weights_hold_is_read(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.pth"
    state = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)).state_dict()
    state |= {"view": torch.arange(24.0).reshape(4, 6)[1:, ::2], "none": torch.ones(0, 3)}
    state |= {f"{kind}": torch.ones(3, dtype=kind) for kind in (torch.bfloat16, torch.int8)}
    if not legacy:
        state |= {
            "new": torch.ones(3, dtype=torch.float8_e4m3fn),
            "u": torch.ones(2).to(torch.uint16),
        }
    state["with"] = torch.ones(2)
    state["with"].attribute = [1, 2]  # as DeepSpeed gives to those of an offloaded optimiser
    state["shared"], state["parameter"] = state["0.weight"].T, torch.nn.Parameter(torch.ones(2))
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    for read in (read_weights, load_tensors):
        found = read(path)
        assert all(torch.equal(found[key].float(), value.float()) for key, value in state.items())
