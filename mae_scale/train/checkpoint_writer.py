"""Writing a checkpoint's files; large ones are written while training goes on."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

import torch

from mae_scale.errors import RunError, UserError
from mae_scale.files import Digest, create_file
from mae_scale.train.deepspeed_state import FrozenWeights
from mae_scale.train.ds import TorchCheckpointEngine
from mae_scale.train.reading import load_tensors


class BackgroundWriter(TorchCheckpointEngine):
    """Checkpoint engine for DeepSpeed: `save` only takes the states, and `start` writes them.

    A large state is copied to host memory, and a thread writes, syncs and hashes the copy; other
    threads can use the interpreter meanwhile. A small state is written at once, so that a save is
    whole before the next step. DeepSpeed's own decoupled engine neither syncs nor hashes, and
    compiles an op first.

    Args:
        background_bytes: size in bytes from which on the states of this rank are written in the
            background; None: they are always written at once, which needs no memory for a copy.
        frozen: attribute `frozen` of the engine.
    """

    def __init__(self, background_bytes: float | None, frozen: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._frozen = FrozenWeights(frozen)
        self._background_bytes = background_bytes
        self._states: list[tuple[Path, Any]] = []
        self._facts: dict[str, dict[str, Any]] = {}
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Take the state of one file; DeepSpeed calls this once for each file."""
        self._frozen.put_into(state_dict)
        self._states.append((Path(path), state_dict))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make no folder: `Saver` has made it, and none is made where the run folder is gone."""

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Read a file for DeepSpeed, on the CPU, without running pickled code.

        Raises:
            RunError: the file cannot be read without running code; other ranks may not know.
        """
        try:
            state = load_tensors(Path(path), mapped=False)
        except UserError as error:
            raise RunError(str(error)) from None
        self._frozen.take_from(state)
        return state

    def start(self) -> None:
        """Write what was taken, or begin to write; from then on training may change the state."""
        self._facts, self._error = {}, None
        least = self._background_bytes
        if least is None or sum(_size(state) for _, state in self._states) < least:
            self._write()
            return
        self._states = [(path, _host_copy(state, {})) for path, state in self._states]
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether all files are on disk, or one could not be written."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> dict[str, dict[str, Any]]:
        """Wait until all files are written, and return the size in bytes and SHA-256 of each.

        Raises:
            OSError: a file could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
        return self._facts

    def _write(self) -> None:
        states, self._states = self._states, []
        try:
            while states:  # the memory of a copy is freed as soon as it is written
                path, state = states.pop(0)
                self._facts[path.name] = _write_synced(path, state)
                del state
        except OSError as error:
            self._error = error


class _HashedFile:
    """A file to write into, which counts and hashes the bytes that it is given."""

    def __init__(self, path: Path) -> None:
        self._file = create_file(path)
        self._digest = Digest()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error  # torch's zip writer reports an error of its own instead
            raise

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._digest.bytes, "sha256": self._digest.sha256}


def _write_synced(path: Path, state: Any) -> dict[str, Any]:
    file = _HashedFile(path)
    try:
        torch.save(state, cast(IO[bytes], file))
        return file.close()
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise


def _size(value: Any) -> int:
    """Add up the bytes of the tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


def _host_copy(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    """Copy `value` and its tensors to host memory; a tensor that occurs twice is copied once."""
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True)
        return copies[id(value)]
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _host_copy(item, copies)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_host_copy(item, copies) for item in value)
    return value
