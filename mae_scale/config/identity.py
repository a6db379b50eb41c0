"""What makes a run the same run: the keys of its config that may not change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import yaml

from mae_scale.config.sections import DataConfig

# What a run may change when it goes on: none of it changes which samples a step sees or the
# learning rate. `data.train` may move as long as its manifest stays the same (checked apart).
MAY_CHANGE = (
    "run_dir",
    "deepspeed",
    "data.train",
    "data.val",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.max_bad_fraction",
    "train.max_steps",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.activation_offload",
    "train.compile",
    "train.max_bad_steps",
    "train.log_every",
    "train.hang_timeout",
    "train.validate_epochs",
    "train.profile",
    "train.reconstruct_every",
    "checkpoint",
    "replay",
)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 1}} as {"train.epochs": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_yaml(config: Any) -> str:
    """The resolved config as YAML, tuples as lists."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False)


def _defaults(config: Any) -> dict[str, Any]:
    """The flat values of a config of this class where nothing is given."""
    plain = type(config)(run_dir="", data=DataConfig(train=""))
    return flatten(yaml.safe_load(as_yaml(plain)))


def differences(old: dict[str, Any], config: Any) -> list[str]:
    """Keys that a run may not change, as lines `key: old -> new`.

    Args:
        old: as in the config.yaml of the run; keys that are newer than it count as their defaults.
        config: the new one.
    """
    before, after = {**_defaults(config), **flatten(old)}, flatten(yaml.safe_load(as_yaml(config)))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not _may_change(key)
    ]


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def identity_hash(config: Any) -> str:
    """SHA-256 over the keys that a run may not change: what makes it this run.

    Defaults are left out, so that a key that joins later leaves the hash of older runs as it was.
    """
    flat, defaults = flatten(yaml.safe_load(as_yaml(config))), _defaults(config)
    identity = {
        key: value
        for key, value in flat.items()
        if not _may_change(key) and value != defaults.get(key)
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
