"""Reading YAML that anybody may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mae_scale.errors import UserError
from mae_scale.files import read_file

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000
MOST_DEPTH = 30
_TOO_DEEP = f"it is nested more than {MOST_DEPTH} levels deep"
_TOO_MANY = f"it stands for more than {MOST_VALUES:,} values"


def read_yaml(path: Path) -> Any:
    """Read a YAML file that holds plain values, lists and dicts, and no objects.

    A few lines with aliases can stand for billions of values, or for a dict that holds itself, so
    that a walk through the content would never end. Such files are refused.

    Raises:
        OSError: the file cannot be read, is no regular file, or is too large for a config.
        ValueError: the file is not valid YAML, or stands for too many values; the message is one
            line.
    """
    return parse_yaml(read_file(path, MOST_BYTES))


def load_yaml(path: Path) -> Any:
    """Read a YAML file as `read_yaml` does, for a user who has named it.

    Raises:
        UserError: the file cannot be read, or is not valid YAML.
    """
    try:
        return read_yaml(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None


def parse_yaml(content: bytes) -> Any:
    """Parse the content of a YAML file, see `read_yaml`.

    Raises:
        ValueError: it is not valid YAML, or stands for too many values; the message is one line.
    """
    try:
        text = content.decode()
        _check_text(text)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError) as error:
        # PyYAML raises its own errors, and passes on the errors of the dates and numbers it makes.
        raise ValueError(" ".join(str(error).split())) from None
    _check_size(value)
    return value


def _check_text(text: str) -> None:
    """Refuse a text that is nested too deeply, or too long, before PyYAML spends long on it."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > MOST_VALUES:
            raise ValueError(_TOO_MANY)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise ValueError(_TOO_DEEP)


def _check_size(value: Any) -> None:
    waiting, count = [(value, 0)], 0
    while waiting:
        found, depth = waiting.pop()
        count += 1
        if depth > MOST_DEPTH:
            raise ValueError(_TOO_DEEP)
        if count + len(waiting) > MOST_VALUES:
            raise ValueError(_TOO_MANY)
        if isinstance(found, dict):
            waiting += [(item, depth + 1) for item in found.values()]
        elif isinstance(found, (list, tuple, set)):
            waiting += [(item, depth + 1) for item in found]
