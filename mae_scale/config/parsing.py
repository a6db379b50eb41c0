"""Reading a config: from YAML, every key overridable on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from mae_scale.config.identity import flatten
from mae_scale.config.sections import FinetuneConfig, LinprobeConfig, PretrainConfig, RunConfig
from mae_scale.errors import UserError

T = TypeVar("T")


RECIPES = Path(__file__).parents[1] / "recipes"


# The attribute docstrings below are what `--help` prints.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


AT_LEAST = {
    "seed": 0,
    "replay": 1,
    "data.workers": 0,
    "data.lanes": 1,
    "data.window": 1,
    "train.epochs": 1,
    "train.max_steps": 1,
    "train.max_bad_steps": 1,
    "train.log_every": 1,
    "train.hang_timeout": 10,
    "train.validate_epochs": 1,
    "train.reconstruct_every": 1,
    "optim.warmup_epochs": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "checkpoint.background_gb": 0,
    "checkpoint.milestone_epochs": 1,
}


class _Parser(ArgumentParser):
    """jsonargparse's parser with one-line errors that the command line turns into exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split()).replace("Parser key", "config key")
        text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
        raise UserError(text)


def recipe_names() -> list[str]:
    """Names that `--config` takes besides paths."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse(config_class: type[T], argv: list[str], prog: str) -> T:
    """Build a config from `--config FILE_OR_RECIPE` and `--section.key value` arguments.

    What stands on the command line wins over the file, wherever `--config` stands.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of the wrong type, a
            missing required key, a file that is not there or not YAML.
    """
    parser = _Parser(prog=prog, description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file, or the name of a recipe: {', '.join(recipe_names())}.",
    )
    parser.add_class_arguments(config_class)
    known = _keys(config_class)
    files, rest = _split_config_arguments(argv)
    for file in files:
        _check_known(_yaml_keys(file), known, f" in {file}")
    options = [token[2:].split("=")[0] for token in rest if token.startswith("--")]
    _check_known(options, [*known, "help", "print_config"], "")
    namespace = parser.parse_args([f"--config={file}" for file in files] + rest)
    namespace.pop("config")
    config = config_class(**vars(parser.instantiate(namespace)))
    flat = flatten(dataclasses.asdict(config))  # type: ignore[call-overload]
    for key, least in AT_LEAST.items():
        if flat.get(key) is not None and flat[key] < least:
            raise UserError(f"{key} is {flat[key]}; it must be at least {least}")
    return config


def config_class_of(argv: list[str]) -> type[RunConfig]:
    """Of which task the `--config` files and `--section.key` arguments are: by their keys.

    Raises:
        UserError: a file that is not there or not YAML.
    """
    given = given_keys(argv)
    classes: tuple[type[RunConfig], ...] = (PretrainConfig, FinetuneConfig, LinprobeConfig)
    # A mistyped key is nobody's; the class that knows most of them will name it.
    return max(classes, key=lambda config: sum(key in _keys(config) for key in given))


def given_keys(argv: list[str]) -> set[str]:
    """Keys that the `--config` files and arguments set."""
    files, rest = _split_config_arguments(argv)
    keys = {key for file in files for key in _yaml_keys(file)}
    return keys | {token[2:].split("=")[0] for token in rest if token.startswith("--")}


def _split_config_arguments(argv: list[str]) -> tuple[list[Path], list[str]]:
    """Take the `--config` arguments out of argv, recipe names resolved to their files."""
    files, rest, tokens = [], [], iter(argv)
    for token in tokens:
        if token == "--config" or token.startswith("--config="):
            value = token[9:] if "=" in token else next(tokens, "")
            files.append(_find_config(value))
        else:
            rest.append(token)
    return files, rest


def _find_config(value: str) -> Path:
    for path in (Path(value), RECIPES / f"{value}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(value, recipe_names(), 1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; recipes: {', '.join(recipe_names())}"
    raise UserError(f"--config {value!r} is neither a file nor a recipe{hint}")


def _keys(config_class: Any, prefix: str = "") -> list[str]:
    """Dotted names of all keys of a config class, sections included."""
    keys = []
    for name, hint in get_type_hints(config_class).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += _keys(hint, f"{prefix}{name}.")
    return keys


def _yaml_keys(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no config keys; expected lines such as 'seed: 1'")
    return list(flatten(content))


def _check_known(keys: Iterable[str], known: list[str], where: str) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else "; --help lists the known ones"
            raise UserError(f"unknown config key '{key}'{where}{hint}")
