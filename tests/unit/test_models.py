"""The model, compared with the paper, with sums done by hand, and with transformers' ViTMAE."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_scale.errors import UserError
from mae_scale.models import MaskedAutoencoderViT, build_mae
from mae_scale.models.masking import mask_noise
from mae_scale.models.targets import patchify, unpatchify

SMALL = {
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 4,
    "decoder_embed_dim": 48,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
}


def photographs(tree: Path, count: int, size: int) -> torch.Tensor:
    """Give normalised photographs [count, 3, size, size], spread over the tree."""
    files = sorted(tree.rglob("*.JPEG"))
    images = [
        np.asarray(Image.open(f).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
        for f in files[:: len(files) // count][:count]
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None]


def noise_for(images: torch.Tensor, model: MaskedAutoencoderViT) -> torch.Tensor:
    sample = torch.arange(len(images))
    return mask_noise(0, torch.zeros_like(sample), sample, model.num_patches)


@torch.no_grad()
def stir(model: nn.Module, seed: int = 0) -> None:
    """Move every trained parameter off its initial value, so that none of them is inert."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


# --- sizes, names, initial values ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "parameters", "trainable", "keys"),
    [
        ("mae_vit_base_patch16", 12, 111_907_840, 111_655_680, 254),
        ("mae_vit_large_patch16", 24, 329_541_888, 329_239_296, 398),
        ("mae_vit_huge_patch14", 32, 657_074_508, 656_613_964, 494),
    ],
)
def test_published_sizes_and_keys(name, depth, parameters, trainable, keys):
    with torch.device("meta"):
        model = build_mae(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert len(model.state_dict()) == keys
    block = [
        f"{layer}.{part}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for part in ("weight", "bias")
    ]
    expected = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    for module in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"):
        expected |= {f"{module}.weight", f"{module}.bias"}
    expected |= {f"blocks.{i}.{key}" for i in range(depth) for key in block}
    expected |= {f"decoder_blocks.{i}.{key}" for i in range(8) for key in block}
    assert set(model.state_dict()) == expected


def check_initial_values(model: MaskedAutoencoderViT) -> None:
    state = model.state_dict()
    embed_dim = model.cls_token.shape[-1]
    for key, value in state.items():
        if key.endswith("pos_embed"):
            continue
        if key in ("cls_token", "mask_token"):
            assert abs(value.std() - 0.02) < 0.003 and abs(value.mean()) < 0.004, key
        elif "norm" in key:
            assert (value == (1 if key.endswith("weight") else 0)).all(), key
        elif key == "patch_embed.proj.bias":  # a convolution's own: uniform within 1/sqrt(fan in)
            bound = 1 / math.sqrt(state["patch_embed.proj.weight"][0].numel())
            assert 0.9 * bound < value.abs().max() <= bound
        elif key.endswith("bias"):
            assert (value == 0).all(), key
        else:
            weight = value.flatten(1)
            bound = math.sqrt(6 / sum(weight.shape))  # xavier-uniform
            assert 0.99 * bound < weight.abs().max() <= bound, key
            assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.01, key
            assert abs(weight.mean()) < 0.01 * bound, key
    assert state["patch_embed.proj.weight"].shape[0] == embed_dim


def test_initial_values():
    torch.manual_seed(0)
    check_initial_values(build_mae("mae_vit_base_patch16"))


def test_initial_values_of_a_model_made_on_the_meta_device():
    with torch.device("meta"):
        model = build_mae("mae_vit_small_patch16")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(0)
    model.initialize_weights()
    check_initial_values(model)
    assert torch.equal(model.pos_embed, build_mae("mae_vit_small_patch16").pos_embed)


def test_small_models_take_any_patch_and_image_size():
    for name, width in (("mae_vit_tiny_patch16", 192), ("mae_vit_small_patch16", 384)):
        model = build_mae(name, img_size=32, patch_size=4)
        images = torch.randn(2, 3, 32, 32)
        loss, pred, mask = model(images, noise_for(images, model))
        assert model.norm.weight.shape == (width,)
        assert loss.isfinite() and pred.shape == (2, 64, 48) and mask.shape == (2, 64)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("mae_vit_bse_patch16", {}, ["mae_vit_bse_patch16", "mae_vit_base_patch16"]),
        ("resnet", {}, ["resnet", "mae_vit_huge_patch14"]),
        ("mae_vit_tiny_patch16", {"img_size": 225}, ["225", "16", "224, 240"]),
        ("mae_vit_tiny_patch16", {"img_size": 8}, ["8", "nearest: 16"]),
        ("mae_vit_tiny_patch16", {"img_size": 0}, ["img_size 0", "nearest: 16"]),
        ("mae_vit_tiny_patch16", {"patch_size": 0}, ["patch_size 0"]),
        ("mae_vit_tiny_patch16", {"mask_ratio": 0}, ["mask_ratio 0"]),
        ("mae_vit_tiny_patch16", {"mask_ratio": 1.0}, ["mask_ratio 1.0"]),
        ("mae_vit_tiny_patch16", {"mask_ratio": 1.5}, ["mask_ratio 1.5"]),
        ("mae_vit_tiny_patch16", {"mask_ratio": float("nan")}, ["mask_ratio nan"]),
        ("mae_vit_tiny_patch16", {"mask_ratio": 0.999}, ["keeps 0 of 196", "0.995"]),
        ("mae_vit_tiny_patch16", {"mask_ratio": 1e-20}, ["keeps 196 of 196"]),
        ("mae_vit_tiny_patch16", {"img_size": 16}, ["1 patch", "img_size"]),
        ("mae_vit_tiny_patch16", {"num_heads": 5}, ["num_heads 5", "192", "4, 6"]),
        ("mae_vit_tiny_patch16", {"decoder_num_heads": 3}, ["decoder_num_heads 3", "2, 4"]),
        ("mae_vit_tiny_patch16", {"embed_dim": 190}, ["embed_dim 190", "188, 192"]),
        ("mae_vit_tiny_patch16", {"decoder_depth": 0}, ["decoder_depth 0"]),
    ],
)
def test_bad_input_is_one_clear_line(name, overrides, words):
    with pytest.raises(UserError) as error:
        build_mae(name, **overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_bad_calls():
    model = build_mae("mae_vit_tiny_patch16", img_size=32, patch_size=8, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(UserError, match=r"noise must be a tensor \[2, 16\], not \[1, 16\]"):
        model(images, torch.rand(1, 16))
    with pytest.raises(UserError, match="keeps 0 of 16"):
        model(images, torch.rand(2, 16), mask_ratio=0.99)
    for every in (0, -1, "some"):
        with pytest.raises(UserError, match="activation_checkpointing"):
            model.set_activation_checkpointing(every)


# --- targets and loss ---------------------------------------------------------------------------


def test_patchify_order():
    b, c, h, p = 2, 3, 12, 4
    images = torch.arange(b * c * h * h).reshape(b, c, h, h).float()
    patches = patchify(images, p)
    for patch, (row, column, channel) in ((0, (0, 0, 0)), (5, (1, 2, 1)), (7, (3, 1, 2))):
        expected = images[1, channel, patch // 3 * p + row, patch % 3 * p + column]
        assert patches[1, patch, (row * p + column) * c + channel] == expected
    assert torch.equal(unpatchify(patches, p), images)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_by_hand(imagenet_tree: Path, norm_pix_loss: bool):
    images = photographs(imagenet_tree, 3, 32)
    model = build_mae(
        "mae_vit_tiny_patch16", img_size=32, patch_size=8, norm_pix_loss=norm_pix_loss, **SMALL
    )
    noise = noise_for(images, model)
    loss, pred, mask = model(images, noise)
    errors = []
    for n in range(3):
        kept = sorted(range(16), key=lambda patch: noise[n, patch].item())[:4]
        for patch in range(16):
            assert mask[n, patch] == (patch not in kept)
            if patch in kept:
                continue
            top, left = patch // 4 * 8, patch % 4 * 8
            target = [
                images[n, channel, top + row, left + column].item()
                for row in range(8)
                for column in range(8)
                for channel in range(3)
            ]
            if norm_pix_loss:
                mean = sum(target) / 192
                variance = sum((t - mean) ** 2 for t in target) / 191
                target = [(t - mean) / math.sqrt(variance + 1e-6) for t in target]
            squares = [(p - t) ** 2 for p, t in zip(pred[n, patch].tolist(), target, strict=True)]
            errors.append(sum(squares) / 192)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_flat_patches_give_a_finite_normalised_loss():
    model = build_mae("mae_vit_tiny_patch16", img_size=32, patch_size=8, norm_pix_loss=True)
    images = torch.full((2, 3, 32, 32), 2.64)  # a white photograph, normalised
    loss, _, _ = model(images, noise_for(images, model))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# --- compared with transformers' implementation ---------------------------------------------------


def to_transformers(model: MaskedAutoencoderViT) -> dict[str, torch.Tensor]:
    """Give our weights under transformers' names."""
    names = {
        "attn.proj": "attention.o_proj",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    top = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
        "decoder_embed": "decoder.decoder_embed",
        "decoder_norm": "decoder.decoder_norm",
        "decoder_pred": "decoder.decoder_pred",
    }
    theirs: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        stem, _, part = key.rpartition(".")
        if key in top:
            theirs[top[key]] = value
        elif stem in top:
            theirs[f"{top[stem]}.{part}"] = value
        else:
            stack, i, layer = stem.split(".", 2)
            prefix = {"blocks": "vit.layers", "decoder_blocks": "decoder.decoder_layers"}[stack]
            if layer == "attn.qkv":
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    theirs[f"{prefix}.{i}.attention.{name}_proj.{part}"] = third
            else:
                theirs[f"{prefix}.{i}.{names[layer]}.{part}"] = value
    return theirs


def transformers_twin(model: MaskedAutoencoderViT) -> ViTMAEForPreTraining:
    heads = [stack[0].attn.num_heads for stack in (model.blocks, model.decoder_blocks)]
    config = ViTMAEConfig(
        hidden_size=model.cls_token.shape[-1],
        num_hidden_layers=len(model.blocks),
        num_attention_heads=heads[0],
        intermediate_size=4 * model.cls_token.shape[-1],
        layer_norm_eps=1e-6,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_size,
        decoder_hidden_size=model.mask_token.shape[-1],
        decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=heads[1],
        decoder_intermediate_size=4 * model.mask_token.shape[-1],
        mask_ratio=model.mask_ratio,
        norm_pix_loss=model.norm_pix_loss,
        attn_implementation="eager",
    )
    twin = ViTMAEForPreTraining(config)
    twin.load_state_dict(to_transformers(model), strict=True)
    return twin.eval()


def assert_agrees_with_transformers(model: MaskedAutoencoderViT, images: torch.Tensor) -> None:
    noise = noise_for(images, model)
    twin = transformers_twin(model)
    with torch.no_grad():
        loss, pred, mask = model(images, noise)
        expected = twin(images, noise=noise)
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(pred, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize(
    ("img_size", "patch_size", "mask_ratio"),
    [(64, 16, 0.75), (224, 16, 0.6), (98, 14, 0.9), (32, 4, 0.75)],
)
def test_agrees_with_transformers(
    imagenet_tree: Path, img_size: int, patch_size: int, mask_ratio: float, norm_pix_loss: bool
):
    torch.manual_seed(0)
    model = build_mae(
        "mae_vit_tiny_patch16",
        img_size=img_size,
        patch_size=patch_size,
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
        **SMALL,
    ).eval()
    stir(model)
    assert_agrees_with_transformers(model, photographs(imagenet_tree, 3, img_size))


@pytest.mark.slow
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_base_agrees_with_transformers(imagenet_tree: Path, norm_pix_loss: bool):
    torch.manual_seed(0)
    model = build_mae("mae_vit_base_patch16", norm_pix_loss=norm_pix_loss).eval()
    assert_agrees_with_transformers(model, photographs(imagenet_tree, 2, 224))


def test_gradients_agree_with_transformers(imagenet_tree: Path):
    torch.manual_seed(0)
    model = build_mae(
        "mae_vit_tiny_patch16", img_size=64, patch_size=8, norm_pix_loss=True, **SMALL
    )
    stir(model)
    images = photographs(imagenet_tree, 3, 64)
    noise = noise_for(images, model)
    twin = transformers_twin(model)
    model(images, noise)[0].backward()
    twin(images, noise=noise).loss.backward()
    gradients = dict(twin.named_parameters())
    # The gradients get transformers' names by taking the place of our weights.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    for name, ours in to_transformers(model).items():
        theirs = gradients[name].grad
        if theirs is None:
            assert name.endswith(("position_embeddings", "decoder_pos_embed"))
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# --- precision, recomputation, compilation ---


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_weights_keep_targets_and_loss_in_fp32(imagenet_tree: Path, autocast: bool):
    torch.manual_seed(0)
    overrides = {"img_size": 64, "patch_size": 8, "norm_pix_loss": True, **SMALL}
    model = build_mae("mae_vit_tiny_patch16", **overrides)
    images = photographs(imagenet_tree, 4, 64)
    noise = noise_for(images, model)
    expected, _, expected_mask = model(images, noise)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, pred, mask = model(images, noise)
    loss.backward()
    assert loss.dtype == torch.float32 and mask.dtype == torch.float32
    assert torch.equal(mask, expected_mask)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    # The loss of bf16 predictions is computed in fp32, from these predictions.
    target = patchify(images.double(), 8)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    again = (((pred.double() - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(again.item(), rel=1e-6)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model))


def loss_and_gradients(model, images, noise) -> list[torch.Tensor]:
    model.zero_grad()
    loss, pred, _ = model(images, noise)
    loss.backward()
    return [loss.detach(), pred.detach(), *[p.grad for p in trained(model)]]


@pytest.mark.parametrize("every", ["full", 1, 2, 5])
def test_activation_checkpointing_changes_no_bit(imagenet_tree: Path, every: str | int):
    model = build_mae("mae_vit_tiny_patch16", img_size=64, patch_size=8, **SMALL)
    images = photographs(imagenet_tree, 2, 64)
    noise = noise_for(images, model)
    runs = [0] * 5
    for i, block in enumerate([*model.blocks, *model.decoder_blocks]):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    expected = loss_and_gradients(model, images, noise)
    assert runs == [1] * 5
    model.set_activation_checkpointing(every)
    got = loss_and_gradients(model, images, noise)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    twice = {"full": (0, 1, 2, 3, 4), 1: (0, 1, 2, 3, 4), 2: (0, 2, 3), 5: (0, 3)}[every]
    assert runs == [3 if i in twice else 2 for i in range(5)]
    model.set_activation_checkpointing("none")
    loss_and_gradients(model, images, noise)
    assert runs == [4 if i in twice else 3 for i in range(5)]


def bytes_left_on_the_device(
    model: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor
) -> int:
    """Count the bytes that autograd saves in the forward pass and that no inner hook moves
    elsewhere."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(images, noise)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize(("every", "encoder", "decoder"), [("full", 3, 2), (2, 2, 1)])
def test_offload_takes_the_inputs_of_recomputed_blocks_away(
    imagenet_tree: Path, every: str | int, encoder: int, decoder: int
):
    model = build_mae("mae_vit_tiny_patch16", img_size=64, patch_size=8, **SMALL)
    images = photographs(imagenet_tree, 2, 64)
    noise = noise_for(images, model)
    model.set_activation_checkpointing(every)
    kept = bytes_left_on_the_device(model, images, noise)
    expected = loss_and_gradients(model, images, noise)
    model.set_activation_checkpointing(every, offload=True)
    left = bytes_left_on_the_device(model, images, noise)
    width, decoder_width = model.decoder_embed.in_features, model.decoder_embed.out_features
    assert kept - left == 4 * 2 * (encoder * 17 * width + decoder * 65 * decoder_width)
    got = loss_and_gradients(model, images, noise)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(UserError, match="it needs activation_checkpointing"):
        model.set_activation_checkpointing("none", offload=True)


@pytest.mark.slow
def test_compiled_blocks_keep_keys_and_values(imagenet_tree: Path):
    model = build_mae("mae_vit_tiny_patch16", img_size=64, patch_size=8, **SMALL)
    images = photographs(imagenet_tree, 2, 64)
    noise = noise_for(images, model)
    expected = loss_and_gradients(model, images, noise)
    keys = list(model.state_dict())
    for block in [*model.blocks, *model.decoder_blocks]:
        block.compile(backend="aot_eager")
    for every, offload in (("none", False), ("full", False), ("full", True)):
        model.set_activation_checkpointing(every, offload)
        got = loss_and_gradients(model, images, noise)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == keys


# --- masks and reconstructions ------------------------------------------------------------------


def test_removed_pixels_reach_neither_encoder_nor_prediction(imagenet_tree: Path):
    model = build_mae("mae_vit_tiny_patch16", img_size=64, patch_size=8, **SMALL)
    images = photographs(imagenet_tree, 2, 64)
    noise = noise_for(images, model)
    _, pred, mask = model(images, noise)
    other = unpatchify(mask[..., None] * torch.randn(2, 64, 192), 8)
    _, again, _ = model(images + other, noise)
    assert torch.equal(pred, again)
    _, changed, _ = model(images + 0.1, noise)
    assert not torch.allclose(pred, changed)


def test_mask_ratio_of_a_call(imagenet_tree: Path):
    model = build_mae("mae_vit_tiny_patch16", img_size=64, patch_size=8, **SMALL)
    images = photographs(imagenet_tree, 2, 64)
    noise = noise_for(images, model)
    assert model(images, noise)[2].sum() == 2 * 48
    assert model(images, noise, mask_ratio=0.5)[2].sum() == 2 * 32
    model.mask_ratio = 0.9
    assert model(images, noise)[2].sum() == 2 * 58


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_of_a_perfect_prediction_is_the_photograph(
    imagenet_tree: Path, norm_pix_loss: bool
):
    model = build_mae(
        "mae_vit_tiny_patch16", img_size=64, patch_size=8, norm_pix_loss=norm_pix_loss, **SMALL
    )
    images = photographs(imagenet_tree, 3, 64)
    patches = patchify(images, 8)
    if norm_pix_loss:
        var, mean = torch.var_mean(patches, -1, keepdim=True)
        patches = (patches - mean) / (var + 1e-6).sqrt()

    def perfect(*_: object) -> torch.Tensor:
        return torch.cat([torch.zeros(3, 1, 192), patches], dim=1)

    model.decoder_pred.register_forward_hook(perfect)
    noise = noise_for(images, model)
    reconstruction, mask = model.reconstruct(images, noise)
    torch.testing.assert_close(reconstruction, images, rtol=0, atol=1e-5)
    assert mask.shape == (3, 1, 64, 64)
    patch_mask = model(images, noise)[2]
    assert torch.equal(patchify(mask, 8), patch_mask[..., None].expand(-1, -1, 64))


def test_a_few_steps_learn(imagenet_tree: Path):
    """The model soon memorises sixteen photographs under fixed masks."""
    torch.manual_seed(0)
    model = build_mae("mae_vit_tiny_patch16", img_size=32, patch_size=8, **SMALL)
    images = photographs(imagenet_tree, 16, 32)
    noise = mask_noise(0, torch.zeros(16, dtype=torch.int64), torch.arange(16), model.num_patches)
    optimizer = torch.optim.AdamW(trained(model), lr=2e-3)
    losses = []
    for _ in range(60):
        loss, _, _ = model(images, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
