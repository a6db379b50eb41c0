"""The identity of a run: the keys of its config that may not change, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from mae_scale.config.keys import config_keys
from mae_scale.config.sections import DataConfig, RunConfig


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested keys into dotted ones: {"train": {"epochs": 1}} becomes {"train.epochs": 1}.

    Args:
        nested: values by key, where a dict is a section.
        prefix: text before each key of the result.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested ones, as `flatten` had them."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def plain(config: RunConfig) -> dict[str, Any]:
    """Return the values of a config, nested, as YAML and JSON have them: tuples are lists."""
    values = json.loads(json.dumps(config.model_dump()))
    return {"task": values.pop("task"), **values}


def as_yaml(config: RunConfig) -> str:
    """Write a resolved config as YAML, with the task first."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def _defaults(config: RunConfig) -> dict[str, Any]:
    """Return the values by dotted key of a config of this class for which nothing is given."""
    return flatten(plain(type(config)(run_dir="RUN", data=DataConfig(train="SHARDS"))))


def differences(old: dict[str, Any], config: RunConfig) -> list[str]:
    """Name the keys that a run may not change and that differ, as lines `key: old -> new`.

    Args:
        old: values by key, nested as in the config.yaml of the run; a key that is newer than the
            file counts as its default.
        config: config of this start.
    """
    before, after = {**_defaults(config), **flatten(old)}, flatten(plain(config))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not _may_change(config, key)
    ]


def _may_change(config: RunConfig, key: str) -> bool:
    known = config_keys(type(config))
    return key in known and known[key].is_changeable


def identity_hash(config: RunConfig) -> str:
    """Return the SHA-256, in hexadecimal digits, of the keys that a run may not change.

    Keys with their default values are left out. A key that is added later therefore does not
    change the hash of older runs.
    """
    defaults = _defaults(config)
    identity = {
        key: value
        for key, value in flatten(plain(config)).items()
        if value != defaults.get(key) and not _may_change(config, key)
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
