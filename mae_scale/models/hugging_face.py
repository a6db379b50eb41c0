"""The authors' keys in Hugging Face's spelling and back, and the config.json of its models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from mae_scale.config.sizes import plain_size
from mae_scale.errors import UserError
from mae_scale.models.classifier import Classifier
from mae_scale.models.encoder import Encoder
from mae_scale.models.mae import MaskedAutoencoderViT

StateDict = dict[str, torch.Tensor]

OUTER = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
STACKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.query": "attention.attention.query",  # three tensors that the authors store as one
    "attn.key": "attention.attention.key",
    "attn.value": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


# transformers 5 saves the decoder's layers under a second name, and reads both.
_STACKS_BACK = {**_inverse(STACKS), "decoder.decoder_encoder.layer": "decoder_blocks"}


def _renamed(
    key: str, outer: Mapping[str, str], stacks: Mapping[str, str], in_block: Mapping[str, str]
) -> str | None:
    stem, kind = re.fullmatch(r"(.*?)(\.weight|\.bias)?", key).groups("")  # type: ignore[union-attr]
    if stem in outer:
        return outer[stem] + kind
    found = re.fullmatch(r"(.*)\.(\d+)\.(.*)", stem)
    if found and found[1] in stacks and found[3] in in_block:
        return f"{stacks[found[1]]}.{found[2]}.{in_block[found[3]]}{kind}"
    return None


def from_hugging_face(state: StateDict) -> StateDict:
    """Return the weights of a ViT or ViTMAE, decoder and head included, under the authors' keys.

    Keys that the authors do not have are not renamed.
    """
    renamed: StateDict = {}
    for key, value in state.items():
        whole = key if key.startswith(("vit.", "decoder.", "classifier.")) else f"vit.{key}"
        ours = _renamed(whole, _inverse(OUTER), _STACKS_BACK, _inverse(IN_BLOCK))
        renamed[key.removeprefix("vit.") if ours is None else ours] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [renamed.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        renamed[key.replace("query", "qkv")] = torch.cat(parts)
    return renamed


def to_hugging_face(state: StateDict) -> StateDict:
    """Return weights under Hugging Face's keys; queries, keys and values are views of one tensor.

    Raises:
        UserError: some weights have no key there.
    """
    renamed: StateDict = {}
    for key, value in state.items():
        parts = {key: value}
        if ".attn.qkv." in key:
            names = [key.replace("qkv", part) for part in ("query", "key", "value")]
            parts = dict(zip(names, value.chunk(3), strict=True))
        for name, part in parts.items():
            theirs = _renamed(name, OUTER, STACKS, IN_BLOCK)
            if theirs is None:
                raise UserError(f"its models have no place for {key}")
            renamed[theirs] = part
    return renamed


def mae_config(model: MaskedAutoencoderViT) -> dict[str, Any]:
    """Return the config.json of a ViTMAEForPreTraining.

    Raises:
        UserError: the model predicts something else than the pixels of its patches, or its mask
            tokens go into the encoder.
    """
    outputs, pixels = model.decoder_pred.out_features, model.patch_size**2 * model.in_chans
    if outputs != pixels:
        raise UserError(
            f"ViTMAE predicts the {pixels} pixel values of a patch, this model "
            f"{outputs} other ones; the form official holds it"
        )
    if model.grid[0] != model.grid[1]:
        raise UserError("ViTMAE takes square images only; the forms official and timm hold others")
    block: Any = model.decoder_blocks[0]
    width = model.decoder_embed.out_features
    if model.mask_tokens_in_encoder:
        raise UserError(
            "ViTMAE has its mask tokens in the decoder, this model has them in "
            "the encoder; the form official holds it"
        )
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **_encoder_config(model),
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
    }


def classifier_config(model: Classifier, classes: list[str]) -> dict[str, Any]:
    """Return the config.json of a ViTForImageClassification.

    Raises:
        UserError: the model does not classify the class token.
    """
    if model.pool != "token":
        raise UserError(
            "ViTForImageClassification classifies the class token, this model "
            "the mean of the patches (pool mean); the form timm holds it"
        )
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        **_encoder_config(model),
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def _encoder_config(model: Encoder) -> dict[str, Any]:
    block: Any = model.blocks[0]
    return {
        "image_size": plain_size(model.patch_embed.img_size),
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
        "hidden_size": model.cls_token.shape[-1],
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": block.norm1.eps,
    }
