"""Reading a config: YAML files, and the `--section.key value` arguments that are laid over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from mae_scale.config.batch import fit_micro_batch
from mae_scale.config.help import help_text
from mae_scale.config.hints import hint_for
from mae_scale.config.identity import flatten, nest, plain
from mae_scale.config.keys import Key, alternatives, config_keys, sections_of, type_text
from mae_scale.config.sections import RunConfig
from mae_scale.config.yaml_files import load_yaml, parse_yaml
from mae_scale.errors import UserError, did_you_mean
from mae_scale.world import World

C = TypeVar("C", bound=RunConfig)

RECIPES = Path(__file__).parents[1] / "recipes"
HELP, PRINT = ("-h", "--help"), "--print_config"
NULLS = ("null", "Null", "NULL", "~")


@dataclass(frozen=True)
class Arguments:
    """What stands on the command line behind the name of a command, with its files read."""

    files: list[tuple[Path, dict[str, Any]]]
    """Each `--config` file, and its values by dotted key."""
    options: dict[str, str | None]
    """Text by name of each other option, without its dashes; None: there is none."""
    flags: set[str]
    """Options that take no value: `HELP`, `PRINT`."""
    others: list[str]
    """What belongs to no option."""

    @classmethod
    def read(cls, argv: list[str]) -> Arguments:
        """Read the arguments, and each `--config` file once.

        Raises:
            UserError: a file is missing, is not YAML, or holds no keys.
        """
        found = cls([], {}, set(), [])
        left = list(reversed(argv))
        while left:
            token = left.pop()
            name, equals, text = token[2:].partition("=")
            if token in (*HELP, PRINT):
                found.flags.add(token)
                continue
            if not token.startswith("--"):
                found.others.append(token)
                continue
            value = text if equals else None
            if not equals and left and not left[-1].startswith("--"):
                value = left.pop()
            if name == "config":
                path = _find_config(value or "")
                found.files.append((path, _read_file(path)))
            else:
                found.options[name] = value
        return found

    @property
    def values(self) -> dict[str, Any]:
        """Values by dotted key. Those of options, which win, are texts."""
        return {k: v for _, values in self.files for k, v in values.items()} | self.options


def recipe_names() -> list[str]:
    """List the names that `--config` takes besides paths."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find_config(value: str) -> Path:
    for path in (Path(value), RECIPES / f"{value}.yaml"):
        if path.is_file():
            return path
    near = f"recipes: {', '.join(recipe_names())}"
    near = did_you_mean(value, recipe_names(), near) if value else (
        "give the path of a YAML file or the name of a recipe"
    )  # fmt: skip
    raise UserError(f"--config {value!r} is neither a file nor a recipe; {near}")


