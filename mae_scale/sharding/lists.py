"""Reading lists of classes, and lists of images with or without labels."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from mae_scale.data.formats import IMAGE_SUFFIXES, is_image_name
from mae_scale.data.remote import printable
from mae_scale.data.shards import read_manifest
from mae_scale.errors import UserError
from mae_scale.sharding.imagenet import WNID
from mae_scale.sharding.labels import label_text, normal

MAX_BYTES = 1 << 30
_HEADERS = {
    "filename", "file", "name", "image", "path", "image_id", "imageid", "file_name", "img", "id",
    "image_name", "img_name", "image_path", "img_path", "filepath", "file_path", "fname", "images",
}  # fmt: skip
_LABELS = {
    "label", "labels", "class", "class_name", "classname", "class_id", "category", "category_id",
    "target", "breed", "species", "class_label", "cls",
}  # fmt: skip

_SPLITS = {
    "split", "splits", "set", "subset", "data_set", "dataset", "partition", "usage", "fold",
    "phase",
    "is_valid", "is_val", "is_train", "is_training", "is_training_image", "is_test",
}  # fmt: skip


def read_classes(spec: str | Path) -> list[str]:
    """Read the names of classes in the order of their numbers.

    Args:
        spec: folder of shards; or JSON list; or text with a class in each line. Text behind a
            WordNet id (as in ``LOC_synset_mapping.txt``), a tab or a comma is not read, nor is a
            number behind each name (as in ``categories_places365.txt``).

    Raises:
        UserError: the file cannot be read, or names a class twice.
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
            names = _names_in([line.strip() for line in text.splitlines() if line.strip()])
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


def _names_in(lines: list[str]) -> list[str]:
    """Return the class that each line names."""
    first = [line.split()[0].rstrip(",") for line in lines]
    if all(WNID.fullmatch(name) for name in first):
        return first
    for separator in "\t,":
        if lines and all(separator in line for line in lines):
            lines = [line.partition(separator)[0].strip() for line in lines]
    if all(re.fullmatch(r".*\S\s+\d+", line) for line in lines):
        numbers = [int(line.split()[-1]) for line in lines]
        if sorted(numbers) in (list(range(len(lines))), list(range(1, len(lines) + 1))):
            names = [line.rpartition(" ")[0].strip() for line in lines]
            lines = [name for _, name in sorted(zip(numbers, names, strict=True))]
    return [line.strip("/") for line in lines]


