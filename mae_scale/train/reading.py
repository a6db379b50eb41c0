"""Reading a checkpoint's files without running the code that a pickle may hold.

People pass run folders on. Python's pickle calls any function that a file names. The checksums of
COMMITTED.json do not help against that, since whoever writes the file can write them, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from mae_scale.errors import UserError
from mae_scale.files import TRUST_PICKLE
from mae_scale.models.pickles import UNREADABLE, is_plain, load_pickle, why_unreadable

# Classes whose objects DeepSpeed saves beside tensors and plain values under ZeRO 1 to 3. They hold
# numbers only.
ALLOWED = [LossScaler, ZeroStageEnum, fragment_address]


def load_tensors(path: Path, mapped: bool = True) -> dict[str, Any]:
    """Return what `torch.save` wrote into a checkpoint's file, on the CPU.

    Args:
        path: the file.
        mapped: whether to map the tensors instead of reading them, if the file's form allows it.

    Raises:
        UserError: the file names anything but tensors, plain values and `ALLOWED`, or is damaged.
    """
    try:
        content = load_pickle(path, ALLOWED, mapped)
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint's file: {why_unreadable(error)}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, no state of a run")
    if not TRUST_PICKLE.given():
        _check_tensors(content, path)
    return content


def _check_tensors(content: Any, path: Path) -> None:
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if not is_plain(value):
                raise UserError(f"{path} holds a tensor {list(value.shape)} that is no plain one")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


@contextlib.contextmanager
def state_of(folder: Path) -> Iterator[None]:
    """Turn an error that a checkpoint's content causes into a `UserError` that names its folder."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"checkpoint {folder} does not hold the state of a run: {what}") from error


def refuse_code(folder: Path) -> None:
    """Check all files of a checkpoint for code before any of them is used.

    Raises:
        UserError: one of them cannot be read by `load_tensors`.
    """
    for path in sorted(folder.glob("*_states.pt")):
        load_tensors(path)
