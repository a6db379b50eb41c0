"""Weights of an encoder or classifier for timm's Vision Transformers, with their config.json."""

from __future__ import annotations

from typing import Any

import timm
import torch

from mae_scale.config.sizes import plain_size
from mae_scale.errors import UserError
from mae_scale.models.classifier import Classifier
from mae_scale.models.encoder import Encoder
from mae_scale.models.hugging_face import StateDict
from mae_scale.models.mae import architecture
from mae_scale.models.weights import ratio_of


def fold_probe(state: StateDict, eps: float) -> StateDict:
    """Fold a probe's BatchNorm, which has no affine parameters, into its linear layer, in fp64.

    Args:
        state: state dict of a classifier with a `ProbeHead`.
        eps: eps of the BatchNorm.

    Returns:
        The same weights with `head.weight` and `head.bias` for all of `head.*`.
    """
    folded = {key: value for key, value in state.items() if not key.startswith("head.")}
    scale = (state["head.0.running_var"].double() + eps).rsqrt()
    weight = state["head.1.weight"].double() * scale
    bias = state["head.1.bias"].double() - weight @ state["head.0.running_mean"].double()
    return {**folded, "head.weight": weight.float(), "head.bias": bias.float()}


def arguments(name: str, model: Encoder) -> tuple[str, dict[str, Any]]:
    """Return timm's name for a model's encoder, and the arguments of `create_model` for it.

    Args:
        name: name of the masked autoencoder.
    """
    theirs = f"{name.removeprefix('mae_')}_224"
    usual = architecture(name)
    sizes: dict[str, tuple[Any, Any]] = {
        "img_size": (plain_size(model.patch_embed.img_size), 224),
        "in_chans": (model.in_chans, 3),
        "patch_size": (model.patch_size, int(name.rpartition("patch")[2])),
        "embed_dim": (model.cls_token.shape[-1], usual["embed_dim"]),
        "depth": (len(model.blocks), usual["depth"]),
    }
    block: Any = model.blocks[0]
    sizes["num_heads"] = (block.attn.num_heads, usual["num_heads"])
    hidden = block.mlp.fc1.out_features
    sizes["mlp_ratio"] = (ratio_of(hidden, sizes["embed_dim"][0]), 4)
    kwargs: dict[str, Any] = {key: own for key, (own, default) in sizes.items() if own != default}
    is_classifier = isinstance(model, Classifier)
    kwargs["num_classes"] = model.num_classes if is_classifier else 0
    kwargs["global_pool"] = "avg" if is_classifier and model.pool == "mean" else "token"
    return theirs, kwargs


def to_timm(state: StateDict, name: str, kwargs: dict[str, Any]) -> StateDict:
    """Pick the weights that timm's model takes; the decoder of a masked autoencoder is left out.

    Args:
        state: weights under the authors' keys.
        name, kwargs: arguments of `timm.create_model`.

    Raises:
        UserError: timm's model needs other weights.
    """
    with torch.device("meta"):
        expected = timm.create_model(name, **kwargs).state_dict()
    wrong = [k for k, v in expected.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise UserError(f"{name} asks for other weights, such as {wrong[0]}")
    return {key: state[key] for key in expected}


def config(
    name: str, kwargs: dict[str, Any], model: Encoder, classes: list[str], preprocessing: dict
) -> dict[str, Any]:
    """Return the config.json from which `timm.create_model("local-dir:…", pretrained=True)` loads.

    Args:
        name, kwargs: arguments of `timm.create_model`.
        classes: names of the outputs; empty for a pre-trained encoder.
        preprocessing: values that timm's `resolve_data_config` is to return.
    """
    return {
        "architecture": name,
        "num_classes": kwargs["num_classes"],
        "num_features": model.cls_token.shape[-1],
        "global_pool": kwargs["global_pool"],
        **({"label_names": classes} if classes else {}),
        "model_args": {k: v for k, v in kwargs.items() if k != "num_classes"},
        "pretrained_cfg": {
            "input_size": [model.in_chans, *model.patch_embed.img_size],
            "fixed_input_size": True,
            **preprocessing,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "num_classes": kwargs["num_classes"],
        },
    }
