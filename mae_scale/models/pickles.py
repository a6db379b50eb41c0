"""Reading what `torch.save` wrote, without running code and without taking more memory than it has.

People pass checkpoints and weights on. Python's pickle calls any function that a file names, and
PyTorch's `weights_only` still lets a few bytes ask for any memory, as `bytearray(10**10)` does. So
a file is unpickled twice: first into objects that only count, then by PyTorch.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import warnings
import zipfile
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch.serialization import safe_globals

from mae_scale.files import TRUST_PICKLE, open_file, require_file

# Errors of PyTorch on a file that is no checkpoint, and on a pickle whose opcodes do not fit.
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError,
    AttributeError, ImportError, LookupError, TypeError, OverflowError, MemoryError, AssertionError,
    struct.error,
)  # fmt: skip

_WITH_STATE = "torch._tensor._rebuild_from_type_v2"  # makes a tensor that has attributes
# Functions and classes that tensors and plain values need. None takes more memory than its
# arguments do, once `_Scan` has compared tensors with their storages.
_NEEDED = {
    "collections.OrderedDict", "torch.Size", "torch.device", "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3", _WITH_STATE,
}  # fmt: skip
_ZIP = b"PK\3\4"  # first bytes of the form that PyTorch writes since version 1.6
_PICKLES = 5  # number of pickles at the beginning of the older form


class Refused(ValueError):
    """A file asks for code, or for more memory than it has bytes."""


def load_pickle(path: Path, allowed: Sequence[type] = (), mapped: bool = True) -> Any:
    """Return what `torch.save` wrote into a file, on the CPU.

    Args:
        path: the file.
        allowed: classes that it may hold besides tensors and plain values.
        mapped: whether to map the tensors instead of reading them, if the file's form allows it.

    Raises:
        Refused: the file asks for other code, or for too much memory, and `TRUST_PICKLE` is not
            given.
        Exception: the file cannot be read, see `UNREADABLE`.
    """
    require_file(path)
    with open_file(path) as file:
        zipped = file.read(len(_ZIP)) == _ZIP  # this is how PyTorch tells the two forms apart
    if not TRUST_PICKLE.given():
        _scan(path, zipped, {f"{kind.__module__}.{kind.__qualname__}" for kind in allowed})
    with safe_globals(list(allowed)), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about pickles of an unusual protocol
        return torch.load(
            path,
            map_location="cpu",
            weights_only=not TRUST_PICKLE.given(),
            mmap=mapped and zipped,  # the older form cannot be mapped
        )


def why_unreadable(error: Exception) -> str:
    """Say in one line why a file could not be read.

    PyTorch's own texts are about its options and opcodes, and do not help with a damaged file.
    """
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeEncodeError):
        return "its path is not UTF-8, which PyTorch needs; rename it or link to it"
    return "it is damaged, or torch.save has not written it"


def is_plain(value: torch.Tensor) -> bool:
    """Return whether a tensor is dense and each of its elements has its own place in memory.

    With strides of 0 a few bytes can pose as a tensor of any size, which would fill the memory when
    it is copied.
    """
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _scan(path: Path, zipped: bool, allowed: set[str]) -> None:
    """Raise an error where `torch.load` would run code or take more memory than the file has."""
    size = path.stat().st_size
    if zipped:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise Refused("it holds compressed parts, which torch.save never writes")
        if sum(part.file_size for part in parts) > size:
            raise Refused("its parts together are larger than the file")
        # PyTorch's own reader, because another one might find another record of this name.
        with open_file(path) as file:
            data = torch._C.PyTorchFileReader(file).get_record("data.pkl")
        _Scan(io.BytesIO(data), size, allowed).check()
        return
    with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(_PICKLES):
            _Scan(content, size, allowed).check()


class _Storage(NamedTuple):
    bytes: int
    itemsize: int


class _Kind(NamedTuple):
    """A type of storages or of elements. Calling it is an error, since some would take memory."""

    itemsize: int


class _Made:
    """What a function or class of a pickle returned: it keeps its number of items only."""

    scan: ClassVar[_Scan]
    name: ClassVar[str]
    items: int

    def __new__(cls, *args: Any) -> _Made:
        made = super().__new__(cls)
        made.items = cls.scan.count(args)
        if "_rebuild_tensor" in cls.name:
            _check_tensor(*args)
        elif cls.name == _WITH_STATE:
            function, _, arguments, state = args
            function(*arguments)
            made.__setstate__(state)
        return made

    def __len__(self) -> int:
        return self.items

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items += 1

    def __setstate__(self, state: Any) -> None:
        self.items += self.scan.count(state if isinstance(state, tuple) else (state,))


def _check_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> None:
    """Check that a tensor lies in its storage, which PyTorch would enlarge."""
    kinds = [value for value in rest if isinstance(value, _Kind)]  # of _rebuild_tensor_v3
    itemsize = kinds[0].itemsize if kinds else storage.itemsize
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and end * itemsize > storage.bytes:
        raise Refused("it has a tensor that is larger than its storage")


class _Scan(pickle._Unpickler):
    """An unpickler that calls nothing that a file names, and counts what PyTorch would allocate.

    The arguments of all calls together may have no more items than the pickle has bytes, since a
    short one could copy a long list many times; storages no more bytes than the file.

    Args:
        file: content of the file, at the beginning of a pickle.
        size: size of the whole file in bytes.
        allowed: names of classes besides those in `_NEEDED`.
    """

    # The operation for a bytearray takes memory by a number; torch.load does not know it.
    dispatch: ClassVar[dict[int, Any]] = {
        code: read
        for code, read in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: Any, size: int, allowed: set[str]) -> None:
        super().__init__(file, encoding="latin1")
        self._file, self._size, self._names = file, size, _NEEDED | allowed
        self._copied = 0  # items
        self._foreign: set[str] = set()
        self._storages: set[tuple[Any, int]] = set()  # keys and bytes

    def check(self) -> None:
        """Read one pickle.

        Raises:
            Refused: it asks for code, or for more memory than the file has bytes.
            Exception: it is damaged.
        """
        start = self._file.tell()
        try:
            self.load()
        finally:
            if self._foreign:
                names = sorted(self._foreign)
                raise Refused(
                    f"it asks for code that no weights need: {', '.join(names[:5])}"
                    f"{', ...' if len(names) > 5 else ''}; if you know who made it and why, "
                    f"{TRUST_PICKLE.option} runs it"
                ) from None
        taken = sum(size for _, size in self._storages)
        if self._copied > self._file.tell() - start or taken > self._size:
            raise Refused("it asks for more memory than it has bytes")

    def count(self, values: tuple[Any, ...]) -> int:
        """Count the items that a call copies, and return their number."""
        items = sum(len(value) for value in values if isinstance(value, Sized))
        self._copied += items
        return items

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a function, class or type that the pickle names."""
        whole = f"{module}.{name}"
        found = getattr(torch, name, None) if module.split(".")[0] == "torch" else None
        if whole == "torch.Tensor":
            return _Kind(0)
        if isinstance(found, torch.dtype):
            return _Kind(found.itemsize)
        if module in ("torch", "torch.storage", "torch.cuda") and name.endswith("Storage"):
            untyped = name == "UntypedStorage"
            return _Kind(1 if untyped else torch.serialization.StorageType(name).dtype.itemsize)
        if whole not in self._names:
            self._foreign.add(whole)
        return type("_Call", (_Made,), {"scan": self, "name": whole})

    def persistent_load(self, pid: Any) -> _Storage:
        """Return what stands for a storage."""
        _, kind, key, _, number, *_ = pid
        if type(number) is not int or number < 0:
            raise Refused("it has a storage of no size")
        self._storages.add((key, kind.itemsize * number))
        return _Storage(kind.itemsize * number, kind.itemsize)
