"""Reading a config: from YAML, every key overridable on the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from mae_scale.config.batch import fit_micro_batch
from mae_scale.config.identity import flatten
from mae_scale.errors import UserError, did_you_mean
from mae_scale.world import World

T = TypeVar("T")


RECIPES = Path(__file__).parents[1] / "recipes"


# The attribute docstrings below are what `--help` prints.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    """jsonargparse's parser with one-line errors that the command line turns into exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split()).replace("Parser key", "config key")
        number = re.search(r"Not of type ([\w ]+?):", text)
        value = re.search(
            r"Given value: (.*)$|: (\S+) does not conform|(?:literal|convert).*: ('.*')$", text
        )
        if number and value:
            given = next(group for group in value.groups() if group is not None)
            words = re.findall(r"typing\.Literal\[(.*?)\]", text)
            others = [*(f"one of {found}" for found in words), *["null"] * ("NoneType" in text)]
            text = f"{text.split(': ')[0]}: {given} is not a {' or '.join([number[1], *others])}"
        if re.search(r"Expected a <class '(tuple|list)'>", text):
            text += " (write it in brackets, such as '[0.9,0.95]')"
        text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
        raise UserError(text)


def recipe_names() -> list[str]:
    """Names that `--config` takes besides paths."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse(config_class: type[T], argv: list[str], prog: str) -> T:
    """Build a config from `--config FILE_OR_RECIPE` and `--section.key value` arguments.

    What stands on the command line wins over the file, wherever `--config` stands. A micro-batch
    that stands only in a file is an upper bound: see `fit_micro_batch`.

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
    known = config_keys(config_class)
    files, rest = _split_config_arguments(argv)
    for file in files:
        _check_known(_read_yaml(file), known, f" in {file}")
    options = [token[2:].split("=")[0] for token in rest if token.startswith("--")]
    _check_known(options, [*known, "help", "print_config"], "")
    _check_sections(rest, known)
    namespace = parser.parse_args([f"--config={file}" for file in files] + rest)
    namespace.pop("config")
    config = _plain(config_class(**vars(parser.instantiate(namespace))))
    if "train.micro_batch_size" not in options:
        fit_micro_batch(config.train, World.from_environment().size)
    return config


def _check_sections(arguments: list[str], known: list[str]) -> None:
    """Raise a UserError where a section got a value of one of its keys, such as `--model NAME`."""
    for number, token in enumerate(arguments):
        section, equals, value = token[2:].partition("=")
        keys = [key for key in known if key.startswith(f"{section}.")]
        if not token.startswith("--") or not keys:
            continue
        value = value if equals else next(iter(arguments[number + 1 :]), "")
        if not Path(value).is_file():
            raise UserError(
                f"--{section} is a section of the config and takes a YAML file, not {value!r}; did "
                f"you mean --{keys[0]} {value}?"
            )


def from_mapping(config_class: type[T], content: dict[str, Any]) -> T:
    """Build a config from the content of a run's config.yaml.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing required key.
    """
    parser = _Parser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    _check_known(flatten(content), config_keys(config_class), " in the run's config.yaml")
    namespace = parser.parse_object(content)
    return _plain(config_class(**vars(parser.instantiate(namespace))))


def _plain(value: Any) -> Any:
    """Give the same config with ordinary numbers, and `~` in paths resolved.

    jsonargparse's numbers with a range are classes of its own. They would be pickled into
    checkpoints, which could then not be read without it. A shell does not resolve `~` behind an
    equals sign or in YAML.
    """
    if dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            setattr(value, entry.name, _plain(getattr(value, entry.name)))
    elif isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    elif isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    elif isinstance(value, float):
        return float(value)
    elif isinstance(value, str) and value.startswith("~"):
        return str(Path(value).expanduser())
    return value


def given_values(argv: list[str]) -> dict[str, Any]:
    """Read what the `--config` files and the arguments set; of arguments the keys only.

    Raises:
        UserError: a file that is not there or not YAML.
    """
    files, rest = _split_config_arguments(argv)
    values: dict[str, Any] = {}
    for token in rest:
        if token.startswith("--"):
            values[token[2:].split("=")[0]] = None
    for file in files:
        values |= _read_yaml(file)
    return values


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
    hint = did_you_mean(value, recipe_names(), f"recipes: {', '.join(recipe_names())}")
    raise UserError(f"--config {value!r} is neither a file nor a recipe; {hint}")


def config_keys(config_class: Any, prefix: str = "") -> list[str]:
    """List the dotted names of all keys of a config class, sections included."""
    keys = []
    for name, hint in get_type_hints(config_class).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += config_keys(hint, f"{prefix}{name}.")
    return keys


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a config file: values by dotted key."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no config keys; expected lines such as 'seed: 1'")
    return flatten(content)


def _check_known(keys: Iterable[str], known: list[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise UserError(f"unknown config key '{key}'{where}; {_hint(key, known)}")


# What other programs call these keys.
HABITS = {
    "lr": "optim.base_lr",
    "learning_rate": "optim.base_lr",
    "blr": "optim.base_lr",
    "wd": "optim.weight_decay",
    "batch_size": "train.micro_batch_size",
    "total_batch_size": "train.global_batch_size",
    "data_path": "data.train",
    "data.path": "data.train",
    "dataset": "data.train",
    "num_workers": "data.workers",
    "output_dir": "run_dir",
    "output": "run_dir",
    "finetune": "weights",
    "checkpoint": "weights",
    "input_size": "model.img_size",
    "bf16": "train.precision",
    "amp": "train.precision",
}


def _hint(key: str, known: list[str]) -> str:
    """Name the key that was meant: what others call it, its last part, or the nearest one."""
    key = key.replace("-", "_")
    leaf = key.rpartition(".")[2]
    if HABITS.get(key, HABITS.get(leaf)) in known:
        return f"did you mean '{HABITS.get(key, HABITS.get(leaf))}'?"
    same = [other for other in known if other.rpartition(".")[2] == leaf]
    if same:
        return f"did you mean '{same[0]}'?"
    if leaf in ("gpu", "gpus", "nodes"):
        return "the launcher says how many processes there are; --gpus belongs to mae-scale plan"
    return did_you_mean(key, known, "--help lists the known ones")