def read_text(path: Path) -> str:
    """Read a small text file in UTF-8.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES:,} bytes; is it a list?")
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None


def read_list(path: Path) -> list[tuple[str, str | None]]:
    """Read a list of images: each line has a path, with or without a label behind it.

    The result is a pair of path and label for each image; the label is None if there is none.

    A tab, a comma or blanks separate path and label. The label ends at the next tab or comma;
    behind a blank it is the rest of the line, or the first word if that is a number. A header such
    as ``filename,label`` names the columns of path and label. Lines that begin with # are left out.

    JSON may be a list of records with such keys, one record in each line, paths with their labels,
    or the form of iNaturalist and COCO: ``images``, with ``annotations`` that name a category each.

    Raises:
        UserError: the list cannot be read, or is empty.
    """
    text = read_text(path)
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        rows = _json_rows(text, path)
        if not rows:
            raise UserError(f"{path} names no images")
        return rows
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    separator = next((s for s in "\t,;" if lines and s in lines[0]), None)
    try:
        fields = (
            [_fields(line) for line in lines]
            if separator is None
            else [[f.strip() for f in row] for row in csv.reader(lines, delimiter=separator)]
        )
    except csv.Error as error:
        raise UserError(f"{path} is no table: {printable(str(error))}") from None
    fields = [row for row in fields if row]
    name_at, label_at = 0, 1
    head = [field.lower().replace(" ", "_") for field in fields[0]] if fields else []
    known = [i for i, field in enumerate(head) if field in _HEADERS]
    if head and not any(is_image_name(field) for field in fields[0]):
        labels = [i for i, field in enumerate(head) if field in _LABELS and i not in known[:1]]
        if known or labels:
            name_at = known[0] if known else 0
            label_at = labels[0] if labels else _label_column(head, name_at, path)
            fields = fields[1:]
            _refuse_splits(head, fields, path)
        elif len(fields) > 1 and any(is_image_name(field) for field in fields[1]):
            raise UserError(
                f"{path} begins with {printable(', '.join(fields[0][:4]))}, which is no image and "
                "no known header; name the two columns 'image' and 'label'"
            )
    labels_there = [row[label_at] for row in fields if label_at < len(row)]
    _refuse_labels(labels_there, path)
    rows = [
        (row[name_at], label_text(row[label_at]) if label_at < len(row) else None)
        for row in fields
        if name_at < len(row)
    ]
    if not rows:
        raise UserError(f"{path} names no images")
    return rows


def _refuse_labels(labels: list[str], path: Path) -> None:
    """Raise a UserError for a column that holds splits, measures or several labels each."""
    found = set(labels)
    words = {"train", "training", "val", "valid", "validation", "dev", "test"}
    if len(found) > 1 and {label.lower() for label in found} <= words:
        raise UserError(
            f"{path} has the names of splits where labels should stand "
            f"({', '.join(sorted(found)[:4])}); give a list of each split"
        )
    measures = [label for label in found if re.fullmatch(r"-?\d*\.\d*[1-9]\d*(e-?\d+)?", label)]
    if measures:
        raise UserError(
            f"{path} has numbers such as {min(measures)} where labels should stand; name the "
            "column of the label 'label'"
        )
    several = [label for label in found if "|" in label and {*label.split("|")} & found]
    if several:
        raise UserError(
            f"{path} gives an image several labels ({printable(min(several))}); an image has one "
            "class here: leave such lines out, or choose one label for each"
        )


def _label_column(head: list[str], name_at: int, path: Path) -> int:
    """Return the column of the labels in a table whose header has none of the usual names.

    Raises:
        UserError: several columns may be that one.
    """
    others = [i for i, name in enumerate(head) if name and i != name_at]
    close = [i for i in others if "label" in head[i] or "class" in head[i]]
    if not close and len(others) > 1:
        raise UserError(
            f"{path} does not say which column is the label ({', '.join(map(printable, head))}); "
            "call it label"
        )
    return (close or others or [len(head)])[0]


def _refuse_splits(head: list[str], rows: list[list[str]], path: Path) -> None:
    """Raise a UserError for a table with a column that assigns images to train and val."""
    for i, name in enumerate(head):
        values = {row[i] for row in rows if i < len(row)}
        if name in _SPLITS and len(values) > 1:
            raise UserError(
                f"{path} has images of several splits ({printable(name)}: "
                f"{', '.join(map(printable, sorted(values)[:4]))}); give a list of each"
            )


def _json_rows(text: str, path: Path) -> list[tuple[str, str | None]]:
    """Return the images of a JSON list, each with its label or None."""
    try:
        if path.suffix.lower() == ".json":
            found = json.loads(text)
        else:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {printable(str(error))}") from None
    try:
        if isinstance(found, dict) and "images" in found and "annotations" in found:
            name = {c["id"]: c.get("name", c["id"]) for c in found.get("categories", [])}
            if len(set(name.values())) < len(name):
                name = {}
            file_of = {image["id"]: image["file_name"] for image in found["images"]}
            return [
                (file_of[a["image_id"]], label_text(name.get(a["category_id"], a["category_id"])))
                for a in found["annotations"]
            ]
        if isinstance(found, dict):
            return [(str(key), label_text(value)) for key, value in found.items()]
        if all(isinstance(row, str) for row in found):
            return [(row, None) for row in found]
        first = {key.lower(): key for key in found[0]} if found else {}
        key = next((first[name] for name in first if name in _HEADERS), None)
        label = next((first[name] for name in first if name in _LABELS), None)
        if key is not None:
            return [(str(row[key]), label_text(row.get(label))) for row in found]
    except (KeyError, TypeError, AttributeError, IndexError):
        pass
    raise UserError(f"{path} is no list of images and labels in a form that is known")


def _fields(line: str) -> list[str]:
    # A name may hold blanks: it ends with the suffix of an image.
    match = re.match(r"(.*?\.(?:" + "|".join(IMAGE_SUFFIXES) + r"))(?:\s+(.*))?$", line, re.I)
    name, _, rest = (match[1], "", match[2] or "") if match else line.partition(" ")
    first = rest.split()[:1]
    if first and re.fullmatch(r"-?\d+(\.\d+)?", first[0]):
        rest = first[0]
    return [name, rest.strip()] if rest.strip() else [name]
