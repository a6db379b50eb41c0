"""Reading the DeepSpeed JSON that a config names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hjson

from mae_scale.config.sections import OptimizerConfig
from mae_scale.errors import UserError, did_you_mean
from mae_scale.files import read_file

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
_MOST_BYTES = 1 << 20


def load_deepspeed_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON by its name in ds_configs/ or by its path.

    Comments and trailing commas are allowed, as DeepSpeed allows them.

    Args:
        name: name of a file in ds_configs/ without its ending, or a path.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    known = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    path = DS_CONFIGS / f"{name}.json" if name in known else Path(name)
    if not path.is_file():
        hint = did_you_mean(name, known, f"known: {', '.join(known)}, or a path")
        raise UserError(f"deepspeed: there is no DeepSpeed config '{name}'; {hint}")
    try:
        text = read_file(path, _MOST_BYTES).decode()
        config = hjson.loads(text, object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"deepspeed: {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"deepspeed: {path} is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {path} is not a JSON object")
    return config


# On GPUs the gradients are sent in about this many buckets, so that all but the last are sent while
# the backward pass computes. A bucket holds at least SMALLEST_BUCKET values: smaller messages use
# links badly.
BUCKETS, SMALLEST_BUCKET = 8, 10_000_000


def fit_to_model(name: str, zero: dict[str, Any], trained: int, ranks: int) -> dict[str, Any]:
    """Fit the buckets in which a GPU sends its gradients to the size of the model.

    The `reduce_bucket_size` of a config in ds_configs/ is an upper bound. A file that the user has
    written, and a config of ZeRO stage 0, stay as they are.

    Args:
        name: name of a file in ds_configs/ without its ending, or a path.
        zero: section `zero_optimization` of that file.
        trained: number of parameters that are trained.
        ranks: number of ranks. One alone sends nothing, which need not overlap with anything.

    Returns:
        The section to use.
    """
    if not zero.get("stage", 0) or not (DS_CONFIGS / f"{name}.json").is_file():
        return zero
    size = min(zero["reduce_bucket_size"], max(trained // BUCKETS, SMALLEST_BUCKET))
    overlap = ranks > 1 or zero["stage"] == 3  # at stage 3 it also covers copies to the host
    return {**zero, "overlap_comm": overlap, "reduce_bucket_size": size}


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key '{key}' stands twice in one object")
    return dict(pairs)


def check_stage(optim: OptimizerConfig, zero_stage: int) -> None:
    """Raise a UserError where the optimiser does not work under a ZeRO stage."""
    if zero_stage > optim.max_zero_stage:
        raise UserError(
            f"deepspeed: ZeRO-{zero_stage} cuts the weights into pieces, and LARS scales its step "
            "by the norms of whole matrices; use zero0 (only the probe's linear layer is trained)"
        )
