"""Reading the weights of the authors, timm and Hugging Face, and making them fit a model."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mae_scale.errors import UserError
from mae_scale.files import read_file, require_file
from mae_scale.models.classifier import Classifier
from mae_scale.models.encoder import Encoder
from mae_scale.models.hugging_face import StateDict, from_hugging_face
from mae_scale.models.mae import MaskedAutoencoderViT
from mae_scale.models.pickles import UNREADABLE, is_plain, load_pickle, why_unreadable
from mae_scale.models.pos_embed import grid_of_table, interpolate_pos_embed, is_sincos

log = logging.getLogger("mae_scale")

# Names of weights in a folder; the first that exists is read. An index names several files.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pth",
)
_MOST_JSON = 1 << 24  # bytes

_PARTS = ("model", "state_dict", "module", "teacher")  # keys of files that hold the weights
# Names that wrappers put before those of a model, and the first weight of any encoder.
PREFIXES = ("module.", "model.", "backbone.", "teacher.")
_COMPILED = "_orig_mod."  # torch.compile puts it before the names of each module that it wraps
_FIRST = re.compile(r"(.*?)(?:patch_embed\.proj|(?:vit\.)?embeddings\.patch_.*projection)\.weight")


def read_weights(path: str | Path, keep: str = "") -> StateDict:
    """Read the state dict in a file or folder, under the authors' keys, in the stored dtypes.

    Prefixes of wrappers (`PREFIXES` and `_orig_mod.`) are taken off, and a line says so.

    Args:
        path: a `.safetensors` file; a `.pth`, `.pt` or `.bin` that `torch.save` wrote, alone or
            under the key `model`, `state_dict`, `module` or `teacher`; or a folder with a
            `model.safetensors` or `pytorch_model.bin`, as timm and Hugging Face write it, or a
            `model.pth`, as `mae-scale export` does. Only tensors are unpickled.
        keep: prefix of names that the model has itself, such as "backbone.".

    Raises:
        UserError: nothing is there, it holds no weights or several models, or some values are not
            finite.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"weights: there is no file or folder {path}")
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"weights: {path} holds none of {', '.join(FILES)}")
        path = found[0]
    if path.suffix == ".json":
        parts = sorted({str(part) for part in read_json(path, "weight_map").values()})
        if any(Path(part).name != part or part == ".." for part in parts):
            raise UserError(f"weights: {path} names files that are not beside it")
        state = {k: v for part in parts for k, v in _read_file(path.with_name(part)).items()}
    else:
        state = _read_file(path)
    state = _without_prefixes(state, path, keep)
    check_finite(state, path)
    return from_hugging_face(state) if any(".layernorm_before." in key for key in state) else state


def _without_prefixes(state: StateDict, path: Path, keep: str) -> StateDict:
    """Take off the prefixes of wrappers, and leave out what does not belong to the encoder's model.

    Raises:
        UserError: the weights are of several models.
    """
    plain = {key.replace(_COMPILED, ""): value for key, value in state.items()}
    firsts = {match[1] for key in plain if (match := _FIRST.fullmatch(key))}
    one = "|".join(re.escape(prefix) for prefix in PREFIXES if prefix != keep)
    prefixes = sorted(
        text for text in firsts if re.fullmatch(f"({one})*({re.escape(keep)})?", text)
    )
    if len(prefixes) > 1:
        raise UserError(
            f"weights: {path} holds several models, whose names begin with "
            f"{' and '.join(map(repr, prefixes))}; save the one that is meant alone"
        )
    prefix = prefixes[0].removesuffix(keep) if prefixes else ""
    found = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
    taken = [text for text in (prefix, _COMPILED if plain.keys() != state.keys() else "") if text]
    if taken:
        other = [key for key in plain if not key.startswith(prefix)]
        rest = f"; {len(other)} others are left out: {_some(other)}" if other else ""
        log.info("%s: names without their prefix %s%s", path, " and ".join(taken), rest)
    return found


def check_finite(state: StateDict, path: str | Path) -> None:
    """Raise a UserError where weights hold NaN or infinity.

    Args:
        state: the weights.
        path: where they come from, for the message.
    """
    bad = [
        key
        for key, value in state.items()
        if value.is_floating_point()
        and not torch.isfinite(value.float() if value.itemsize == 1 else value).all()
    ]
    if bad:
        raise UserError(f"weights: {path} holds values that are NaN or infinite, in {_some(bad)}")


