"""Reading a config from YAML and from the command line, where every key can be overridden."""

from __future__ import annotations

import dataclasses
import re
from argparse import HelpFormatter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from mae_scale.config.batch import fit_micro_batch
from mae_scale.config.help import help_text, type_text
from mae_scale.config.hints import hint_for
from mae_scale.config.identity import flatten
from mae_scale.config.yaml_files import load_yaml
from mae_scale.errors import UserError, did_you_mean
from mae_scale.files import is_utf8
from mae_scale.world import World

T = TypeVar("T")


RECIPES = Path(__file__).parents[1] / "recipes"


# `--help` prints the docstrings of the attributes of the config classes.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    """The parser of jsonargparse, with our help text, and errors as `UserError`s of one line."""

    config_class: Any = None
    """Class of the config that this parser reads; None where it does not belong to a command."""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Return the text of `--help`."""
        if self.config_class is None:
            return super().format_help(formatter)
        names = [n for n in recipe_names() if n.startswith(self.prog.split()[-1])]
        return help_text(self.config_class, self._actions, self.prog, names)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as a `UserError`, in plain words instead of Python's type names."""
        text = " ".join(message.split()).replace("Parser key", "config key")
        if found := re.fullmatch(r"[Uu]nrecognized arguments: (.*)", text):
            hint = self._hint(found[1].split()[0])
            raise UserError(f"unrecognized arguments: {found[1]}; {hint}")
        if found := re.fullmatch(r"the following arguments are required: (.*)", text):
            needed = ", ".join(f"--{key}" for key in found[1].split(", "))
            raise UserError(
                f"the following arguments are required: {needed}; {self.prog} --help explains them"
            )
        if found := re.fullmatch(r"argument (--\S+): expected one argument", text):
            raise UserError(f"{found[1]} needs a value")
        number = re.search(r"Not of type ([\w ]+?):", text)
        value = re.search(
            r"Given value: (.*)$|: (\S+) does not conform|(?:literal|convert).*: ('.*')$", text
        )
        start = text.split(": ")[0]
        hint = self._type_of(start.removeprefix("config key ").strip('"'))
        if value and any(get_origin(kind) in (tuple, list) for kind in get_args(hint)):
            given = next(group for group in value.groups() if group is not None)
            given = "null" if given == "None" else given
            raise UserError(f"{start}: {given} is not a {type_text(hint)}")
        words = [word for found in _LITERAL.findall(text) for word in found.split(", ")]
        words = list(dict.fromkeys(word.strip("'") for word in words))
        if number and text.endswith("not 'NoneType'"):
            raise UserError(f"{start}: null is not a {number[1]}")
        if number and value:
            given = next(group for group in value.groups() if group is not None)
            others = ["one of " + ", ".join(words)] * bool(words) + ["null"] * ("NoneType" in text)
            raise UserError(f"{start}: {given} is not a {' or '.join([number[1], *others])}")
        expected = re.search(r"Expected a (.+?)\. Got value: (.*)$", text)
        if expected and words:
            raise UserError(f"{start}: {expected[2]} is not one of {', '.join(words)}")
        if expected and (sequence := re.search(r"(tuple|list)(?:'>)?( with \d+ elements)?", text)):
            length = sequence[2] or ""
            raise UserError(
                f"{start}: {expected[2]} is not a list{length}; write it in brackets, such as "
                "'[0.9,0.95]'"
            )
        raise UserError(re.sub(r"<class '(\w+)'>", r"\1", text))

    def _type_of(self, key: str) -> Any:
        """Return the type of a dotted config key; None if there is no such key."""
        kind: Any = self.config_class
        for name in key.split("."):
            kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
        return kind

    def _hint(self, word: str) -> str:
        """Give a hint for an argument that is no option."""
        if self.config_class is None:
            return "there is no such option"
        key, _, value = word.lstrip("-").partition("=")
        known = config_keys(self.config_class)
        if key in known:
            return f"did you mean --{key}{f'={value}' if value else ''}?"
        if word.startswith("-"):
            return f"options begin with two dashes; {hint_for(key, known)}"
        return "they belong to no option; a value with spaces is quoted, a list is in brackets"


_LITERAL = re.compile(r"typing\.Literal\[(.*?)\]")


