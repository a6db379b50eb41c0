"""Images in tars, compressed or not: one tar for each class, for each split, or for everything."""

from __future__ import annotations

import bz2
import lzma
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from isal import igzip
from isal.isal_zlib import IsalError

from mae_scale.data.formats import MAX_FILE, is_array_name, is_image_name
from mae_scale.data.remote import printable
from mae_scale.errors import UserError
from mae_scale.sharding.imagenet import WNID, base_of
from mae_scale.sharding.listing import Entry, Listing
from mae_scale.sharding.processes import run_all
from mae_scale.sharding.tars import Tail, lacks_end, problem_of, stream_tar, walk_tar
from mae_scale.sharding.words import LIST_SUFFIXES, may_list, says_nothing, split_word

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_OTHERS = (".zip", ".7z", ".rar", ".tar.zst", ".tzst", ".tar.lz4", *_COMPRESSED, ".tar")


class Listed(NamedTuple):
    """The content of one tar."""

    entries: list[Entry]
    labels: str  # name of a file with a label beside an image; empty if there is none
    tables: list[str]  # files that may be lists of images
    cut: bool  # the end marker is missing
    left_out: list[tuple[str, str]]  # images that are no plain files, and why


def is_compressed(path: Path) -> bool:
    """Return whether a file's name is that of a compressed tar, which cannot be read by offset."""
    return path.name.lower().endswith(_COMPRESSED)


def stem_of_tar(path: Path) -> str:
    """Return the name of a tar without its suffixes."""
    return re.sub(r"(\.tar(\.\w+)?|\.tgz)$", "", path.name, flags=re.I)


def find_archives(src: Path, split: str) -> list[Path]:
    """Find the tars with the images of a split: in a folder, in ``data``, or in the split's folder.

    Tars of other splits are left out; tars whose names say no split are taken.

    Raises:
        UserError: there are tars, but none of this split, or it is not clear which are.
    """
    folders = [p for p in sorted(src.iterdir()) if p.is_dir() and p.name[0] != "."]
    there: set[str] = set()
    for group in ([src], [src / "data"], [f for f in folders if split_word(f.name)[1]]):
        tars = [path for folder in group for path in _tars_in(folder)]
        inside = {f: split_word(f.name)[0] for f in group if f != src}
        word_of = _splits_of([p for p in tars if not inside.get(p.parent)], src)
        word_of |= {p: inside[p.parent] for p in tars if inside.get(p.parent)}
        there |= {word for word in word_of.values() if word}
        found = [path for path in tars if word_of[path] in (split, None)]
        if found:
            return found
    if there:
        raise UserError(f"{src} has no {split} split; it has: {', '.join(sorted(there))}")
    return []


def _splits_of(tars: Sequence[Path], src: Path) -> dict[Path, str | None]:
    """Return the split that the name of each tar means.

    A name with other words in it (``train_256_places365standard``) means a split if it is the only
    tar, or if other names mean a split and nothing else. Otherwise it may be a class, such as
    ``bullet_train``.
    """
    words = {path: split_word(stem_of_tar(path)) for path in tars}
    exact = {word for word, pure in words.values() if word and pure}
    loose = {path: word for path, (word, pure) in words.items() if word and not pure}
    splits = set(loose.values())
    if (exact & splits) or (not exact and len(splits) > 1):
        raise UserError(
            f"{src}: it is not clear whether {', '.join(sorted(p.name for p in loose)[:4])} are "
            "splits, or parts or copies of one; put the tars of the split into a folder of their "
            "own, and give that as SRC"
        )
    means = bool(exact) or len(tars) == 1
    return {p: word if pure or means else None for p, (word, pure) in words.items()}


def _tars_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [
        p
        for p in sorted(folder.iterdir())
        if (p.name.lower().endswith(".tar") or is_compressed(p))
        and p.name[0] != "."
        and "devkit" not in p.name
        and not p.name.startswith("ILSVRC2012_")
        and p.is_file()
    ]


def other_archives(src: Path) -> list[str]:
    """Return the names of archives in a folder, for messages."""
    return sorted(p.name for p in src.iterdir() if p.name.lower().endswith(_OTHERS))


def holds_images(src: Path, itself: bool = False) -> bool:
    """Return whether any image lies in a folder below `src`, or with `itself` in `src` itself."""
    for folder, below, files in os.walk(src):
        below[:] = [name for name in below if not name.startswith(".")]
        images = (name for name in files if is_image_name(name) and not is_array_name(name))
        if (itself or Path(folder) != src) and any(images):
            return True
    return False