def read_json(path: Path, key: str | None = None) -> dict[str, Any]:
    """Read a record from a JSON file, or the record under one of its keys.

    Raises:
        UserError: it cannot be read, or holds no such record.
    """
    try:
        content = json.loads(read_file(path, _MOST_JSON))
    except OSError as error:
        raise UserError(f"weights: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"weights: {path} is not JSON: {error}") from None
    found = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(found, dict):
        raise UserError(f"weights: {path} is no record{f' with a record {key}' if key else ''}")
    return found


def sizes_of(state: StateDict) -> dict[str, Any]:
    """Return the arguments of `build_mae` or `build_classifier` that the shapes of weights tell.

    The number of attention heads is not among them. What cannot be told is left out.
    """
    sizes: dict[str, Any] = {}
    ratios = []
    if (token := state.get("cls_token")) is not None and token.ndim == 3:
        sizes["embed_dim"] = token.shape[-1]
    if (proj := state.get("patch_embed.proj.weight")) is not None and proj.ndim == 4:
        sizes["patch_size"] = proj.shape[-1]
        if proj.shape[1] != 3:
            sizes["in_chans"] = proj.shape[1]
        if (table := state.get("pos_embed")) is not None and table.ndim == 3:
            sizes["img_size"] = round((table.shape[1] - 1) ** 0.5) * proj.shape[-1]
    if (embed := state.get("decoder_embed.weight")) is not None:
        sizes["decoder_embed_dim"] = embed.shape[0]
    for name, stack in (("depth", "blocks"), ("decoder_depth", "decoder_blocks")):
        numbers = {key.split(".")[1] for key in state if key.startswith(f"{stack}.")}
        if numbers:
            sizes[name] = len(numbers)
        if (
            (hidden := state.get(f"{stack}.0.mlp.fc1.weight")) is not None
            and hidden.ndim == 2
            and 0 not in hidden.shape
        ):
            ratios.append(ratio_of(*hidden.shape))
    if ratios:  # encoder and decoder have the same ratio, and each rounds its width down
        sizes["mlp_ratio"] = max(ratios)
    return sizes


def ratio_of(hidden: int, width: int) -> float:
    """Return the smallest mlp_ratio with which blocks of a width have MLPs of a hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _read_file(path: Path) -> StateDict:
    try:
        require_file(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        # The authors' own checkpoints also hold the arguments of their program.
        content = load_pickle(path, [argparse.Namespace])
    except SafetensorError as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"weights: {path} cannot be read as weights: {why}") from None
    except UNREADABLE as error:
        raise UserError(
            f"weights: {path} cannot be read as weights: {why_unreadable(error)}"
        ) from None
    for key in _PARTS:
        part = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(part, Mapping) and any(isinstance(v, torch.Tensor) for v in part.values()):
            content = part
    if not isinstance(content, Mapping):
        raise UserError(f"weights: {path} holds a {type(content).__name__}, no state dict")
    state = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    if not state:
        keys = ", ".join(map(str, list(content)[:12]))
        raise UserError(f"weights: {path} holds no tensors; its keys: {keys}")
    for key, value in state.items():
        if not is_plain(value):
            raise UserError(f"weights: {path} holds {key} in a form that is no plain tensor")
    return state


def fit_to_classifier(
    state: StateDict,
    model: Classifier,
    *,
    new_head: bool = False,
    whole: bool = False,
    grid: tuple[int, int] | None = None,
) -> StateDict:
    """Pick the weights for a classifier, and resize the position embedding to its resolution.

    A patch embedding for three channels is converted to the model's channels, see `to_channels`.

    As in the authors' code, only the encoder is taken from weights without a head, and under mean
    pooling the LayerNorm of pre-training (`norm`) is left out: `fc_norm` starts fresh.

    Args:
        state: state dict of `read_weights`, or of a model of this package.
        model: model that takes the weights; it is not changed and may be on the meta device.
        new_head: whether to leave out the head and its norm even if there is one.
        whole: whether to require every key of the model, head included, as evaluation does.
        grid: rows and columns of patches of the model that the weights come from; None: a square,
            or else those of `model`.

    Returns:
        fp32 tensors by key; under `whole` all keys of the model, otherwise perhaps without head and
        norm.

    Raises:
        UserError: keys are missing, unknown or of another shape; the message names them.
    """
    final = ("head.", "fc_norm.", "norm.")
    fresh = new_head or not any(key.startswith("head.") for key in state)
    if fresh and whole:
        raise UserError("weights: they have no head; fine-tune them first")

    def is_left_out(key: str) -> bool:
        if key.startswith(("decoder_", "mask_token", "pca.")):
            return True
        if key.startswith("norm.") and model.pool == "mean":
            return fresh
        return new_head and key.startswith(final)

    found = {key: value for key, value in state.items() if not is_left_out(key)}
    if fresh and model.pool == "token" and new_head and "norm.weight" in state:
        found |= {key: state[key] for key in ("norm.weight", "norm.bias")}
    return _fitting(found, model, final if fresh else (), grid)


def to_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert the projection of patches to another number of channels, as timm does.

    For one channel the three are summed up. For other numbers the three are repeated, and scaled so
    that outputs keep their magnitude.

    Args:
        weight: [D, 3, p, p]; the weight of another number of channels is returned unchanged.
        channels: number of channels of the result.

    Returns:
        [D, channels, p, p].
    """
    if weight.ndim != 4 or weight.shape[1] != 3 or channels == 3:
        return weight
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True)
    return weight.float().repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


