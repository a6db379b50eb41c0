"""The identity of a run: the keys of its config that may not change, and their hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import yaml

from mae_scale.config.sections import CHANGEABLE, DataConfig


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested keys into dotted ones: {"train": {"epochs": 1}} becomes {"train.epochs": 1}.

    Args:
        nested: values by key, where a dict is a section.
        prefix: text before each key of the result.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_yaml(config: Any) -> str:
    """Write a resolved config as YAML, with the task first and tuples as lists."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump({"task": plain.pop("task"), **plain}, sort_keys=False)


def _defaults(config: Any) -> dict[str, Any]:
    """Return the values by dotted key of a config of this class for which nothing is given."""
    plain = type(config)(run_dir="", data=DataConfig(train=""))
    return flatten(yaml.safe_load(as_yaml(plain)))


def differences(old: dict[str, Any], config: Any) -> list[str]:
    """Name the keys that a run may not change and that differ, as lines `key: old -> new`.

    Args:
        old: values by key, nested as in the config.yaml of the run; a key that is newer than the
            file counts as its default.
        config: config of this start.
    """
    before, after = {**_defaults(config), **flatten(old)}, flatten(yaml.safe_load(as_yaml(config)))
    may_change = _changeable_keys(config)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and key not in may_change
    ]


def _changeable_keys(config: Any, prefix: str = "") -> set[str]:
    """List the dotted names of the keys that are declared by `sections.changeable`."""
    keys = set()
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            keys |= _changeable_keys(value, f"{prefix}{entry.name}.")
        elif entry.metadata.get(CHANGEABLE):
            keys.add(prefix + entry.name)
    return keys


def identity_hash(config: Any) -> str:
    """Return the SHA-256, in hexadecimal digits, of the keys that a run may not change.

    Keys with their default values are left out. A key that is added later therefore does not
    change the hash of older runs.
    """
    flat, defaults = flatten(yaml.safe_load(as_yaml(config))), _defaults(config)
    may_change = _changeable_keys(config)
    identity = {
        key: value
        for key, value in flat.items()
        if key not in may_change and value != defaults.get(key)
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
