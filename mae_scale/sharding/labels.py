"""The meaning of labels in tars and lists: numbers, names, or none."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mae_scale.data.remote import printable
from mae_scale.data.shards import NO_LABEL
from mae_scale.errors import UserError

LABEL_KEYS = ("label", "cls", "class", "target")  # keys of labels in .json
MOST_DIGITS = 300  # longer labels are names
MOST_CLASSES = 1_000_000  # numbers count from 0 if all are below this; otherwise they are names


def normal(name: str) -> str:
    """Return a class name in NFC, in which a letter with an accent is one character.

    macOS writes two characters, so that names which look the same would be different classes.
    """
    return unicodedata.normalize("NFC", name)


def label_text(value: Any) -> str | None:
    """Return a label in its plain form: a whole number in digits, or a name; None if it is none.

    ``7``, ``007`` and ``7.0`` are the same label; -1 and an empty text are no label.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (bool, type(None), list, dict)) or value != value:  # the last is NaN
        return None
    text = normal(str(value).strip().strip("\0"))
    if len(text) > MOST_DIGITS:
        return text  # Python refuses to make numbers of some thousand digits
    try:
        number = float(text)
        if text.lower() in ("nan", "inf", "-inf", "infinity", "-infinity") or "_" in text:
            return text
        if math.isfinite(number) and number == int(number):
            digits = str(int(text)) if text.lstrip("+-").isdigit() else str(int(number))
            return None if digits == str(NO_LABEL) else digits
    except (ValueError, OverflowError):
        pass
    return text or None


def label_in_text(content: bytes, where: str) -> str | None:
    """Return the label in the content of a .cls.

    Raises:
        UserError: the content is no text, or a list of numbers.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}.cls is no text, but {len(content):,} other bytes") from None
    if text.lstrip().startswith(("[", "{")):
        raise UserError(
            f"{where}.cls is {printable(text.strip()[:40])}, and neither a number nor a name"
        )
    return label_text(text)


def label_in_json(content: bytes, where: str, keys: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the label in a .json, under the first key of `keys` that has one, and all its keys.

    Raises:
        UserError: the content is not JSON.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}.json is not JSON: {printable(str(error))}") from None
    if not isinstance(record, dict):
        return None, []
    found = (label_text(record[key]) for key in keys if key in record)
    return next((label for label in found if label is not None), None), list(record)


def number_labels(
    labels: Sequence[str | None], classes: Sequence[str] | None = None
) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return the numbers of labels, int32 [n], and the class names.

    If all labels are numbers below MOST_CLASSES, they are used unchanged and count from 0.
    Otherwise the labels are sorted and numbered.

    Args:
        labels: labels in plain form, see `label_text`; None becomes NO_LABEL.
        classes: class names in the order of their numbers; by default those of the labels.

    Raises:
        UserError: some labels are below 0, or are not among `classes`.
    """
    known = {label for label in labels if label is not None}
    if classes is not None:
        number = number_by(classes, known)
    elif all(_is_number(label) for label in known):
        values = {label: int(label) for label in known}
        if any(value < 0 for value in values.values()):
            raise UserError(f"labels below 0, such as {min(values.values())}, are no classes")
        most = max(values.values(), default=-1)
        if most < MOST_CLASSES:
            classes, number = [str(i) for i in range(most + 1)], values
        else:
            classes = sorted(known, key=int)
            number = {name: i for i, name in enumerate(classes)}
    else:
        classes = sorted(known)
        number = {name: i for i, name in enumerate(classes)}
    numbers = [NO_LABEL if label is None else number[label] for label in labels]
    return np.array(numbers, np.int32), list(classes)


def _is_number(label: str) -> bool:
    return label.lstrip("-").isdigit() and label.isascii() and len(label) <= MOST_DIGITS


def number_by(classes: Sequence[str], labels: set[str]) -> dict[str, int]:
    """Return the number of each label among given classes, by its name or else by its number.

    Raises:
        UserError: some labels are not among the classes.
    """
    number = {normal(name): i for i, name in enumerate(classes)}
    if not labels <= number.keys() and all(label.isdigit() for label in labels):
        number = {str(i): i for i in range(len(classes))}
    if missing := sorted(labels - number.keys()):
        raise UserError(
            f"{len(missing)} of {len(labels)} labels are not among the {len(classes)} classes: "
            f"{', '.join(map(printable, missing[:4]))}{', …' if len(missing) > 4 else ''}"
        )
    return number
