"""Weights of classes in the loss of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_shards import make_shards

from mae_scale.config.classification import FinetuneConfig
from mae_scale.config.parsing import parse
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.tasks.finetune import class_weights


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Make 12 samples of ten classes: two each of classes 0 and 1, one each of the others."""
    return open_shards(make_shards(tmp_path / "train", [b"x"] * 12, [12]))


def test_balanced_classes_count_as_much_as_each_other(shards: ShardSet) -> None:
    weight = class_weights("balanced", shards)
    assert weight is not None
    assert weight.tolist() == pytest.approx([0.6, 0.6] + [1.2] * 8)
    assert weight[shards.index["label"].astype(int)].mean() == pytest.approx(1)
    assert class_weights(None, shards) is None


def test_a_list_as_it_is_given_on_the_command_line(shards: ShardSet) -> None:
    command = ["--run_dir", "r", "--data.train", "t", "--train.class_weights"]
    values = [float(i) for i in range(10)]
    config = parse(FinetuneConfig, [*command, str(values)], "finetune")
    given = class_weights(config.train.class_weights, shards)
    assert torch.equal(given, torch.arange(10.0))
    config = parse(FinetuneConfig, [*command, "balanced"], "finetune")
    assert config.train.class_weights == "balanced"
    for wrong in ("[-1, 1]", "even", "[1, .inf]"):
        with pytest.raises(UserError, match=r"train\.class_weights"):
            parse(FinetuneConfig, [*command, wrong], "finetune")
    with pytest.raises(UserError, match="has 2 values; expected one for each of the 10 classes"):
        class_weights([1.0, 2.0], shards)
    with pytest.raises(UserError, match="not all of them 0"):
        class_weights([0.0] * 10, shards)
