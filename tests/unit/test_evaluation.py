"""The numbers of evaluation: ranks of labels, outputs for other sets' classes, corruption
errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make_shards import make_shards

from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError
from mae_scale.inference.evaluate import ALEXNET_ERRORS, corruption_errors, outputs_of
from mae_scale.tasks.classification import classes_of, matched
from mae_scale.train.validation import Scores, rank_of_label


def test_the_rank_of_a_label_is_its_place_in_a_sort() -> None:
    logits, labels = torch.randn(64, 10), torch.randint(0, 10, (64,))
    order = logits.argsort(dim=1, descending=True)
    expected = (order == labels[:, None]).int().argmax(dim=1)
    assert torch.equal(rank_of_label(logits, labels), expected)


def test_ties_and_nan_make_no_image_right() -> None:
    same = torch.zeros(3, 4)
    assert rank_of_label(same, torch.tensor([0, 1, 3])).tolist() == [0, 1, 3]
    for bad in (torch.nan, torch.inf):
        logits = torch.tensor([[1.0, bad, 0.0]])
        assert rank_of_label(logits, torch.tensor([1])).item() == 3


def test_scores_are_percentages_over_all_images() -> None:
    counts = torch.tensor([[2, 0, 6], [1, 0, 6], [2, 0, 6]])
    scores = Scores(*counts, loss=0.5)
    assert scores.row() == {"images": 8, "top1": 87.5, "top5": 100.0, "loss": 0.5}
    assert scores.per_class() == [50.0, None, 100.0]


@pytest.fixture
def ten(tmp_path: Path):  # type: ignore[no-untyped-def]
    return open_shards(make_shards(tmp_path / "s", [b"x"] * 20, [20]))


def test_classes_are_matched_by_name(ten) -> None:  # type: ignore[no-untyped-def]
    wnids = [f"n{number:03d}" for number in range(30)]
    subset = replace(ten, classes=wnids[::3])
    columns, label_of = outputs_of(subset, wnids)
    assert columns.tolist() == list(range(30)) and label_of.tolist() == list(range(0, 30, 3))
    columns, label_of = outputs_of(subset, wnids, of_data=True)
    assert columns.tolist() == list(range(0, 30, 3)) and label_of.tolist() == list(range(10))
    backwards = replace(ten, classes=wnids[::3][::-1])
    columns, label_of = outputs_of(backwards, wnids, of_data=True)
    assert columns.tolist() == list(range(0, 30, 3)) and label_of.tolist() == [*range(9, -1, -1)]


def test_classes_that_are_numbers_mean_outputs(ten) -> None:  # type: ignore[no-untyped-def]
    """ImageNet-V2's folders 0 to 999 sort as strings (0, 1, 10, 100, ...) and still mean those
    outputs."""
    numbers = sorted(str(number) for number in range(12))
    v2 = replace(ten, classes=numbers)
    columns, label_of = outputs_of(v2, [f"n{number:03d}" for number in range(12)])
    assert columns.tolist() == list(range(12))
    assert [numbers[i] for i in range(12)] == [str(label) for label in label_of.tolist()]
    _, by_name = outputs_of(v2, numbers)  # the classifier's own outputs are sorted as strings, too
    assert by_name.tolist() == list(range(12))


def test_classes_that_the_classifier_does_not_have(ten) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"10 of 10 classes .* the classifier's 2: '0', '1'"):
        outputs_of(ten, ["a", "b"])


def test_labels_outside_of_the_classes(ten) -> None:  # type: ignore[no-untyped-def]
    assert classes_of(ten) == [str(number) for number in range(10)]
    with pytest.raises(UserError, match=r"labels from 0 to 9, but 9 classes"):
        classes_of(replace(ten, classes=ten.classes[:9]))
    index = ten.index.copy()
    index["label"][3] = -1
    with pytest.raises(UserError, match=r"labels from -1 to 9"):
        classes_of(replace(ten, index=index))


def test_alexnet_has_a_mean_corruption_error_of_100() -> None:
    alexnet = {
        f"{corruption}/{severity}": 100 * (1 - error)
        for corruption, error in ALEXNET_ERRORS.items()
        for severity in range(1, 6)
    }
    found = corruption_errors(alexnet)
    assert len(found["ce"]) == 15
    assert found["mce"] == pytest.approx(100)
    better = {key: value + 0.5 * (100 - value) for key, value in alexnet.items()}
    assert corruption_errors(better)["mce"] == pytest.approx(50)


def test_validation_matches_classes_by_name(ten) -> None:  # type: ignore[no-untyped-def]
    names = ten.classes
    assert matched(ten, names) is None
    wanted = matched(ten, [*reversed(names), "more"])
    assert wanted is not None and wanted.tolist() == list(reversed(range(10)))
    accents = ["Cafe\u0301", *names[1:]]
    assert matched(replace(ten, classes=accents), ["Caf\u00e9", *names[1:]]) is None
    with pytest.raises(UserError, match=r"1 of 10 classes .* 'Caf\\xe9'"):
        matched(replace(ten, classes=accents), names)
