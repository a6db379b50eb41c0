"""Masks: the rule of the paper, and noise that depends on nothing but its keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_scale.errors import UserError
from mae_scale.models.masking import mask_noise, num_kept, random_masking
from mae_scale.randomness import Purpose, hash64


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "kept"),
    [
        (196, 0.75, 49),
        (256, 0.75, 64),
        (64, 0.75, 16),
        (196, 0.6, 78),
        (100, 0.9, 9),  # 100 * (1 - 0.9) is 9.999…, and the authors' code cuts it
        (10, 0.8, 1),
        (196, 0.005, 195),
    ],
)
def test_number_kept(num_patches, mask_ratio, kept):
    assert num_kept(num_patches, mask_ratio) == kept


def test_a_rounding_that_keeps_nothing_is_refused():
    with pytest.raises(UserError, match=r"keeps 0 of 10 patches.*0\.1 to 0\.9"):
        num_kept(10, 0.9)


@given(
    batch=st.integers(1, 4),
    num_patches=st.integers(2, 300),
    mask_ratio=st.floats(0.01, 0.99),
    levels=st.integers(1, 1000),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=200)
def test_the_smallest_noise_stays_and_ties_go_by_place(
    batch, num_patches, mask_ratio, levels, seed
):
    values = np.random.default_rng(seed).integers(0, levels, (batch, num_patches))
    try:
        kept = num_kept(num_patches, mask_ratio)
    except UserError:
        return
    ids_keep, mask, ids_restore = random_masking(torch.from_numpy(values).float(), mask_ratio)
    for row, ids, removed, restore in zip(values, ids_keep, mask, ids_restore, strict=True):
        order = sorted(range(num_patches), key=lambda patch: (row[patch], patch))
        assert ids.tolist() == order[:kept]
        assert removed.tolist() == [float(patch not in order[:kept]) for patch in range(len(row))]
        assert [order[place] for place in restore.tolist()] == list(range(num_patches))


def test_noise_is_the_hash_of_its_keys():
    epoch, sample = torch.tensor([0, 3, 3]), torch.tensor([5, 0, 1_281_166])
    noise = mask_noise(7, epoch, sample, 196)
    for n in range(3):
        bits = hash64(Purpose.MASK, 7, int(epoch[n]), int(sample[n]), np.arange(196))
        expected = (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
        np.testing.assert_array_equal(noise[n].numpy(), expected)
    assert noise.dtype == torch.float32 and noise.min() >= 0 and noise.max() < 1


def test_noise_values_never_change():
    # A run that goes on after an upgrade must see the same masks.
    noise = mask_noise(0, torch.tensor([0]), torch.tensor([0]), 4) * 2**24
    assert noise.tolist() == [[7167509, 5905489, 2064869, 12685880]]


@given(
    cuts=st.lists(st.integers(0, 24), max_size=5),
    order=st.permutations(range(24)),
    num_patches=st.sampled_from([4, 64, 196]),
)
@settings(deadline=None, max_examples=30)
def test_noise_of_a_sample_is_the_same_in_any_batch(cuts, order, num_patches):
    epoch, sample = torch.arange(24) // 10, torch.arange(24) * 1_000_003
    whole = mask_noise(11, epoch, sample, num_patches)
    pieces = np.split(np.array(order), sorted(cuts))
    for piece in map(torch.from_numpy, pieces):
        assert torch.equal(mask_noise(11, epoch[piece], sample[piece], num_patches), whole[piece])


def test_masks_are_uniform_and_change_with_every_key():
    count, num_patches = 20_000, 64
    sample, epoch = torch.arange(count), torch.zeros(count, dtype=torch.int64)

    def kept(seed: int, epoch: torch.Tensor) -> torch.Tensor:
        return 1 - random_masking(mask_noise(seed, epoch, sample, num_patches), 0.75)[1]

    first = kept(0, epoch)
    deviation = (0.25 * 0.75 / count) ** 0.5
    assert (first.mean(0) - 0.25).abs().max() < 4.5 * deviation
    # Two patches stay together as often as in draws without replacement.
    together = (first.T @ first / count)[~torch.eye(num_patches, dtype=torch.bool)]
    assert (together - 16 * 15 / (64 * 63)).abs().max() < 5.5 * (0.06 * 0.94 / count) ** 0.5
    # Neighbouring samples, other epochs and other seeds have masks of their own.
    for other in (first.roll(1, 0), kept(0, epoch + 1), kept(1, epoch)):
        overlap = (first * other).mean()
        assert abs(overlap - 0.25**2) < 5 * (0.06 * 0.94 / count / num_patches) ** 0.5
