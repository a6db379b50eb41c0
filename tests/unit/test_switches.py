"""The switches of the paper's Table 1: sampling, mask tokens, targets, tokenizers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mae_scale.errors import UserError
from mae_scale.models import MaskedAutoencoderViT, build_classifier, build_mae
from mae_scale.models.masking import mask_noise, random_masking
from mae_scale.models.targets import PatchPCA, patchify, unpatchify
from mae_scale.models.tokenizer import DalleEncoder, Tokenizer
from mae_scale.models.weights import fit_to_classifier, fit_to_mae

SIZES = {"img_size": 32, "patch_size": 8, "depth": 2, "decoder_depth": 1}
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def mae(**switches: object) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return build_mae("mae_vit_tiny_patch16", **{**SIZES, **switches})


def masks(sampling: str, ratio: float, grid: int = 14, count: int = 200) -> torch.Tensor:
    """Give masks [count, grid, grid], 1 for removed patches."""
    sample = torch.arange(count)
    noise = mask_noise(3, torch.zeros_like(sample), sample, grid**2, sampling, ratio)
    return random_masking(noise, ratio)[1].view(count, grid, grid)


def edges(mask: torch.Tensor) -> float:
    """Give the share of neighbouring pairs of patches of which exactly one is removed."""
    pairs = (
        (mask[:, 1:] != mask[:, :-1]).float().mean(),
        (mask[:, :, 1:] != mask[:, :, :-1]).float().mean(),
    )
    return float(sum(pairs) / 2)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_fewer_passes_give_the_same_numbers(norm_pix_loss: bool) -> None:
    """Loss, prediction and gradients are equal up to rounding; the weights have the same keys."""
    found = []
    for fewer in (False, True):
        model = mae(fewer_passes=fewer, norm_pix_loss=norm_pix_loss).double()
        noise = torch.rand(4, model.num_patches, generator=torch.Generator().manual_seed(1))
        loss, pred, _ = model(IMAGES.double(), noise)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((model.state_dict(), loss, pred, grads))
    (state, loss, pred, grads), (other_state, other_loss, other_pred, other_grads) = found
    assert all(torch.equal(state[key], other_state[key]) for key in state.keys() | other_state)
    # The target is in fp32, whatever the model.
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(other_pred, pred, rtol=1e-9, atol=1e-9)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_blocks_are_few_and_the_share_is_exact(ratio: float) -> None:
    """Masks have at most about half the edges of random ones; each patch is removed at some
    time."""
    block, random = masks("block", ratio), masks("random", ratio)
    assert (block.flatten(1).sum(dim=1) == 196 - int(196 * (1 - ratio))).all()
    assert edges(random) == pytest.approx(2 * ratio * (1 - ratio), abs=0.02)
    assert edges(block) < 0.55 * edges(random)
    everywhere = block.mean(dim=0)
    assert everywhere.min() > 0.04 and everywhere.max() < 1
    assert len({tuple(m.flatten().tolist()) for m in block}) == len(block)


def test_the_first_block_is_a_rectangle_of_beits_shape() -> None:
    """The patches of the first block have the largest noise; its area and aspect are BEiT's."""
    sample = torch.arange(500)
    noise = mask_noise(0, sample, sample, 196, "block", 0.75).view(-1, 14, 14)
    for first in noise >= 32:
        rows, columns = first.any(dim=1).nonzero(), first.any(dim=0).nonzero()
        height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
        assert first.sum() == height * width  # no hole
        assert 12 <= height * width <= 160
        assert 0.2 < height / width < 5


def test_block_noise_does_not_depend_on_the_batch() -> None:
    sample = torch.arange(40)
    whole = mask_noise(1, sample % 3, sample, 64, "block", 0.6)
    for piece in (slice(0, 1), slice(17, 40)):
        assert torch.equal(
            mask_noise(1, (sample % 3)[piece], sample[piece], 64, "block", 0.6), whole[piece]
        )


def test_the_grid_keeps_one_of_every_two_by_two() -> None:
    mask = masks("grid", 0.75, count=3)
    kept = mask == 0
    assert kept[:, ::2, ::2].all() and kept.sum() == 3 * 49
    for grid, ratio in ((14, 0.5), (7, 0.75)):
        with pytest.raises(UserError, match="keeps one of every four"):
            masks("grid", ratio, grid)


