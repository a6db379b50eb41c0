"""Reading lists of classes, and of images with or without labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mae_scale.data.formats import IMAGE_SUFFIXES, is_image_name
from mae_scale.data.remote import printable
from mae_scale.data.shards import read_manifest
from mae_scale.errors import UserError
from mae_scale.sharding.labels import label_text, normal

MAX_BYTES = 1 << 30
_HEADERS = {"filename", "file", "name", "image", "path", "image_id", "imageid", "file_name", "img"}


def read_classes(spec: str | Path) -> list[str]:
    """Read the names of classes in the order of their numbers.

    Args:
        spec: a folder of shards; a JSON list; or a text with a class in the first word of each line
            (as in ``LOC_synset_mapping.txt``), or in the whole line where first words repeat.

    Raises:
        UserError: it cannot be read, or names a class twice.
    """
    path = Path(spec)
    if path.is_dir():
        names = read_manifest(path)["classes"]
    else:
        text = read_text(path)
        if path.suffix.lower() == ".json":
            try:
                names = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} is not JSON: {printable(str(error))}") from None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(f"{path} is no JSON list of names")
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            names = [line.split()[0] for line in lines]
            if len(set(names)) < len(names):
                names = lines
    names = [normal(name) for name in names]
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise UserError(f"{path} names the class {printable(twice)} twice")
    if not names:
        raise UserError(f"{path} names no classes")
    return names


def read_text(path: Path) -> str:
    """Read a small text file in UTF-8.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES:,} bytes; is it a list?")
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None


def read_list(path: Path) -> list[tuple[str, str | None]]:
    """Read the images of a list: each line has a path, with or without a label behind it.

    A tab, a comma or blanks separate path and label; what follows the label is not read. A header
    such as ``filename,label`` and lines that begin with # are left out.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    rows: list[tuple[str, str | None]] = []
    lines = [line.strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    separator = next((s for s in "\t," if lines and s in lines[0]), None)
    for number, line in enumerate(lines):
        name, *rest = _fields(line, separator)
        if number == 0 and not is_image_name(name) and name.lower() in _HEADERS:
            continue
        rows.append((name, label_text(rest[0]) if rest else None))
    if not rows:
        raise UserError(f"{path} names no images")
    return rows


def _fields(line: str, separator: str | None) -> list[str]:
    if separator is not None:
        return [field.strip() for field in line.split(separator)]
    # A name may hold blanks: it ends with the suffix of an image.
    match = re.match(r"(.*?\.(?:" + "|".join(IMAGE_SUFFIXES) + r"))(?:\s+(.*))?$", line, re.I)
    return [match[1], *(match[2] or "").split()] if match else line.split()