def fit_to_mae(
    state: StateDict,
    model: MaskedAutoencoderViT,
    *,
    whole: bool = False,
    grid: tuple[int, int] | None = None,
) -> StateDict:
    """Pick the weights for a masked autoencoder, with position embeddings of its resolution.

    A classification head is left out with its norm: if that is `fc_norm`, the LayerNorm `norm`
    starts fresh. Only the encoder is taken from weights without a decoder. PCA components were
    computed from other images: they are left out, unless `whole` is set.

    A model with other channels than the three of the weights gets the patch embedding that
    `to_channels` makes, and a new last layer of the decoder.

    The position embeddings of pre-training are fixed sine-cosine tables, so at another resolution
    the model's own tables are used: they are exact, and interpolated ones would not be. An
    embedding that is no such table was trained (fine-tuned weights, supervised ones): it is kept,
    and interpolated at another resolution as for fine-tuning.

    Args:
        state: state dict of `read_weights`, or of a model of this package.
        model: model that takes the weights; it is not changed and may be on the meta device.
        whole: whether to require every key of the model, decoder included, as reconstruction does.
        grid: as for `fit_to_classifier`.

    Returns:
        fp32 tensors by key, without those that start fresh and without fixed position embeddings of
        another resolution.

    Raises:
        UserError: keys are missing, unknown or of another shape; the message names them.
    """
    decoder = ("decoder_", "mask_token")
    has_decoder = any(key.startswith(decoder) for key in state)
    if whole and not has_decoder:
        raise UserError(
            "weights: they have no decoder, which reconstructs; take the full ones, or a run of "
            "pre-training"
        )
    fixed = [
        key
        for key in ("pos_embed", "decoder_pos_embed")
        if key in state and state[key].ndim == 3 and _is_sincos_elsewhere(state[key], model, grid)
    ]
    left_out = ("head.", "fc_norm.", *(() if whole else ("pca.",)))
    proj = state.get("patch_embed.proj.weight")
    adapts = proj is not None and proj.ndim == 4 and proj.shape[1] == 3 != model.in_chans
    new = ("decoder_pred.",) if adapts and not whole else ()
    left_out += new
    found = {
        key: value
        for key, value in state.items()
        if key not in fixed and not key.startswith(left_out)
    }
    optional = (*fixed, *new, *(() if has_decoder else decoder), *(() if whole else ("pca.",)))
    if "fc_norm.weight" in state:
        optional += ("norm.",)
    return _fitting(found, model, optional, grid)


def _is_sincos_elsewhere(table: torch.Tensor, model: Encoder, grid: tuple[int, int] | None) -> bool:
    """Return whether a position embedding is the sine-cosine table of another grid."""
    old, width = grid_of_table(table, model.grid, grid), table.shape[2]
    if old is None or old == model.grid or width % 4:
        return False
    return is_sincos(table, old)


def _fitting(
    found: StateDict,
    model: Encoder,
    optional: tuple[str, ...],
    grid: tuple[int, int] | None,
) -> StateDict:
    """Return the weights in fp32, with position embeddings at the model's resolution.

    Args:
        found: weights that are to go into the model.
        optional: beginnings of the keys that may be missing.
        grid: as for `fit_to_classifier`.
    """
    expected = {key: value.shape for key, value in model.state_dict().items()}
    problems = []
    missing = [key for key in expected if key not in found and not key.startswith(optional)]
    if missing:
        problems.append(f"missing: {_some(missing)}")
    unknown = [key for key in found if key not in expected]
    if unknown:
        problems.append(f"not known to the model: {_some(unknown)}")
    result: StateDict = {}
    for key, value in found.items():
        is_table = key in ("pos_embed", "decoder_pos_embed") and key in expected
        if is_table and value.ndim == 3 and value.shape[-1] == expected[key][-1]:
            value = _resample(value, model, grid)
        if key == "patch_embed.proj.weight":
            value = to_channels(value, model.in_chans)
        if key in expected and value.shape != expected[key]:
            problems.append(f"{key} is {list(value.shape)}, expected {list(expected[key])}")
        result[key] = value.float() if value.is_floating_point() else value
    if problems:
        shown = problems if len(problems) <= 4 else [*problems[:4], f"{len(problems) - 4} more"]
        hint = ""
        if any(problem.startswith(("head.", "missing: head.")) for problem in problems):
            hint = "; new_head true starts with a new head"
        raise UserError(f"weights do not fit the model: {'; '.join(shown)}{hint}")
    return result


def _resample(
    pos_embed: torch.Tensor, model: Encoder, grid: tuple[int, int] | None
) -> torch.Tensor:
    old = grid_of_table(pos_embed, model.grid, grid)
    if old is None:
        raise UserError(
            f"weights: pos_embed has {pos_embed.shape[1]} rows; expected one for the class token "
            "and one for each patch of a square grid"
        )
    return interpolate_pos_embed(pos_embed, model.grid, old)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more
