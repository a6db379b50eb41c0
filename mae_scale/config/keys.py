"""The keys of a config class: their types, defaults and texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict

from mae_scale.config.value_types import CHANGEABLE


class Section(BaseModel):
    """A section of a config. A text below a key is what `--help` says about it."""

    model_config = ConfigDict(
        strict=True, extra="forbid", use_attribute_docstrings=True, defer_build=True
    )


@dataclass(frozen=True)
class Key:
    """What the declaration of a key says."""

    type: Any
    """Type of its value, with ranges."""
    text: str
    """Text that explains it. A key that a subclass declares again without one keeps the text."""
    default: Any
    """Value that it has where none is given; None where one must be given."""
    is_needed: bool
    """Whether a value must be given."""
    is_changeable: bool
    """Whether it may change when a run continues (`value_types.Changeable`)."""

    @property
    def takes_null(self) -> bool:
        """Whether null is a value of the key."""
        return type(None) in alternatives(self.type)


def sections_of(config_class: type[BaseModel]) -> dict[str, type[Section]]:
    """Return the class of each section of a config class, by its name."""
    kinds = {name: field.annotation for name, field in config_class.model_fields.items()}
    return {n: k for n, k in kinds.items() if isinstance(k, type) and issubclass(k, Section)}


@lru_cache
def config_keys(config_class: type[BaseModel], prefix: str = "") -> dict[str, Key]:
    """Return all keys of a config class by their dotted names, without the names of sections."""
    keys: dict[str, Key] = {}
    sections = sections_of(config_class)
    for name, field in config_class.model_fields.items():
        if name in sections:
            keys |= config_keys(sections[name], f"{prefix}{name}.")
            continue
        same = [parent.model_fields.get(name) for parent in config_class.__mro__
                if issubclass(parent, Section)]  # fmt: skip
        text = next((each.description for each in same if each and each.description), "")
        extra = field.json_schema_extra
        changeable = isinstance(extra, dict) and bool(extra.get(CHANGEABLE))
        default = None if field.is_required() else field.default
        keys[prefix + name] = Key(
            field.rebuild_annotation(), text, default, field.is_required(), changeable
        )
    return keys


def key_names(config: BaseModel) -> dict[str, str]:
    """Return the dotted keys of a config by their last part, where only one key has that part.

    Models, data and training name their arguments like these last parts. With this table
    `errors.renamed` replaces such names in messages by the keys.
    """
    names: dict[str, list[str]] = {}
    for key in [*config_keys(type(config)), *sections_of(type(config))]:
        names.setdefault(key.rpartition(".")[2], []).append(key)
    return {name: keys[0] for name, keys in names.items() if len(keys) == 1}


def alternatives(kind: Any) -> list[Any]:
    """Return the types that a type is a union of, without ranges."""
    if get_origin(kind) in (Union, UnionType):
        return [each for inner in get_args(kind) for each in alternatives(inner)]
    return alternatives(get_args(kind)[0]) if get_origin(kind) is Annotated else [kind]


_NAMES = {bool: "true or false", str: "text", int: "whole number", float: "number"}
_NAMES[type(None)] = "null"


def type_text(kind: Any) -> str:
    """Describe a type in words, such as `whole number from 1 on or null`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return next((each for each in inner if isinstance(each, str)), None) or type_text(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(map(type_text, inner))
    if origin is Literal:
        return f"one of {', '.join(inner)}" if len(inner) > 1 else str(inner[0])
    if origin in (tuple, list):
        length = "" if origin is list or Ellipsis in inner else f" of {len(inner)}"
        return f"list{length} in brackets, each {type_text(inner[0])}"
    return str(_NAMES.get(kind) or getattr(kind, "__name__", kind))