def read_archives(
    tars: Sequence[Path], src: Path, workers: int, spool: IO[bytes] | None, sure: bool
) -> Listing:
    """List the images of tars by the paths that they would have if all tars were unpacked.

    A tar whose images lie in one folder holds one class, whose name is the tar's. Images whose
    names end with a WordNet id (Hugging Face: ``ILSVRC2012_val_1_n01440764.JPEG``) are of that
    class.

    Args:
        tars: tars to read.
        src: folder that the tars lie in.
        workers: number of processes that read tars.
        spool: file into which compressed tars are unpacked; None: there are none.
        sure: whether the user has said what the classes are.

    Raises:
        UserError: a tar is damaged or has labels in it, or it is not clear what the tars are.
    """
    plain = [(i, str(p)) for i, p in enumerate(tars) if not is_compressed(p)]
    listed = dict(run_all(_list_tar, plain, workers)) if plain else {}
    for i, path in enumerate(tars):
        if is_compressed(path):
            assert spool is not None
            listed[i] = _unpack(path, spool)
    listing = Listing()
    flat = []
    for i, path in enumerate(tars):
        entries, labels, tables, cut, lost = listed[i]
        listing.left_out += lost
        listing.tables += tables
        if labels:
            raise UserError(
                f"{path} holds labels ({labels}): it is a WebDataset tar and not the tar of a "
                f"class; use `mae-scale index {path.parent}` instead"
            )
        if cut:
            listing.notes.append(f"{path} has no end marker: it may be cut")
        if not entries:
            listing.left_out.append((path.name, "the tar holds no images"))
            continue
        stem = stem_of_tar(path)
        folders = {e.name.rpartition("/")[0] for e in entries}
        ids = {e.name.rpartition(".")[0].rpartition("_")[2] for e in entries}
        above = f"{path.parent.name}/" if split_word(path.parent.name)[1] else ""
        if (len(ids) > 1 and all(map(WNID.fullmatch, ids))) or _hugging_face(entries):
            names = [
                f"{above}{e.name.rpartition('.')[0].rpartition('_')[2]}/{base_of(e.name)}"
                for e in entries
            ]
        elif len(folders) == 1:
            names = [f"{above}{stem}/{base_of(e.name)}" for e in entries]
            flat.append(stem)
        else:
            inner = _common_folder(folders)
            names = [e.name[len(inner) :] for e in entries]
            if split_word(stem)[1] and not all(split_word(n.partition("/")[0])[1] for n in names):
                above += f"{stem}/"
            names = [above + name for name in names]
        listing.images += [e._replace(name=n) for e, n in zip(entries, names, strict=True)]
    listing.leave_out_arrays()
    parts = [stem for stem in flat if says_nothing(stem) and not split_word(stem)[1]]
    if len(parts) > 1 and len(parts) == len(flat) and not sure:
        raise UserError(
            f"{src}: it is not clear whether {', '.join(parts[:3])} are the tars of classes or "
            "parts of a whole; if each is a class, say so with --class-depth 1; else unpack them, "
            "or read them without labels through `mae-scale index`"
        )
    return listing


def _hugging_face(entries: Sequence[Entry]) -> bool:
    return all(
        re.search(r"_\d+_n\d{8}\.\w+$", e.name) or re.search(r"val_\d+_n\d{8}\.\w+$", e.name)
        for e in entries
    )


def _common_folder(folders: set[str]) -> str:
    """Return the folders with which all paths begin, up to one whose name means a split."""
    common = os.path.commonpath([f"/{folder}" for folder in folders]).strip("/")
    kept = []
    for part in common.split("/") if common else ():
        if split_word(part)[1]:
            break
        kept.append(part)
    return "".join(f"{part}/" for part in kept)


def _clean(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _visible(name: str) -> bool:
    return is_image_name(name) and not any(p.startswith(".") for p in _clean(name).split("/"))


def _list_tar(task: tuple[int, str]) -> tuple[int, Listed]:
    number, path = task
    entries: list[Entry] = []
    lost: list[tuple[str, str]] = []
    texts: list[str] = []
    for m in walk_tar(Path(path)):
        if m.problem and is_image_name(m.name):
            lost.append((f"{Path(path).name}: {m.name}", m.problem))
        elif _visible(m.name) and not m.problem:
            entries.append(Entry("", _clean(m.name), m.size, m.offset, number))
        elif _is_text(m.name):
            texts.append(_clean(m.name))
    return number, Listed(entries, *_meaning_of(texts, entries), lacks_end(Path(path)), lost)


def _is_text(name: str) -> bool:
    """Return whether a file may hold the label of an image, or a list of images."""
    suffix, base = name.rpartition(".")[2].lower(), base_of(name)
    text = suffix in ("cls", "json") or (suffix in LIST_SUFFIXES and may_list(base))
    return text and not base.startswith(".")


def _meaning_of(texts: Sequence[str], entries: Sequence[Entry]) -> tuple[str, list[str]]:
    """Return the name of a file with the label of an image, and the names of lists of images.

    A label file has the key of an image. Its name is empty if there is none.
    """
    keys = {e.name.rpartition(".")[0] for e in entries}
    beside = [t.rpartition(".")[0] in keys for t in texts]
    labels = (t for t, b in zip(texts, beside, strict=True) if b and t.endswith((".cls", ".json")))
    lists = [t for t, b in zip(texts, beside, strict=True) if not b and may_list(base_of(t))]
    return next(labels, ""), lists


def _unpack(path: Path, spool: IO[bytes]) -> Listed:
    entries: list[Entry] = []
    lost: list[tuple[str, str]] = []
    texts: list[str] = []
    opens: Any = {".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix.lower(), igzip.open)
    try:
        with opens(path, "rb") as raw:
            stream = Tail(raw)
            for member, tar in stream_tar(stream, str(path)):
                name = member.name
                if problem := problem_of(member):
                    if is_image_name(name):
                        lost.append((f"{path.name}: {name}", problem))
                elif member.isfile() and _visible(name):
                    if member.size > MAX_FILE:
                        problem = f"it has more than {MAX_FILE:,} bytes"
                        lost.append((f"{path.name}: {name}", problem))
                        continue
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if len(data) != member.size:
                        raise UserError(f"{path} ends inside {printable(name)}: it is cut short")
                    entries.append(Entry("", _clean(name), len(data), spool.tell(), -1))
                    spool.write(data)
                elif member.isfile() and _is_text(name):
                    texts.append(_clean(name))
    except (tarfile.TarError, EOFError, lzma.LZMAError, IsalError, OSError) as error:  # type: ignore[misc]  # its stubs say it is an instance
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is not an intact archive: {printable(str(error))}") from None
    return Listed(entries, *_meaning_of(texts, entries), not stream.has_end, lost)
