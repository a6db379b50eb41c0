"""The folder for the index of foreign tars, and the names of the tars in it."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from mae_scale.data.remote import SCHEMES, has_secrets, is_remote, scheme_of, shown
from mae_scale.data.shards import INDEX, INDEX_DTYPE, MANIFEST, read_manifest
from mae_scale.errors import UserError


def expand(spec: str) -> list[str]:
    """List the tars that a folder, path, URL or command stands for; braces are expanded.

    Raises:
        UserError: there are no tars, or one does not exist.
    """
    from webdataset.shardlists import expand_urls

    if not is_remote(spec) and Path(spec).is_dir():
        tars = sorted(
            str(path)
            for path in Path(spec).glob("*.tar")
            if path.name[0] != "." and not path.is_dir()
        )
        if not tars:
            inside = sorted({str(path.parent) for path in Path(spec).glob("*/*.tar")})[:3]
            hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
            raise UserError(f"{spec} holds no tars{hint}")
        return tars
    if is_remote(spec) and scheme_of(spec) not in SCHEMES:
        raise UserError(
            f"{shown(spec)} begins with an unknown scheme; known: {':, '.join(SCHEMES)}:"
        )
    files = list(expand_urls(spec))
    for file in files:
        if not is_remote(file) and not Path(file).is_file():
            raise UserError(f"{file} does not exist" + (f" ({spec})" if file != spec else ""))
    return files


# A UUID, a hash or a number in the name of a tar; names that differ only in these are one family.
_COUNTER = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    r"|(?<![a-z0-9])(?:[0-9a-f]{8,}|(?=[a-f]*[0-9])[0-9a-f]{6,7})(?![a-z0-9])|[0-9]+",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"(?<![a-z])(train|val|valid|validation|dev|test)(?![a-z])", re.IGNORECASE)


def one_family(files: Sequence[str], pattern: str | None, typed: Sequence[str]) -> list[str]:
    """Return the tars that match a pattern, or all if their names are one family.

    Args:
        files: tars, URLs or commands.
        pattern: shell pattern for the name or the whole path; what matches is taken.
        typed: what the user gave in the place of the tars, for the message.

    Raises:
        UserError: nothing matches, or without a pattern the tars are of several families: their
            names differ in more than numbers or hashes.
    """
    if pattern is not None:
        found = [f for f in files if any(fnmatchcase(n, pattern) for n in (f, _base(f)))]
        if not found:
            some = ", ".join(shown(_base(file)) for file in files[:3])
            raise UserError(f"no tar matches --pattern {pattern}; there are {some}, ...")
        return found
    families: dict[str, list[str]] = {}
    for file in files:
        families.setdefault(_COUNTER.sub("\0", file), []).append(file)
    if len(families) <= 1:
        return list(files)
    same_folder = len({file.removesuffix(_base(file)) for file in files}) == 1
    names = [_base(file) if same_folder else file for file in files]
    lines = []
    for family in sorted(families)[:6]:
        wanted = {_base(f) if same_folder else f for f in families[family]}
        option = _pattern_of(wanted, names)
        words = {w.lower() for w in _SPLIT.findall(_base(family) if same_folder else family)}
        split = words.pop() if len(words) == 1 else ""
        split = "val" if split in ("valid", "validation", "dev") else split
        into = Path(typed[0]) / split
        out = f" --out {shlex.quote(str(into))}" if split and Path(typed[0]).is_dir() else ""
        lines.append(
            f"--pattern {shlex.quote(shown(option))}" + (f" --split {split}{out}" if split else "")
        )
    source = " ".join(shlex.quote(shown(spec)) for spec in typed[:2]) + " ..." * (len(typed) > 2)
    more = f"; and {len(families) - 6:,} more" if len(families) > 6 else ""
    raise UserError(
        f"the names of the tars are of {len(families):,} families, which may be several splits; "
        f"choose one: mae-scale index {source} {' | '.join(lines)}{more}; "
        "--pattern '*' takes all as one split"
    )


def _base(file: str) -> str:
    return file if file.startswith("pipe:") else file.rpartition("/")[2]


def _pattern_of(wanted: set[str], names: Sequence[str]) -> str:
    """Return a shell pattern that matches the wanted names and, where one exists, no others."""
    name = min(wanted)
    patterns = []
    for counter in ("*", "*[0-9]", "[0-9]*", "[0-9]*[0-9]"):
        parts = [glob.escape(part) for part in _COUNTER.split(name)]
        patterns.append(counter.join(parts))
    patterns.append("".join("[0-9]" if c.isdigit() else glob.escape(c) for c in name))
    exact = (p for p in patterns if {n for n in names if fnmatchcase(n, p)} == wanted)
    return next(exact, patterns[0])


def _parent(file: str) -> Path:
    # Links are not followed: in Hugging Face's cache they all lead to one shared folder.
    return Path(os.path.abspath(file)).parent  # noqa: PTH100


def index_folder(files: Sequence[str], out: str | Path | None) -> Path:
    """Choose the folder for the index of these tars.

    Raises:
        UserError: the tars lie in several folders and `out` is None, or the folder cannot be
            written.
    """
    if out is not None:
        folder = Path(out)
    else:
        parents = {None if is_remote(f) else _parent(f) for f in files}
        parent = parents.pop()
        if parents or parent is None:
            raise UserError("the tars lie in several folders or elsewhere; give one with --out")
        folder = parent
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    there = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written; give another folder for the index (--out)")
    return folder


def check_old_index(folder: Path, split: str, names: Sequence[str]) -> None:
    """Raise a UserError if the index would replace that of other tars."""
    if not (folder / MANIFEST).exists():
        if (folder / INDEX).exists() and not _is_ours(folder / INDEX):
            raise UserError(f"{folder} has an {INDEX} of something else; give another with --out")
        return
    old = read_manifest(folder)
    if "indexed" not in old["made_by"]:
        raise UserError(f"{folder} has a {MANIFEST} already, which `mae-scale shard` has written")
    if old["split"] != split or not {shard["file"] for shard in old["shards"]} <= set(names):
        raise UserError(
            f"{folder} has the index of the split {old['split']}, of {len(old['shards'])} tars, "
            "already, and a folder holds the index of one split; give another folder, such as "
            f"--out {folder / split}"
        )


def _is_ours(path: Path) -> bool:
    try:
        return np.lib.format.open_memmap(path, mode="r").dtype == INDEX_DTYPE
    except (ValueError, OSError):
        return False


def hide_commands(files: Sequence[str], folder: Path) -> tuple[str | None, list[str]]:
    """Return the command that reads the tars by their names, and their names in the manifest.

    Commands and URLs with secrets are not written into a manifest: the part that differs between
    them becomes the name, and the user gives the rest when reading. Without secrets the command is
    None.
    """
    if not any(has_secrets(file) for file in files):
        return None, [_relative(file, folder) for file in files]
    if len(files) == 1:
        match = list(re.finditer(r"[\w][\w./+@%,:-]*", files[0]))
        tars = [m for m in match if ".tar" in m[0]] or match[-1:]
        start, end = tars[-1].span()
        start = max(start, files[0].rfind("/", 0, end) + 1)
    else:
        prefix = os.path.commonprefix(list(files))  # noqa: RUF071
        backwards = [file[::-1] for file in files]
        suffix = os.path.commonprefix(backwards)[::-1]  # noqa: RUF071
        start = len(re.sub(r"[\w.+@%,-]*$", "", prefix))
        behind = re.match(r"[\w.+@%,-]*", suffix)
        assert behind is not None
        end = -(len(suffix) - behind.end()) or None  # type: ignore[assignment]
    command = files[0][:start] + "{}" + (files[0][end:] if end is not None else "")
    names = [file[start:end] for file in files]
    whole = all(
        command.replace("{}", name) == file for name, file in zip(names, files, strict=True)
    )
    if not whole or not all(re.fullmatch(r"[\w][\w./+@%,-]*", name) for name in names):
        raise UserError(
            "the commands (or URLs with a password or query) must differ only in the name of the "
            f"tar, as 'pipe:command {{000..127}}.tar' does: {shown(files[0])}"
        )
    return command, names


def _relative(file: str, folder: Path) -> str:
    if is_remote(file):
        return file
    path = Path(os.path.abspath(file))  # noqa: PTH100
    same = path.parent == Path(os.path.abspath(folder))  # noqa: PTH100
    return path.name if same else str(path)
