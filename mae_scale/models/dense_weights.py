"""Weights of pre-training, and of anyone else's plain ViT, for an encoder of a dense task."""

from __future__ import annotations

import torch
from timm.layers import resample_patch_embed
from torch import nn
from torch.nn import functional as F

from mae_scale.errors import UserError
from mae_scale.models.dense import DenseEncoder
from mae_scale.models.hugging_face import StateDict
from mae_scale.models.pos_embed import resize_grid

BACKBONE = "backbone."
# Keys that the encoder of pre-training has and that of a dense task lacks begin with these.
_LEFT_OUT = ("decoder_", "mask_token", "pca.", "norm.", "fc_norm.", "head.")
# Keys that the encoder of pre-training lacks contain these: they start as `DenseEncoder` makes
# them.
_FRESH = ("rel_pos_", ".attn.rel_pos", ".ls1.", ".ls2.")


def fit_to_dense_model(state: StateDict, model: nn.Module, *, new_head: bool = False) -> StateDict:
    """Pick the part of a state dict that goes into a detector or a segmenter.

    Args:
        state: state dict of `read_weights`, or of a model of this package. All weights are taken
            from a model of the same task; otherwise those of the encoder, so that pyramid and
            heads start fresh.
        model: model with a `DenseEncoder` as `backbone`; it may be on the meta device.
        new_head: whether to take the encoder only, even from a model of the same task.

    Returns:
        fp32 tensors by key, without those that start fresh.

    Raises:
        UserError: keys are missing, unknown or of another shape; the message names them.
    """
    encoder: DenseEncoder = model.backbone  # type: ignore[assignment]
    inner = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
    fitting = fit_to_dense(inner or state, encoder)
    result = {BACKBONE + key: value for key, value in fitting.items()}
    expected = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(BACKBONE)}
    others = {k: v for k, v in state.items() if inner and not k.startswith(BACKBONE)}
    if new_head or not others.keys() & expected.keys():
        return result
    _check(others, expected, optional=(), hint="; new_head takes the encoder only")
    return result | {k: _fp32(v) for k, v in others.items()}


def fit_to_dense(state: StateDict, encoder: DenseEncoder) -> StateDict:
    """Pick the part of a plain ViT's state dict that goes into the encoder of a dense task.

    Patches of another size are resampled by the pseudo-inverse of resizing (FlexiViT, timm's).
    Trained position embeddings are resized to the grid for which the encoder stores them; fixed
    ones are the encoder's own. Relative positions and factors of residual branches may be missing.

    Raises:
        UserError: keys are missing, unknown or of another shape; the message names them.
    """
    expected = {key: value.shape for key, value in encoder.state_dict().items()}
    found = {k: v for k, v in state.items() if not k.startswith(_LEFT_OUT)}
    if not encoder.class_token:
        found.pop("cls_token", None)
    optional: tuple[str, ...] = ()
    if encoder.positions == "fixed":
        found.pop("pos_embed", None)
        optional = ("pos_embed",)
    elif "pos_embed" in found:
        found["pos_embed"] = _positions(found["pos_embed"], encoder)
    proj = found.get("patch_embed.proj.weight")
    if proj is not None and proj.ndim == 4 and proj.shape[-1] != encoder.patch_size:
        new = [encoder.patch_size] * 2
        found["patch_embed.proj.weight"] = resample_patch_embed(proj.float(), new)
    for key, value in found.items():
        if key.endswith(("rel_pos_h", "rel_pos_w")) and key in expected and value.ndim == 2:
            found[key] = _line(value, expected[key][0])
    optional += tuple(k for k in expected if any(part in k for part in _FRESH) and k not in found)
    _check(found, expected, optional)
    return {key: _fp32(value) for key, value in found.items()}


def _positions(table: torch.Tensor, encoder: DenseEncoder) -> torch.Tensor:
    """Return a position embedding in the form in which the encoder stores it."""
    rows = table.shape[1] if table.ndim == 3 else 0
    has_class = round(rows**0.5) ** 2 != rows
    patches = table[:, int(has_class) :]
    if rows < 2 or round(patches.shape[1] ** 0.5) ** 2 != patches.shape[1]:
        raise UserError(
            f"weights: pos_embed is {list(table.shape)}; expected a row for each patch of a square "
            "grid, and perhaps one for the class token before them"
        )
    resized = resize_grid(patches.float(), (encoder.pos_grid, encoder.pos_grid))
    if not encoder.class_token:
        return resized
    if not has_class:
        raise UserError("weights: pos_embed has no row for the class token, which the model needs")
    return torch.cat([table[:, :1].float(), resized], dim=1)


def _line(vectors: torch.Tensor, length: int) -> torch.Tensor:
    """Interpolate [2 g - 1, d] to [length, d] where the lengths differ."""
    if len(vectors) == length:
        return vectors
    return F.interpolate(vectors.float().t().unsqueeze(0), length, mode="linear")[0].t()


def _check(
    found: StateDict,
    expected: dict[str, torch.Size],
    optional: tuple[str, ...],
    hint: str = "",
) -> None:
    missing = [key for key in expected if key not in found and key not in optional]
    unknown = [key for key in found if key not in expected]
    problems = []
    for what, keys in (("missing", missing), ("not known to the model", unknown)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{what}: {', '.join(keys[:4])}{more}")
    wrong = [
        f"{key} is {list(value.shape)}, expected {list(expected[key])}"
        for key, value in found.items()
        if key in expected and value.shape != expected[key]
    ]
    problems += wrong if len(wrong) <= 3 else [*wrong[:3], f"{len(wrong) - 3} more"]
    if problems:
        raise UserError(f"weights do not fit the model: {'; '.join(problems)}{hint}")


def _fp32(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value
