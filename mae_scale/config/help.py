"""The text of `--help` for commands that have a config: the keys that one sets first come first."""

from __future__ import annotations

import dataclasses
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WIDTH = 80
FIRST = (
    "run_dir", "data.train", "data.val", "weights", "model.name", "model.img_size", "train.epochs",
    "train.global_batch_size", "train.micro_batch_size", "optim.base_lr", "deepspeed",
)  # fmt: skip
OWN = {  # options that are no keys of the config, and their texts
    "--config FILE_OR_RECIPE": "YAML file, or the name of a recipe, such as {recipes}. "
    "What is given as an option wins over it.",
    "--print_config": "Print the config that these options give, and do nothing else.",
    "--help, -h": "Print this text.",
}
TYPES = {bool: "true or false", str: "text", int: "whole number", float: "number"}
TYPES[type(None)] = "null"


def help_text(
    config_class: type[Any],
    actions: Sequence[Action],
    prog: str,
    recipes: Iterable[str],
) -> str:
    """Describe the keys of a config.

    Args:
        config_class: class of the config.
        actions: actions of the parser that reads the config.
        prog: name of the command, such as `mae-scale pretrain`.
        recipes: examples of names that `--config` takes.

    Returns:
        The text, wrapped at 79 characters.
    """
    by_key = {a.dest: a for a in actions if hasattr(a, "_typehint") and a.help != SUPPRESS}
    types = get_type_hints(config_class)
    sections = {name: t for name, t in types.items() if dataclasses.is_dataclass(t)}
    keys = [key for key in by_key if key not in sections]
    first = [key for key in FIRST if key in by_key]
    lines = [
        f"usage: {prog} [--config FILE_OR_RECIPE] --run_dir DIR --data.train SHARDS",
        " " * len(f"usage: {prog} ") + "[--section.key VALUE ...]",
        "",
        *_wrapped(config_class.__doc__ or "", ""),
        "",
        "Each key stands here with its default. In a file the same keys are nested.",
        "",
        "What one sets first:",
    ]
    for option, text in OWN.items():
        lines += [f"  {option}", *_wrapped(text.format(recipes=", ".join(recipes)))]
    for key in first:
        lines += _entry(key, by_key[key])
    for name, section in sections.items():
        rest = [key for key in keys if key.startswith(f"{name}.") and key not in first]
        if rest:
            lines += ["", *_wrapped(f"More of {name}: {section.__doc__}", "")]
            lines += [line for key in rest for line in _entry(key, by_key[key])]
    others = [key for key in keys if "." not in key and key not in first]
    lines += ["", "More:", *(line for key in others for line in _entry(key, by_key[key]))]
    return "\n".join(lines) + "\n"


def _entry(key: str, action: Any) -> list[str]:
    required = action.default is None and type(None) not in get_args(action._typehint)
    default = "" if required else f" {_value(action.default)}"
    kind = type_text(action._typehint)
    needed = "needed; " if required else ""
    return [f"  --{key}{default}", *_wrapped(f"{action.help} ({needed}{kind})")]


def _wrapped(text: str, indent: str = " " * 8) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        WIDTH - 1,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_value, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def type_text(hint: Any) -> str:
    """Describe a type in words, such as `whole number from 1 on or null`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(type_text, inner))
    if origin is Literal:
        return f"one of {', '.join(inner)}" if len(inner) > 1 else str(inner[0])
    if origin in (tuple, list):
        length = "" if origin is list or Ellipsis in inner else f" of {len(inner)}"
        return f"list{length} in brackets, each {type_text(inner[0])}"
    return str(TYPES.get(hint) or getattr(hint, "__name__", hint))
