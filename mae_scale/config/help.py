"""The text of `--help` for commands that have a config: common keys come first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from mae_scale.config.keys import Key, Section, config_keys, sections_of, type_text

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


def help_text(config_class: type[Section], prog: str, recipes: Iterable[str]) -> str:
    """Describe the keys of a config.

    Args:
        config_class: class of the config.
        prog: name of the command, such as `mae-scale pretrain`.
        recipes: examples of names that `--config` takes.

    Returns:
        The text, wrapped at 79 characters.
    """
    keys = config_keys(config_class)
    lines = [
        f"usage: {prog} [--config FILE_OR_RECIPE] --run_dir DIR --data.train SHARDS",
        " " * len(f"usage: {prog} ") + "[--section.key VALUE ...]",
        "",
        *_wrapped(config_class.__doc__ or "", ""),
        "",
        "Each key stands here with its default. In a file the same keys are nested. A key",
        "that may change may have another value when a run continues; all others decide",
        "which run it is.",
        "",
        "Common keys:",
    ]
    for option, text in OWN.items():
        lines += [f"  {option}", *_wrapped(text.format(recipes=", ".join(recipes)))]
    for name in FIRST:
        lines += _entry(name, keys[name])
    rest = {name: key for name, key in keys.items() if name not in FIRST}
    for section, kind in sections_of(config_class).items():
        own = {name: key for name, key in rest.items() if name.startswith(f"{section}.")}
        if own:
            lines += ["", *_wrapped(f"More of {section}: {kind.__doc__}", "")]
            lines += [line for name, key in own.items() for line in _entry(name, key)]
    others = [line for n, key in rest.items() if "." not in n for line in _entry(n, key)]
    return "\n".join([*lines, "", "More:", *others]) + "\n"


def _entry(name: str, key: Key) -> list[str]:
    default, needed = ("", "needed; ") if key.is_needed else (f" {_value(key.default)}", "")
    changes = "; may change" if key.is_changeable else ""
    text = f"{key.text} ({needed}{type_text(key.type)}{changes})"
    return [f"  --{name}{default}", *_wrapped(text)]


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