def recipe_names() -> list[str]:
    """List the names that `--config` takes besides paths."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse(config_class: type[T], argv: list[str], prog: str) -> T:
    """Build a config from `--config FILE_OR_RECIPE` and `--section.key value` arguments.

    An argument on the command line wins over the file, wherever `--config` stands. A micro-batch
    that stands only in a file is an upper bound: see `fit_micro_batch`.

    Args:
        config_class: class of the config.
        argv: arguments behind the name of the command.
        prog: name of the command, for messages.

    Raises:
        UserError: an unknown key (the message names the nearest known one), a value of the wrong
            type, a missing required key, or a file that is missing or not YAML.
    """
    parser = config_parser(config_class, prog)  # type: ignore[arg-type]  # classes are hashable
    known = config_keys(config_class)
    files, rest = _split_config_arguments(argv)
    for file in files:
        values = _read_yaml(file)
        _check_known(values, known, f" in {file}")
        _check_file_sections(values, known, file)
    options = [token[2:].split("=")[0] for token in rest if token.startswith("--")]
    _check_known(options, [*known, "help", "print_config"], "")
    _check_sections(rest, known)
    namespace = parser.parse_args([f"--config={file}" for file in files] + rest)
    namespace.pop("config")
    config = _plain(config_class(**vars(parser.instantiate(namespace))))
    _check_nulls(config)
    _check_texts(config)
    if "train.micro_batch_size" not in options:
        fit_micro_batch(config.train, World.from_environment().size)
    return config


@lru_cache
def config_parser(config_class: type[Any], prog: str) -> ArgumentParser:
    """Make the parser of a command that has a config, once: it takes a fifth of a second."""
    parser = _Parser(prog=prog, allow_abbrev=False)
    parser.config_class = config_class
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class)
    return parser


def _check_sections(arguments: list[str], known: list[str]) -> None:
    """Raise a UserError where a section is given the value of a key, such as `--model NAME`."""
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


def _check_nulls(config: Any, prefix: str = "") -> None:
    """Raise a UserError where a file sets a key to null although the key needs a value."""
    hints = get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value, hint = getattr(config, entry.name), hints[entry.name]
        if dataclasses.is_dataclass(value):
            _check_nulls(value, f"{prefix}{entry.name}.")
        elif value is None and hint is not Any and type(None) not in get_args(hint):
            raise UserError(
                f'config key "{prefix}{entry.name}": null is not a {type_text(hint)}; '
                "give a value, or leave the key out"
            )


def _check_texts(config: Any, prefix: str = "") -> None:
    """Raise a UserError where a text is empty or not UTF-8.

    It is empty behind a shell's variable that is not set; an empty path would mean the working
    folder. It is not UTF-8 where a path holds other bytes; PyTorch cannot open such a path.
    """
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            _check_texts(value, f"{prefix}{entry.name}.")
        elif isinstance(value, str) and not value.strip():
            raise UserError(
                f'config key "{prefix}{entry.name}": the text is empty; give a value, or leave '
                "the key out"
            )
        elif isinstance(value, str) and not is_utf8(value):
            raise UserError(
                f'config key "{prefix}{entry.name}": {value!r} is not UTF-8, which PyTorch needs; '
                "rename it or link to it"
            )


def _check_file_sections(values: Mapping[str, Any], known: list[str], file: Path) -> None:
    """Raise a UserError where a file gives a section a value instead of keys."""
    for section, value in values.items():
        keys = [key for key in known if key.startswith(f"{section}.")]
        if keys:
            name = keys[0].partition(".")[2]
            what = "nothing" if value is None or value == {} else repr(value)
            raise UserError(
                f"{file}: {section} is a section of keys such as '{name}: ...', but holds {what}; "
                "write keys below it, or leave it out"
            )


def from_mapping(config_class: type[T], content: dict[str, Any]) -> T:
    """Build a config from the content of a run's config.yaml.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing required key.
    """
    known = config_keys(config_class)
    _check_known(flatten(content), known, " in the run's config.yaml")
    for key, value in content.items():
        if not isinstance(value, dict) and any(name.startswith(f"{key}.") for name in known):
            raise UserError(f"{key} in the run's config.yaml is no section but {value!r:.40}")
    parser = _mapping_parser(config_class)  # type: ignore[arg-type]  # classes are hashable
    namespace = parser.parse_object(content)
    return _plain(config_class(**vars(parser.instantiate(namespace))))


@lru_cache
def _mapping_parser(config_class: type[Any]) -> ArgumentParser:
    parser = _Parser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    return parser


def _plain(value: Any) -> Any:
    """Return the same value with ordinary numbers, and with `~` in paths resolved.

    jsonargparse makes numbers with a range as objects of its own classes. They would be pickled
    into checkpoints, which could then not be read without jsonargparse. A shell does not resolve
    `~` behind an equals sign, and nobody resolves it in YAML.
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
    """Collect the keys that `--config` files and arguments set.

    Returns:
        Values by dotted key. A key that stands only in the arguments has the value None.

    Raises:
        UserError: a file that is missing or not YAML.
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
    """Separate the files of the `--config` arguments, where names of recipes become their files.

    Returns:
        The files in their order, and all other arguments.
    """
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
    if not value:
        raise UserError(
            "--config '' is neither a file nor a recipe; give the path of a YAML file or the name "
            "of a recipe"
        )
    near = did_you_mean(value, recipe_names(), f"recipes: {', '.join(recipe_names())}")
    raise UserError(f"--config {value!r} is neither a file nor a recipe; {near}")


def config_keys(config_class: Any, prefix: str = "") -> list[str]:
    """List the dotted names of all keys of a config class, including the names of its sections."""
    keys, hints = [], get_type_hints(config_class)
    for name in (entry.name for entry in dataclasses.fields(config_class)):
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hints[name]):
            keys += config_keys(hints[name], f"{prefix}{name}.")
    return keys


def key_names(config: Any) -> dict[str, str]:
    """Return the dotted keys of a config by their last part, where only one key has that part.

    Models, data and training name their arguments like these last parts. With this table
    `errors.renamed` replaces such names in messages by the keys.
    """
    names: dict[str, list[str]] = {}
    for key in config_keys(type(config)):
        names.setdefault(key.rpartition(".")[2], []).append(key)
    return {name: keys[0] for name, keys in names.items() if len(keys) == 1}


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a config file, and return its values by dotted key."""
    content = load_yaml(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no config keys; expected lines such as 'seed: 1'")
    return flatten(content)


def _check_known(keys: Iterable[str], known: list[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise UserError(f"unknown config key '{key}'{where}; {hint_for(key, known)}")
