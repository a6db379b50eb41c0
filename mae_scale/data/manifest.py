"""The manifest of a folder of shards: reading it, and checking that it holds nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mae_scale.data.remote import ADDRESSES, is_remote, printable, scheme_of, shown
from mae_scale.errors import UserError
from mae_scale.files import TRUST, TRUST_OPTION, open_file, read_file

log = logging.getLogger("mae_scale")

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
    return parse_manifest(manifest_bytes(folder), str(folder), folder)


def manifest_bytes(folder: Path) -> bytes:
    """Read the content of a manifest; one byte more than `MAX_MANIFEST` where it is too large."""
    try:
        with open_file(folder / MANIFEST) as stream:
            return stream.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None


def parse_manifest(content: bytes, root: str, folder: Path | None = None) -> dict[str, Any]:
    """Parse the manifest to a dict; each entry of `shards` has the keys of `Shard` and no others.

    A manifest may come from anybody, so it is treated as data only: a tar is a file below the
    folder, or in an index of foreign tars an address (never a command), and every count is a whole
    number. See `_may_lead_outside` for absolute paths and links.

    Args:
        content: bytes of the manifest.
        root: name of the set for messages.
        folder: folder of a local manifest; None for a remote one.

    Raises:
        UserError: the manifest is damaged, of another version, or names a file that it may not
            name.
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
    names = [shard["file"] for shard in manifest["shards"]]
    outside = [name for name in names if _is_outside(name)]
    if folder is not None:
        outside += _led_outside(folder, [name for name in names if not _is_outside(name)])
    if outside and not _may_lead_outside(content, folder, outside):
        raise UserError(
            f"{root}: {MANIFEST} names tars outside of the folder, such as "
            f"{printable(outside[0])}, and you have not made this index here; index the tars "
            f"yourself (`mae-scale index`), or add {TRUST_OPTION} if you know who made it"
        )
    return manifest


def _may_lead_outside(content: bytes, folder: Path | None, outside: list[str]) -> bool:
    """Return whether an index may name tars outside of its folder, by absolute paths or by links.

    A folder that came from somebody else must not choose files on this machine, and its own
    statements (`made_by`) prove nothing. So the program remembers the indexes that it has made, and
    accepts those. It also accepts an index whose tars belong to the same other user as the index,
    who could as well have put them into the folder, and any index where `TRUST` is set.
    """
    if os.environ.get(TRUST) == "1" or _was_indexed_here(content):
        return True
    if folder is None:
        return False
    try:
        owners = {(folder / name).stat().st_uid for name in [MANIFEST, *outside]}
    except OSError:
        return False
    return len(owners) == 1 and owners != {os.geteuid()}


def remember_index(content: bytes) -> None:
    """Remember that this user has made an index, if it names tars outside of its folder.

    Args:
        content: bytes of the index's manifest.
    """
    shards = json.loads(content)["shards"]
    if not any(_is_outside(shard["file"]) for shard in shards):
        return
    path = _known_indexes()
    try:
        if path is None:
            raise OSError(errno.ENOENT, "there is no home folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(hashlib.sha256(content).hexdigest() + "\n")
    except OSError as error:
        log.warning(
            "this index names tars outside of its folder, and it cannot be noted that you made it "
            "(%s: %s); reading it needs %s", path, error.strerror, TRUST_OPTION,
        )  # fmt: skip


def _was_indexed_here(content: bytes) -> bool:
    path = _known_indexes()
    digest = hashlib.sha256(content).hexdigest()
    try:
        return path is not None and digest in read_file(path).decode().split()
    except (OSError, ValueError):
        return False


def _known_indexes() -> Path | None:
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:  # there is no home folder
        return None
    return Path(state) / "mae-scale" / "indexes"


def _is_outside(name: str) -> bool:
    return not is_remote(name) and PurePosixPath(name).is_absolute()


def _led_outside(folder: Path, names: list[str]) -> list[str]:
    """List the names that lead out of a folder through a link that another user has made.

    This user's own links are their own choice. Tars beside the manifest are inside, too, where the
    manifest is itself a link to the folder that holds both.
    """
    paths = {name: PurePosixPath(name) for name in names if not is_remote(name)}
    places = {place for path in paths.values() for place in (path, *path.parents)}
    links = {place for place in places if _is_link_of_others(folder / place)}
    links.discard(PurePosixPath())  # the folder itself
    if not links:
        return []
    homes = (folder.resolve(), (folder / MANIFEST).resolve().parent)
    return [
        name
        for name, path in paths.items()
        if links & {path, *path.parents}
        and not any((folder / path).resolve().is_relative_to(home) for home in homes)
    ]


def _is_link_of_others(path: Path) -> bool:
    return path.is_symlink() and path.lstat().st_uid != os.geteuid()


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
        _check_name(shard["file"], where, "indexed" in made_by)
    total = sum(shard["samples"] for shard in shards)
    count = manifest.get("num_samples", total)
    _check(
        not shards or (type(count) is int and count == total),
        "num_samples is not the sum of the shards'",
    )


def _check_name(name: Any, where: str, indexed: bool) -> None:
    _check(
        isinstance(name, str) and not _CONTROL.search(name) and 0 < len(name) < 4096,
        f"{where}: file is no name",
    )
    if is_remote(name):
        _check(
            indexed and scheme_of(name) in ADDRESSES,
            f"{where}: file is {shown(name)}, and a manifest may not name a command or "
            "other places; index the tars again",
        )
        return
    path = PurePosixPath(name)
    _check(".." not in path.parts, f"{where}: file leads out of the folder")
    _check(indexed or not path.is_absolute(), f"{where}: file is an absolute path")


def _check(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)
