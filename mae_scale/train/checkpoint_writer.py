"""Writing a checkpoint's files while training goes on."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

import torch

from mae_scale.train.ds import TorchCheckpointEngine


class BackgroundWriter(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, whose `save` only copies the state to host memory.

    A thread writes the copies, syncs and hashes them: what it does leaves the interpreter to
    others. DeepSpeed's own decoupled engine neither syncs nor hashes, and compiles an op first.

    Args:
        background: False writes in `start` itself, without a copy, and stalls training so long.
    """

    def __init__(self, background: bool) -> None:
        super().__init__()
        self._background = background
        self._states: list[tuple[Path, Any]] = []
        self._facts: dict[str, dict[str, Any]] = {}
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Take a state, called by DeepSpeed once for each file."""
        state = _host_copy(state_dict, {}) if self._background else state_dict
        self._states.append((Path(path), state))

    def start(self) -> None:
        """Begin to write what was taken."""
        self._facts, self._error = {}, None
        if not self._background:
            self._write()
            return
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether all files are on disk, or one could not be written."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> dict[str, dict[str, Any]]:
        """Wait, and give the size in bytes and the SHA-256 of each file.

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
            while states:  # each copy is given back as soon as it is written
                path, state = states.pop(0)
                self._facts[path.name] = _write_synced(path, state)
                del state
        except OSError as error:
            self._error = error


class _HashedFile:
    """A file to write into, which counts and hashes what passes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._bytes += len(data)
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
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def _write_synced(path: Path, state: Any) -> dict[str, Any]:
    file = _HashedFile(path)
    try:
        torch.save(state, cast(IO[bytes], file))
        return file.close()
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise


def _host_copy(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    """`value` with each tensor replaced by a copy in host memory; the same tensor once."""
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True)
        return copies[id(value)]
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _host_copy(item, copies)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_host_copy(item, copies) for item in value)
    return value
