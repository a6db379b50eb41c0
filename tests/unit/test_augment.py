"""Augmentation, which is a function of (seed, epoch, sample) alone, with timm's operations."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_scale.config.classification import AugmentConfig
from mae_scale.data.augment import Augment
from mae_scale.data.transforms import TRAIN_UNIFORMS, decode_image, train_crop
from mae_scale.errors import UserError
from mae_scale.randomness import Purpose, uniform
from mae_scale.tasks.finetune import Targets

RECIPE = {"crop_scale": (0.08, 1.0), "rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25}


def uniforms(sample: int) -> np.ndarray:
    return uniform(Purpose.AUGMENT, 0, 0, sample, np.arange(TRAIN_UNIFORMS))


@pytest.fixture(scope="module")
def photographs(imagenet_tree: Path) -> list[bytearray]:
    paths = sorted(imagenet_tree.glob("*/*.JPEG"))[:40]
    return [bytearray(path.read_bytes()) for path in paths]


def test_follows_from_the_keys_alone(photographs: list[bytearray]) -> None:
    """Neither the state of global generators nor the order of images matters."""
    first, second = Augment(**RECIPE), Augment(**RECIPE)
    expected = [first(d, 32, [uniforms(i)], [(0, 0, i)])[0] for i, d in enumerate(photographs)]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for i in reversed(range(len(photographs))):
        pixels = second(photographs[i], 32, [uniforms(i)], [(0, 0, i)])[0]
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 32, 32)
        assert torch.equal(pixels, expected[i])
    assert torch.equal(torch.get_rng_state(), before)
    other = [second(d, 32, [uniforms(i)], [(0, 1, i)])[0] for i, d in enumerate(photographs)]
    differ = sum(not torch.equal(a, b) for a, b in zip(expected, other, strict=True))
    assert differ > 0.9 * len(other)


def test_without_operations_it_is_the_crop(photographs: list[bytearray]) -> None:
    data = photographs[0]
    pixels = Augment((0.08, 1.0))(data, 32, [uniforms(0)], [(0, 0, 0)])[0]
    assert torch.equal(pixels, train_crop(decode_image(data), 32, uniforms(0), (0.08, 1.0)))


def test_erases_the_share_it_should_with_normal_noise(photographs: list[bytearray]) -> None:
    data = photographs[0]
    plain = Augment((0.08, 1.0))(data, 48, [uniforms(0)], [(0, 0, 0)])[0]
    erasing = Augment((0.08, 1.0), erasing=0.25)
    shares = []
    for sample in range(400):
        pixels = erasing(data, 48, [uniforms(0)], [(0, 0, sample)])[0]
        changed = (pixels != plain).any(dim=0)
        if not changed.any():
            continue
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert changed.sum() >= 0.9 * box  # a rectangle, but for noise that equals the image
        shares.append(int(box) / 48**2)
    assert len(shares) / 400 == pytest.approx(0.25, abs=0.06)
    assert min(shares) > 0.01 and max(shares) < 0.36  # timm's 2 % to a third of the area


def test_posterize_down_to_no_bits(photographs: list[bytearray]) -> None:
    """timm asks for 0 bits at the highest magnitude, which newer Pillows refuse."""
    augment = Augment(rand_augment="rand-m10-inc1")
    pixels = [
        augment(photographs[0], 32, [uniforms(0)], [(0, 0, sample)])[0] for sample in range(150)
    ]
    assert any(not image.any() for image in pixels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rand_augment": "rnd-m9"}, "rand_augment 'rnd-m9' is not in timm's spelling"),
        ({"rand_augment": "rand-x9"}, "rand-x9"),
        ({"erasing": 1.5}, "erasing 1.5"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.2)}, "crop_scale"),
    ],
)
def test_values_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Augment(**values)


def test_targets_follow_from_the_key() -> None:
    targets = Targets(AugmentConfig(), classes=5, micro_batch_size=4)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for key in range(8):
        np.random.seed(key + 100)
        mixed, target = targets.mix(images.clone(), labels, key)
        again, same = targets.mix(images.clone(), labels, key)
        assert torch.equal(mixed, again) and torch.equal(target, same)
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        assert target[0, 0] + target[0, 3] == pytest.approx(1 - 0.1 + 2 * 0.1 / 5)
    assert not torch.equal(targets.mix(images.clone(), labels, 1)[0], images)


def test_label_smoothing_alone() -> None:
    smooth = AugmentConfig(mixup=0, cutmix=0, label_smoothing=0.1)
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 4])
    mixed, target = Targets(smooth, classes=5, micro_batch_size=3).mix(images, labels, 0)
    assert mixed is images
    logits = torch.randn(3, 5)
    ours = torch.nn.functional.cross_entropy(logits, target)
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_mixing_needs_pairs() -> None:
    with pytest.raises(UserError, match=r"train.micro_batch_size 5 must be even"):
        Targets(AugmentConfig(), classes=5, micro_batch_size=5)