def test_mask_tokens_in_the_encoder() -> None:
    """The encoder sees tokens in the place of removed patches, whose pixels matter for the loss
    only."""
    model = mae(mask_tokens_in_encoder=True)
    assert model.mask_token.shape == (1, 1, 192) and model.encoder_tokens == 17
    sample = torch.arange(4)
    noise = model.noise(0, sample, sample)
    loss, pred, mask = model(IMAGES, noise)
    assert pred.shape == (4, 16, 192)
    pixels = patchify(IMAGES, 8)
    other = unpatchify(torch.where(mask[..., None] > 0, 5.0, pixels), 8)
    other_loss, other_pred, _ = model(other, noise)
    assert torch.equal(other_pred, pred) and other_loss != loss
    loss.backward()
    assert model.mask_token.grad.abs().sum() > 0
    changed = unpatchify(torch.where(mask[..., None] > 0, pixels, pixels + 1), 8)
    assert not torch.allclose(model(changed, noise)[1], pred)
    # Without mask tokens the outputs differ: the encoder then sees kept patches only.
    assert mae().encoder_tokens == 5


def test_pca_is_that_of_the_covariance() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(3, 0.1, 12)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    data = torch.randn(5000, 12, generator=generator) * scale @ rotation.T + 7
    pca = PatchPCA(12, pca_components=4)
    state = pca.fit(data.split(700))
    pca.load_state_dict(state)
    _, s, v = torch.linalg.svd(data - data.mean(dim=0), full_matrices=False)
    expected = v[:4] * v[:4].gather(1, v[:4].abs().argmax(1, keepdim=True)).sign()
    torch.testing.assert_close(pca.components, expected, rtol=1e-3, atol=1e-4)
    coefficients = pca(data)
    torch.testing.assert_close(coefficients.std(dim=0), s[:4] / math.sqrt(5000 - 1))
    left_over = (data - pca.to_pixels(coefficients, data)).square().sum()
    torch.testing.assert_close(left_over, s[4:].square().sum(), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="pca_components 13 must be from 1 to the 12"):
        PatchPCA(12, pca_components=13)


def test_pca_as_target() -> None:
    model = mae(target="pca", pca_components=20)
    patches = patchify(IMAGES, 8)
    model.pca.load_state_dict(model.pca.fit([patches.flatten(0, 1)]))
    noise = torch.rand(4, 16)
    loss, pred, mask = model(IMAGES, noise)
    assert pred.shape == (4, 16, 20) and "pca.components" in model.state_dict()
    target = model.pca(patches)
    by_hand = ((pred - target) ** 2).mean(dim=-1)[mask > 0].mean()
    torch.testing.assert_close(loss, by_hand)
    image, _ = model.reconstruct(IMAGES, noise)
    torch.testing.assert_close(patchify(image, 8), model.pca.to_pixels(pred, patches))


def test_weights_of_the_switches_go_into_others() -> None:
    """A classifier takes the encoder; another masked autoencoder keeps its own PCA components."""
    state = mae(target="pca", pca_components=20).state_dict()
    classifier = build_classifier("mae_vit_tiny_patch16", 5, img_size=32, patch_size=8, depth=2)
    assert not any(key.startswith("pca.") for key in fit_to_classifier(state, classifier))
    same = mae(target="pca", pca_components=20)
    assert "pca.mean" not in fit_to_mae(state, same)
    assert "pca.mean" in fit_to_mae(state, same, whole=True)
    with pytest.raises(
        UserError, match=r"decoder_pred\.weight is \[20, 128\], expected \[192, 128\]"
    ):
        fit_to_mae(state, mae())
    with pytest.raises(UserError, match=r"mask_token is \[1, 1, 128\], expected \[1, 1, 192\]"):
        fit_to_mae(mae().state_dict(), mae(mask_tokens_in_encoder=True))


