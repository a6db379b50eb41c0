"""The manifest of a folder of shards: reading it, and checking that it holds nothing else."""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mae_scale.data.remote import SCHEMES, is_remote, printable, scheme_of, shown
from mae_scale.errors import UserError
from mae_scale.files import open_file

MANIFEST = "manifest.json"
VERSION = 1
ANNOTATED_VERSION = 2
MAX_MANIFEST = 1 << 25  # bytes; 100,000 shards take less than half of it
MAX_BYTES = 1 << 50  # largest size of a tar, in bytes
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Shard:
    """One entry of the manifest."""

    file: str  # name in the folder; an absolute path or URL in the index of foreign shards
    samples: int
    bytes: int
    sha256: str  # "" if it is not known (remote foreign shards)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a local set.

    Raises:
        UserError: the manifest is damaged, or of another version.
    """
    return parse_manifest(manifest_bytes(folder), str(folder))


def manifest_bytes(folder: Path) -> bytes:
    """Read the content of a manifest; one byte more than `MAX_MANIFEST` where it is too large."""
    try:
        with open_file(folder / MANIFEST) as stream:
            return stream.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None


def parse_manifest(content: bytes, root: str) -> dict[str, Any]:
    """Parse the manifest to a dict; each entry of `shards` has the keys of `Shard` and no others.

    A manifest may come from anybody, so it is treated as data only: every count is a whole number,
    and no name of a tar is opened here. Local tars may lie anywhere, because they are only ever
    read; for the others see `shards.open_shards`.

    Args:
        content: bytes of the manifest.
        root: name of the set for messages.

    Raises:
        UserError: the manifest is damaged, or of another version.
    """
    try:
        if len(content) > MAX_MANIFEST:
            raise ValueError(f"it has more than {MAX_MANIFEST:,} bytes")
        manifest = json.loads(content)
        version = manifest["version"]
        if type(version) is int and version not in (VERSION, ANNOTATED_VERSION):
            raise UserError(
                f"{root}: {MANIFEST} has version {version}, this program reads {VERSION} and "
                f"{ANNOTATED_VERSION}"
            )
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        missing = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{root}: {MANIFEST} is damaged ({printable(missing)[:200]}); make the shards again"
        ) from None
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Raise a ValueError, KeyError or TypeError that says what is wrong with a manifest."""
    _check(type(manifest["version"]) is int, "version is not a whole number")
    split, classes, shards = manifest["split"], manifest["classes"], manifest["shards"]
    made_by = manifest.setdefault("made_by", {})
    tasks = ("classification",) if manifest["version"] == VERSION else ("detection", "segmentation")
    _check(manifest.get("task", "classification") in tasks, f"task is none of {', '.join(tasks)}")
    categories = manifest.get("categories", [])
    _check(
        isinstance(categories, list) and all(isinstance(entry, dict) for entry in categories),
        "categories is no list of records",
    )
    _check(isinstance(split, str) and not _CONTROL.search(split), "split is no name")
    _check(
        isinstance(classes, list) and all(isinstance(name, str) for name in classes),
        "classes is no list of names",
    )
    _check(
        isinstance(made_by, dict) and isinstance(made_by.get("plan", {}), dict),
        "made_by is no record",
    )
    _check(isinstance(shards, list), "shards is no list")
    for i, shard in enumerate(shards):
        where = f"shard {i}"
        _check(isinstance(shard, dict), f"{where} is no record")
        shards[i] = shard = {key: shard[key] for key in Shard.__annotations__}
        for key in ("samples", "bytes"):
            whole = type(shard[key]) is int and 0 <= shard[key] < MAX_BYTES
            _check(whole, f"{where}: {key} is no count")
        _check(
            shard["bytes"] >= tarfile.BLOCKSIZE * shard["samples"],
            f"{where}: {shard['samples']} samples do not fit into {shard['bytes']} bytes",
        )
        digest = shard["sha256"]
        _check(
            isinstance(digest, str) and re.fullmatch(r"([0-9a-f]{64})?", digest) is not None,
            f"{where}: sha256 is no SHA-256",
        )
        _check_name(shard["file"], where)
    total = sum(shard["samples"] for shard in shards)
    count = manifest.get("num_samples", total)
    _check(
        not shards or (type(count) is int and count == total),
        "num_samples is not the sum of the shards'",
    )


def _check_name(name: Any, where: str) -> None:
    _check(
        isinstance(name, str) and not _CONTROL.search(name) and 0 < len(name) < 4096,
        f"{where}: file is no name",
    )
    if is_remote(name):
        _check(scheme_of(name) in SCHEMES, f"{where}: {shown(name)} has an unknown scheme")
    else:
        _check(".." not in PurePosixPath(name).parts, f"{where}: file leads upwards")


def _check(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)
