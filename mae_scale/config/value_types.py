"""Types of the values of config keys: numbers with a range, texts, lists.

The text in an `Annotated` type is what `--help` and messages call it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from mae_scale.files import is_utf8

T = TypeVar("T")

CHANGEABLE = "changeable"
Changeable = Annotated[T, Field(json_schema_extra={CHANGEABLE: True})]
"""A key that may change when a run continues: it decides neither which samples a step sees nor what
is learned from them."""


def _float(value: Any) -> Any:
    """Return a number for a text that is one: to YAML 1.1, `1e-3` is a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _whole(value: Any) -> Any:
    """Return an int for a whole number in another form, such as `1e6`."""
    value = _float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: Any) -> Any:
    """Check a text, and resolve `~`, which no shell resolves behind an equals sign.

    It is empty behind a shell's variable that is not set; an empty path would mean the working
    folder. It is not UTF-8 where a path holds other bytes; PyTorch cannot open such a path.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("the text is empty; give a value, or leave the key out")
    if not is_utf8(value):
        raise ValueError(f"{value!r} is not UTF-8, which PyTorch needs; rename it or link to it")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError(f"{value!r:.80} holds a control character")
    return str(Path(value).expanduser()) if value.startswith("~") else value


_Int = Annotated[int, BeforeValidator(_whole)]
_Float = Annotated[float, BeforeValidator(_float), Field(allow_inf_nan=False)]

Text = Annotated[str, BeforeValidator(_text)]
From0 = Annotated[_Int, Field(ge=0, lt=2**62), "whole number from 0 on"]
From1 = Annotated[_Int, Field(ge=1, lt=2**62), "whole number from 1 on"]
# Larger sizes would fill any memory before anything could say so.
Size = Annotated[_Int, Field(ge=1, le=16384), "whole number from 1 to 16384"]
Workers = Annotated[_Int, Field(ge=0, le=256), "whole number from 0 to 256"]
Finite = Annotated[_Float, "number"]
Above0 = Annotated[_Float, Field(gt=0), "number above 0"]
AtLeast0 = Annotated[_Float, Field(ge=0), "number from 0 on"]
AtLeast10 = Annotated[_Float, Field(ge=10), "number from 10 on"]
Share = Annotated[_Float, Field(ge=0, le=1), "number from 0 to 1"]
ShareAbove0 = Annotated[_Float, Field(gt=0, le=1), "number above 0 and up to 1"]
ShareBelow1 = Annotated[_Float, Field(ge=0, lt=1), "number from 0 to below 1"]
Between0And1 = Annotated[_Float, Field(gt=0, lt=1), "number between 0 and 1"]
# YAML has lists where Python has tuples.
Pair = Annotated[tuple[T, T], Field(strict=False)]
Several = Annotated[tuple[T, ...], Field(strict=False)]
