"""Images of any number of bands and of any proportions: decoding, statistics, models, weights."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from timm.models import adapt_input_conv

from mae_scale.config.parsing import parse
from mae_scale.config.pretraining import PretrainConfig
from mae_scale.data.augment import Augment
from mae_scale.data.bands import RGB, Bands, checked_range, for_display, raw_values, statistics
from mae_scale.data.formats import image_files
from mae_scale.data.shards import open_shards
from mae_scale.data.transforms import TRAIN_UNIFORMS, crop_box, eval_crop, normalize
from mae_scale.errors import UserError
from mae_scale.models import build_classifier, build_mae
from mae_scale.models.masking import mask_noise, random_masking
from mae_scale.models.pos_embed import interpolate_pos_embed, sincos_pos_embed
from mae_scale.models.weights import fit_to_classifier, fit_to_mae, sizes_of, to_channels
from mae_scale.sharding.foreign import index_shards
from mae_scale.sharding.images import image_damage, shrink
from mae_scale.sharding.sources import find_source


@pytest.fixture(scope="module")
def photograph(imagenet_tree: Path) -> Image.Image:
    with Image.open(sorted(imagenet_tree.rglob("*.JPEG"))[3]) as image:
        return image.convert("RGB").resize((60, 40))


def saved(image: Image.Image, form: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def as_array(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def bands(count: int, value_range: Any = None) -> Bands:
    return Bands(count, (0.5,) * count, (0.25,) * count, value_range)


def pixels(decoded: torch.Tensor) -> np.ndarray:
    assert decoded.dtype == torch.uint8
    return decoded.permute(1, 2, 0).numpy()


def test_pictures_of_one_two_and_four_bands(photograph: Image.Image) -> None:
    gray = photograph.convert("L")
    assert np.array_equal(pixels(bands(1).decode(saved(gray, "PNG")))[..., 0], np.array(gray))
    jpeg = pixels(bands(1).decode(saved(photograph, "JPEG")))
    assert jpeg.shape == (40, 60, 1)
    four = np.dstack([np.array(photograph), np.array(gray)])
    rgba = Image.fromarray(four, "RGBA")
    for form in ("PNG", "TIFF"):
        assert np.array_equal(pixels(bands(4).decode(saved(rgba, form))), four)
    two = Image.fromarray(four[..., 1:3].copy(), "LA")
    assert np.array_equal(pixels(bands(2).decode(saved(two, "PNG"))), four[..., 1:3])
    deep = Image.fromarray(np.array(gray).astype(np.uint16) * 257)
    assert np.array_equal(pixels(bands(1).decode(saved(deep, "PNG")))[..., 0], np.array(gray))
    pages = [Image.fromarray(four[..., i]) for i in (2, 0, 3, 1, 1)]
    stack = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(pixels(bands(5).decode(stack)), four[..., [2, 0, 3, 1, 1]])
    with pytest.raises(ValueError, match=r"has 3 bands, expected 4"):
        bands(4).decode(saved(photograph, "PNG"))
    assert torch.equal(RGB.decode(saved(rgba, "PNG")).permute(1, 2, 0), torch.tensor(four[..., :3]))


def test_arrays(photograph: Image.Image) -> None:
    values = np.concatenate([np.array(photograph)] * 2, axis=-1)  # [40, 60, 6]
    for given in (values, values.transpose(2, 0, 1), np.asfortranarray(values)):
        assert np.array_equal(pixels(bands(6).decode(as_array(given))), values)
    assert np.array_equal(pixels(RGB.decode(as_array(values[..., :3]))), values[..., :3])
    assert bands(1).decode(as_array(values[..., 0])).shape == (1, 40, 60)
    for wide in (np.uint16, ">u2"):
        given = as_array((values.astype(np.uint16) * 257).astype(wide))
        assert np.array_equal(pixels(bands(6).decode(given)), values)
    reflectance = bands(6, (100.0, 10_100.0)).decode(as_array(values.astype(np.float32) * 100))
    expected = np.round((values * 100.0 - 100).clip(0, 10_000) * 255 / 10_000)
    assert np.abs(pixels(reflectance) - expected).max() <= 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (as_array(np.zeros((4, 5, 6), np.float32)), "type float32, .* give data.value_range"),
        (as_array(np.zeros((4, 5, 7), np.uint8)), "has 4 bands, expected 6"),
        (as_array(np.zeros(4, np.uint8)), r"shape \(4,\) .* expected numbers"),
        (as_array(np.array([["a", "b"]])), "expected numbers"),
        (as_array(np.zeros((4, 5, 6), np.uint8))[:-1], "does not hold the 120 values"),
        (as_array(np.zeros((4, 5, 6), np.uint8)).replace(b"(4, 5, 6)", b"(9999999, 9999999, 6)"),
         "cannot be read as an array|pixels, more than"),
        (b"\x93NUMPY\x09\x09", "cannot be read as an array"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_images(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bands(6).decode(data)


def deep_png(values: np.ndarray) -> bytes:
    """Make a PNG of 16 bits and three bands, which PIL cannot write."""
    height, width, _ = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(values: np.ndarray, **how: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **how)
    return stream.getvalue()


def test_all_bits_of_deep_images_are_read(photograph: Image.Image) -> None:
    """PIL reads the upper 8 bits of colours of 16 bits, and no TIFF of more than four bands."""
    three = np.array(photograph).astype(np.uint16) * 39  # from 0 to 9,945
    many = np.dstack([three] * 4 + [three[..., 0]])  # [40, 60, 13]
    first = np.moveaxis(many, -1, 0).copy()
    black = {"photometric": "minisblack"}
    forms = {
        tiff(three, photometric="rgb"): three,
        tiff(many, planarconfig="contig", **black): many,
        tiff(many, planarconfig="contig", compression="zlib", tile=(16, 16), **black): many,
        tiff(first, planarconfig="separate", **black): many,
        tiff(first, **black): many,  # a page for each band
        tiff(many[..., 0].astype(np.float32), **black): many[..., :1],
    }
    for data, values in forms.items():
        count = values.shape[-1]
        assert np.array_equal(raw_values(data, count), values)
        decoded = pixels(bands(count, (0, 9_945)).decode(data))
        assert np.abs(decoded - values / 39.0).max() <= 0.5
        with pytest.raises(ValueError, match=rf"has {count} bands, expected 7"):
            raw_values(data, 7)
        with pytest.raises(ValueError, match="pixels, more than 2,399"):
            raw_values(data, count, 2_399)
        with pytest.raises(ValueError, match=r"cannot be decoded|has 1 bands"):  # the first page
            raw_values(data[: len(data) // 2], count)
    with pytest.raises(ValueError, match="PNG of several bands with 16 bits"):
        bands(3, (0, 9_945)).decode(deep_png(three))
    *_, many_bands, _ = forms
    assert image_damage(many_bands) is None and shrink(many_bands, 8, 90) == many_bands
    contiguous = tiff(many, planarconfig="contig", **black)
    assert image_damage(contiguous) is None and shrink(contiguous, 8, 90) == contiguous
    assert image_damage(contiguous[:-100]) is not None


def test_arrays_beside_other_images_are_none(photograph: Image.Image, tmp_path: Path) -> None:
    jpeg, array = saved(photograph, "JPEG"), as_array(np.array(photograph))
    folder, tars = tmp_path / "folder" / "cat", tmp_path / "tars"
    folder.mkdir(parents=True)
    tars.mkdir()
    (folder / "features.npy").write_bytes(array)
    (tmp_path / "folder" / "mean.npy").write_bytes(array)
    assert [path.name for path in image_files(folder)] == ["features.npy"]
    (folder / "a.jpg").write_bytes(jpeg)
    assert [path.name for path in image_files(folder)] == ["a.jpg"]
    source = find_source(tmp_path / "folder", "train")
    assert len(source) == 1
    assert any("2 files" in w and "an array, beside images" in w for w in source.warnings)
    members = [("1.jpg", jpeg), ("1.npy", array), ("2.a.jpg", jpeg), ("2.b.npy", array)]
    members += [("3.npy", array), ("1.cls", b"0"), ("2.cls", b"0"), ("3.cls", b"1")]
    with tarfile.open(tars / "000.tar", "w") as tar:
        for name, data in sorted(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_shards([str(tars / "000.tar")])
    assert open_shards(tars).index["label"].tolist() == [0, 0, 1]


def test_statistics_and_normalisation(photograph: Image.Image) -> None:
    values = np.array(photograph)
    images = [torch.tensor(values).permute(2, 0, 1), torch.tensor(values[::2]).permute(2, 0, 1)]
    mean, std = statistics(iter(images))
    joined = np.concatenate([values.reshape(-1, 3), values[::2].reshape(-1, 3)]) / 255
    np.testing.assert_allclose(mean, joined.mean(axis=0))
    np.testing.assert_allclose(std, joined.std(axis=0))
    own = Bands(3, tuple(mean), tuple(std))
    batch = torch.stack([images[0]] * 2)
    assert own.normalize(batch).flatten(2).std(dim=2).mean() == pytest.approx(1, abs=0.3)
    assert torch.equal((own.denormalize(own.normalize(batch)) * 255).round(), batch.float())
    assert torch.equal(RGB.normalize(batch), normalize(batch))
    for count in (1, 2, 3, 7):
        assert for_display(torch.rand(2, count, 4, 5)).shape == (2, 3, 4, 5)


def config(*arguments: str) -> PretrainConfig:
    return parse(PretrainConfig, ["--run_dir", "r", "--data.train", "s", *arguments], "pretrain")


def test_a_config_says_what_is_missing() -> None:
    assert Bands.of(config()) == RGB
    with pytest.raises(UserError, match="`mae-scale stats s --in_chans 4` computes them"):
        Bands.of(config("--model.in_chans", "4"))
    with pytest.raises(UserError, match=r"data\.mean has 2 numbers and data\.std 3"):
        Bands.of(config("--data.mean", "[1, 2]", "--data.std", "[1, 2, 3]"))
    with pytest.raises(UserError, match="must rise"):
        Bands.of(config("--data.value_range", "[5, 5]"))
    assert config("--model.img_size", "[224, 448]").model.img_size == (224, 448)
    assert config("--model.img_size", "96").model.img_size == 96
    with pytest.raises(UserError, match=r"model\.img_size"):
        config("--model.img_size", "[224, 0]")


def test_crops_of_other_proportions(photograph: Image.Image) -> None:
    image = torch.tensor(np.array(photograph)).permute(2, 0, 1)
    for size in ((16, 32), (32, 16), (20, 20), (8, 200)):
        assert eval_crop(image, size).shape == (3, *size)
        assert eval_crop(image, size, 1.0).shape == (3, *size)
        for crop in ("none", "fixed", "random", "clipped"):
            augment = Augment(crop=crop)  # type: ignore[arg-type]
            draws = np.random.default_rng(0).random((2, TRAIN_UNIFORMS))
            data = bytearray(saved(photograph, "JPEG"))
            views = augment(data, size, list(draws), [(0, 0, 0), (0, 0, 1)])
            assert [view.shape for view in views] == [(3, *size)] * 2
    # A wide crop is stretched no more than a square one: by 3/4 to 4/3 of the size's proportions.
    ratios = []
    for draws in np.random.default_rng(1).random((500, TRAIN_UNIFORMS)):
        _, _, height, width = crop_box(400, 1200, draws, (0.05, 0.2), (1.5, 8 / 3))
        ratios.append(width / height)
    assert 1.45 < min(ratios) < 1.6 and 2.5 < max(ratios) < 2.75
    # A wide crop of a wide image has the same proportions as a square crop of a square image.
    stretched = torch.cat([image, image], dim=2)
    wide = eval_crop(stretched, (20, 60), 1.0)
    assert wide.shape == (3, 20, 60)


def test_positions_of_a_rectangle_are_those_of_a_square_that_holds_it() -> None:
    wide, square = sincos_pos_embed(48, (3, 7)), sincos_pos_embed(48, 7)
    assert torch.equal(wide[:, 0], square[:, 0])
    rows = square[:, 1:].view(1, 7, 7, 48)[:, :3].reshape(1, 21, 48)
    assert torch.equal(wide[:, 1:], rows)
    assert torch.equal(sincos_pos_embed(48, (7, 7)), square)
    changed = interpolate_pos_embed(wide, (6, 14), (3, 7))
    assert changed.shape == (1, 85, 48)
    assert torch.equal(interpolate_pos_embed(wide, (3, 7), (3, 7)), wide)


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
def test_masks_of_a_rectangle(sampling: Any) -> None:
    sample = torch.arange(64)
    noise = mask_noise(0, torch.zeros_like(sample), sample, 96, sampling, 0.75, (6, 16))
    mask = random_masking(noise, 0.75)[1].view(-1, 6, 16)
    assert mask.sum(dim=(1, 2)).unique().tolist() == [72]
    if sampling == "grid":
        assert not mask[:, ::2, ::2].any()
    if sampling == "block":  # neighbours go together, in rows and in columns
        same = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean()
        assert same > 0.75 and (mask[:, 1:] == mask[:, :-1]).float().mean() > 0.7


def test_a_range_for_each_band() -> None:
    values = np.dstack([np.full((4, 5), 100), np.full((4, 5), 7)]).astype(np.float32)
    decoded = bands(2, ((0, 250), (-1, 9))).decode(as_array(values))
    assert decoded[0].unique().tolist() == [102] and decoded[1].unique().tolist() == [204]
    assert checked_range([[0, 1], [2, 3]], 2) == ((0, 1), (2, 3))
    for wrong in ([], [[0, 1]], [[0, 1], [1, 1]], [[0, 1], [0, float("nan")]], [1, 0]):
        with pytest.raises(ValueError, match=r"must rise|pairs; expected"):
            checked_range(wrong, 2)
    own = config("--data.value_range", "[[0, 1], [0, 2], [-3, 3]]")
    assert Bands.of(own).value_range == ((0, 1), (0, 2), (-3, 3))
    with pytest.raises(UserError, match="has 2 pairs; expected one pair for all, or 3"):
        Bands.of(config("--data.value_range", "[[0, 1], [0, 2]]"))
    for wrong in ("[0, .inf]", "[.nan, 1]", "[0]", "[[0, 1, 2]]", "5"):
        with pytest.raises(UserError, match=r"data\.value_range"):
            config("--data.value_range", wrong)


SIZES = {"patch_size": 8, "depth": 2, "decoder_depth": 1}


def test_a_model_of_wide_images_of_five_bands() -> None:
    model = build_mae("mae_vit_tiny_patch16", img_size=(16, 32), in_chans=5, **SIZES)
    assert (model.grid, model.num_patches, model.in_chans) == ((2, 4), 8, 5)
    assert model.decoder_pred.out_features == 8 * 8 * 5
    images, sample = torch.rand(3, 5, 16, 32), torch.arange(3)
    noise = model.noise(0, sample, sample)
    loss, pred, mask = model(images, noise)
    assert pred.shape == (3, 8, 320) and mask.sum() == 18 and loss.isfinite()
    drawn, removed = model.reconstruct(images, noise)
    assert drawn.shape == images.shape and removed.shape == (3, 1, 16, 32)
    assert model.features(images, "mean").shape == (3, 192)
    # Projecting only the chosen patches gives the same tokens.
    few = build_mae(
        "mae_vit_tiny_patch16", img_size=(16, 32), in_chans=5, fewer_passes=True, **SIZES
    )
    few.load_state_dict(model.state_dict())
    torch.testing.assert_close(few(images, noise)[0], loss)
    # A patch of the mask covers a patch of the image.
    assert removed.view(3, 2, 8, 4, 8).amax(dim=(2, 4)).flatten(1).equal(mask)
    with pytest.raises(UserError, match="img_size 20 is no multiple of patch_size 8"):
        build_mae("mae_vit_tiny_patch16", img_size=(16, 20), **SIZES)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 10])
def test_published_weights_for_other_bands_are_adapted_as_timm_does(channels: int) -> None:
    published = build_mae("mae_vit_tiny_patch16", img_size=32, **SIZES).state_dict()
    weight = published["patch_embed.proj.weight"]
    torch.testing.assert_close(to_channels(weight, channels), adapt_input_conv(channels, weight))
    model = build_classifier(
        "mae_vit_tiny_patch16", 4, img_size=32, patch_size=8, depth=2, in_chans=channels
    )
    fitted = fit_to_classifier(published, model)
    assert fitted["patch_embed.proj.weight"].shape == (192, channels, 8, 8)
    mae = build_mae("mae_vit_tiny_patch16", img_size=32, in_chans=channels, **SIZES)
    fitted = fit_to_mae(published, mae)
    assert ("decoder_pred.weight" in fitted) is (channels == 3)
    assert "decoder_embed.weight" in fitted
    assert sizes_of(mae.state_dict()).get("in_chans", 3) == channels


def test_positions_of_published_weights_and_of_wide_runs() -> None:
    """A square grid of 64 patches is no grid of 4 x 16, though both have as many patches."""

    def classifier(size: Any) -> Any:
        return build_classifier("mae_vit_tiny_patch16", 4, img_size=size, patch_size=8, depth=2)

    square, wide = build_mae("mae_vit_tiny_patch16", img_size=64, **SIZES), classifier((32, 128))
    found = fit_to_classifier(square.state_dict(), wide)["pos_embed"]
    expected = interpolate_pos_embed(square.pos_embed.detach(), (4, 16))
    assert torch.equal(found, expected)
    # The weights of a wide run keep their trained positions; its grid is known.
    torch.nn.init.normal_(wide.pos_embed)
    again = fit_to_classifier(wide.state_dict(), classifier((32, 128)), whole=True, grid=(4, 16))
    assert torch.equal(again["pos_embed"], wide.pos_embed)
    larger = fit_to_classifier(wide.state_dict(), classifier((64, 256)), grid=(4, 16))
    assert torch.equal(
        larger["pos_embed"], interpolate_pos_embed(wide.pos_embed.detach(), (8, 32), (4, 16))
    )
    # The fixed ones of pre-training are recognised, and are the model's own at another size.
    mae = build_mae("mae_vit_tiny_patch16", img_size=(32, 128), **SIZES)
    kept = fit_to_mae(mae.state_dict(), mae, whole=True)
    assert torch.equal(kept["pos_embed"], mae.pos_embed)
    assert "pos_embed" not in fit_to_mae(square.state_dict(), mae)
    with pytest.raises(UserError, match="pos_embed has 9 rows"):
        short = {**square.state_dict(), "pos_embed": torch.zeros(1, 9, 192)}
        fit_to_classifier(short, wide)