def _read_file(path: Path) -> dict[str, Any]:
    content = load_yaml(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no config keys; expected lines such as 'seed: 1'")
    return flatten(content)


def given_values(argv: list[str]) -> dict[str, Any]:
    """Collect the keys that `--config` files and arguments set, see `Arguments.values`."""
    return Arguments.read(argv).values


def parse(config_class: type[C], argv: list[str], prog: str) -> C:
    """Build a config from arguments, see `build`."""
    return build(config_class, Arguments.read(argv), prog)


def build(config_class: type[C], given: Arguments, prog: str) -> C:
    """Build a config from `--config FILE_OR_RECIPE` and `--section.key value` arguments.

    An argument wins over a file, wherever `--config` stands, and what stands later over what stands
    before it. A micro-batch that stands only in a file is an upper bound: see `fit_micro_batch`.

    Args:
        config_class: class of the config.
        given: the arguments.
        prog: name of the command, for messages.

    Raises:
        UserError: an unknown key (the message names the nearest known one), a value of the wrong
            type, or a missing key.
        SystemExit: the help or the config was to be printed, and is.
    """
    if given.flags & set(HELP):
        names = [name for name in recipe_names() if name.startswith(prog.split()[-1])]
        print(help_text(config_class, prog, names), end="")
        raise SystemExit(0)
    known = config_keys(config_class)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for file, content in given.files:
        _check_names(config_class, content, f" in {file}")
        values |= content
        places |= dict.fromkeys(content, f"{file}: ")
    options = _options(config_class, given)
    values |= options
    places |= dict.fromkeys(options, "")
    missing = [name for name, key in known.items() if key.is_needed and name not in values]
    if PRINT in given.flags:
        config = _validated(config_class, values | dict.fromkeys(missing, "?"), places)
        content = flatten(plain(config)) | dict.fromkeys(missing)
        print(yaml.safe_dump(nest(content), sort_keys=False), end="")
        raise SystemExit(0)
    if missing:
        needed = ", ".join(f"--{name}" for name in missing)
        raise UserError(
            f"the following arguments are required: {needed}; {prog} --help explains them"
        )
    config = _validated(config_class, values, places)
    if "train.micro_batch_size" not in options:
        fit_micro_batch(config.train, World.from_environment().size)
    return config


def from_mapping(config_class: type[C], content: Mapping[str, Any]) -> C:
    """Build a config from the content of a run's config.yaml.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing required key.
    """
    values, known = flatten(content), config_keys(config_class)
    _check_names(config_class, values, " in the run's config.yaml")
    for name, key in known.items():
        if key.is_needed and name not in values:
            raise UserError(f"the run's config.yaml lacks the key '{name}'")
    return _validated(config_class, values, dict.fromkeys(values, "the run's config.yaml: "))


def _check_names(config_class: type[RunConfig], values: Mapping[str, Any], where: str) -> None:
    """Raise a UserError where a file has an unknown key, or a section that is no section."""
    known, sections = config_keys(config_class), sections_of(config_class)
    for name, value in values.items():
        if name in sections:
            key = _first_key(known, name).partition(".")[2]
            raise UserError(
                f"{where.removeprefix(' in ')}: {name} is a section of keys such as '{key}: ...', "
                f"but holds {'nothing' if value is None else shown(value)}; write keys below it, "
                "or leave it out"
            )
        if name not in known:
            raise UserError(f"unknown config key '{name}'{where}; {hint_for(name, list(known))}")


def _first_key(known: Mapping[str, Key], section: str) -> str:
    return next(name for name in known if name.startswith(f"{section}."))


def _options(config_class: type[RunConfig], given: Arguments) -> dict[str, Any]:
    """Read the values of the options, and raise a UserError for what is no key or has no value."""
    known = config_keys(config_class)
    values: dict[str, Any] = {}
    for name, text in given.options.items():
        if name in sections_of(config_class):
            value = _yaml(text or "")
            inner = flatten({name: value} if isinstance(value, dict) else {})
            if not inner:
                key = _first_key(known, name)
                raise UserError(
                    f"--{name} is a section of the config and takes no value such as {text!r}; did "
                    f"you mean --{key} {text}?"
                )
            _check_names(config_class, inner, f" in --{name}")
            values |= inner
        elif name not in known:
            raise UserError(f"unknown config key '{name}'; {hint_for(name, list(known))}")
        elif text is None:
            raise UserError(f"--{name} needs a value")
        else:
            values[name] = _value(text, known[name])
    if given.others:
        hint = _hint(given.others[0], list(known))
        raise UserError(f"unrecognized arguments: {' '.join(given.others)}; {hint}")
    return values


def _value(text: str, key: Key) -> Any:
    """Read the value of an option: YAML, except that a text is taken as it is typed."""
    if str in alternatives(key.type):
        return None if key.takes_null and text in NULLS else text
    return _yaml(text)


def _yaml(text: str) -> Any:
    """Parse the text of an option; what is no YAML, and an empty text, is a text."""
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    return text if value is None and text.strip() not in NULLS else value


def _hint(word: str, known: list[str]) -> str:
    """Give a hint for an argument that belongs to no option."""
    name, _, value = word.lstrip("-").partition("=")
    if name in known:
        return f"did you mean --{name}{f'={value}' if value else ''}?"
    if word.startswith("-"):
        return f"options begin with two dashes; {hint_for(name, known)}"
    return "they belong to no option; a value with spaces is quoted, a list is in brackets"


def _validated(config_class: type[C], values: Mapping[str, Any], places: Mapping[str, str]) -> C:
    """Build a config.

    Args:
        config_class: its class.
        values: values by dotted key.
        places: text before a message about each of these keys.

    Raises:
        UserError: a value is of the wrong type or out of range.
    """
    try:
        return config_class(**{name: {} for name in sections_of(config_class)} | nest(values))
    except ValidationError as error:
        found = error.errors()
    known, place = config_keys(config_class), found[0]["loc"]
    place = place[:1] if place[0] in known else place[:2]
    name = ".".join(map(str, place))
    # The alternatives of a union have an error each; the one about an inner value says most.
    own = [each for each in found if each["loc"][: len(place)] == place]
    inner = max(own, key=lambda each: len(each["loc"]))
    start = f'{places.get(name, "")}config key "{name}": '
    if inner["type"] == "value_error":
        raise UserError(f"{start}{inner['ctx']['error']}")
    value, expected = values[name], type_text(known[name].type)
    article = "a " if expected.startswith(("whole", "number", "list", "text")) else ""
    hint = ""
    if value is None:
        hint = "; give a value, or leave the key out"
    elif isinstance(value, list | dict) and inner["input"] is not value:
        hint = f" (see {shown(inner['input'])})"
    elif expected.startswith("text"):
        hint = "; put it in quotes"
    raise UserError(f"{start}{shown(value)} is not {article}{expected}{hint}")


def shown(value: Any) -> str:
    """Write a value for a message."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


PLACES = {"run_dir": "RUN", "data.train": "SHARDS"}


def config_arguments(name: str, rest: list[str]) -> list[str]:
    """Compose the arguments that give a config, with `PLACES` for paths that are not given.

    Args:
        name: recipe or YAML file.
        rest: config keys among the arguments of `mae-scale plan`.
    """
    argv = ["--config", name, *rest]
    given = given_values(argv)
    return argv + [f"--{key}={place}" for key, place in PLACES.items() if key not in given]