def test_tokens_as_target() -> None:
    model = mae(target="tokens", vocabulary_size=11)
    noise, ids = torch.rand(4, 16), torch.randint(0, 11, (4, 16))
    loss, pred, mask = model(IMAGES, noise, token_ids=ids)
    removed = mask > 0
    torch.testing.assert_close(loss, F.cross_entropy(pred[removed], ids[removed]))
    with pytest.raises(ValueError, match="needs them"):
        model(IMAGES, noise)
    with pytest.raises(UserError, match="no image"):
        model.reconstruct(IMAGES, noise)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"target": "pca", "norm_pix_loss": True}, "norm_pix_loss normalises pixels"),
        ({"target": "hog"}, "target 'hog' must be pixels, pca or tokens"),
        ({"mask_sampling": "blocks"}, "mask_sampling 'blocks' must be random, block or grid"),
        ({"target": "pca", "pca_components": 193}, "from 1 to the 192 pixel values"),
        ({"target": "tokens", "vocabulary_size": 0}, "vocabulary_size 0"),
    ],
)
def test_switches_that_do_not_fit(switches: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mae(**switches)


class Logits(nn.Module):
    """A tokenizer of 7 tokens, one for 4 x 4 pixels, chosen by the mean of red."""

    def __init__(self, as_ids: bool = False) -> None:
        super().__init__()
        self.as_ids = as_ids

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red = F.avg_pool2d(x[:, :1], 4)
        logits = -(red - torch.linspace(0, 1, 7).view(1, 7, 1, 1)).abs()
        return logits.argmax(dim=1).flatten(1) if self.as_ids else logits


def save_script(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module), path)
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_torchscript_tokenizer(tmp_path: Path, as_ids: bool) -> None:
    """The tokenizer sees the images at half their size, so that each patch of 8 pixels has one
    token."""
    tokenizer = Tokenizer(save_script(Logits(as_ids), tmp_path / "t.pt"), 32, 16, 7)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, 0, 8:16, 16:24] = 255
    images[1, 0] = 128
    ids = tokenizer(images)
    assert ids.shape == (2, 16) and ids.dtype == torch.int64
    assert ids[0, 1 * 4 + 2] == 6 and ids[0].sum() <= 8 and (ids[1] == 3).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    path = save_script(Logits(), tmp_path / "t.pt")
    with pytest.raises(UserError, match=r"there is no file .*no\.pt; the target tokens needs"):
        Tokenizer(tmp_path / "no.pt", 32, 16, 7)
    with pytest.raises(UserError, match=r"gives logits \[1, 7, 8, 8\], expected \[B, 8192, s, s\]"):
        Tokenizer(path, 32, 16, 8192)
    ids = save_script(Logits(as_ids=True), tmp_path / "ids.pt")
    with pytest.raises(UserError, match=r"gives ids from 3 to 3, but vocabulary_size is 2"):
        Tokenizer(ids, 32, 16, 2)
    (tmp_path / "text.pt").write_text("no script")
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path / "text.pt", 32, 16, 7)
    with pytest.raises(UserError, match=r"holds no dVAE encoder of DALL-E.*found head\.weight"):
        Tokenizer(tmp_path / "vit.safetensors", 32, 16, 7)


def test_dalles_encoder_out_of_its_own_keys(tmp_path: Path) -> None:
    """Sizes follow from the weights; images of 224 pixels with 14 x 14 patches are resized to
    112."""
    encoder = DalleEncoder(width=8, blocks=2, vocabulary_size=30)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = encoder.state_dict()
    for key in (
        "blocks.input.w",
        "blocks.group_1.block_1.res_path.conv_1.w",
        "blocks.group_2.block_1.id_path.w",
        "blocks.group_4.block_2.res_path.conv_4.b",
        "blocks.output.conv.b",
    ):
        assert key in state
    assert "blocks.group_1.block_1.id_path.w" not in state  # a block that keeps the width has none
    save_file(state, tmp_path / "dvae.safetensors")
    tokenizer = Tokenizer(tmp_path / "dvae.safetensors", 224, 196, 30)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    small = F.interpolate(images.float() / 255, (112, 112), mode="bicubic", antialias=True)
    expected = encoder(small.clamp(0, 1)).argmax(dim=1).flatten(1)
    assert torch.equal(tokenizer(images), expected)
    with torch.device("meta"):
        full = DalleEncoder()
    # 215 MB in fp32, as the file that DALL-E's authors publish.
    assert sum(p.numel() for p in full.parameters()) == 53_786_240


def test_targets_are_computed_in_full_fp32() -> None:
    """Neither TF32, which training allows, nor autocast is used; both settings are restored
    after."""
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    seen = []

    class Product(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in (torch.Tensor.matmul, torch.Tensor.__matmul__):
                autocast = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
                seen.append((torch.get_float32_matmul_precision(), cudnn.allow_tf32, autocast))
            return super().__torch_function__(func, types, args, kwargs or {})

    pca = PatchPCA(12, pca_components=4)
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            pca(torch.rand(3, 12).as_subclass(Product))
            pca.to_pixels(torch.rand(3, 4).as_subclass(Product), torch.rand(3, 12))
        assert seen == [("highest", False, False)] * 2
        assert torch.get_float32_matmul_precision() == "high" and cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
