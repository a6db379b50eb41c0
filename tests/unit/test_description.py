"""The descriptions that weights hold: our exports, folders of timm and of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mae_scale.data.transforms import eval_crop
from mae_scale.errors import UserError
from mae_scale.models import build_classifier, hugging_face, timm_form
from mae_scale.models.description import FACTS, Description, describe, facts_of
from mae_scale.tasks.trained import read_any

NAME = "mae_vit_tiny_patch16"
SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 6}
CLASSES = ["ant", "bee", "cat"]


def model(**more: Any) -> Any:
    with torch.device("meta"):
        return build_classifier(NAME, 3, **SIZES, **more)


def folder_of(path: Path, **files: Any) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def fits(found: Description, **more: Any) -> bool:
    with torch.device("meta"):
        again = build_classifier(str(found.name), 3, **{**found.encoder_sizes(), **more})
    shapes = [(k, v.shape) for k, v in again.state_dict().items()]
    block: Any = again.blocks[0]
    return block.attn.num_heads == 6 and shapes == [
        (k, v.shape) for k, v in model(**more).state_dict().items()
    ]


def test_timm(tmp_path: Path) -> None:
    name, kwargs = timm_form.arguments(NAME, model(mlp_ratio=3))
    config = timm_form.config(name, kwargs, model(mlp_ratio=3), CLASSES, {"crop_pct": 0.9})
    found = describe(folder_of(tmp_path / "timm", config=config))
    assert (found.crop_ratio, found.classes) == (0.9, CLASSES)
    assert fits(found, mlp_ratio=3)
    theirs = {"architecture": "vit_large_patch14_clip_224", "pretrained_cfg": {"crop_pct": 1.0}}
    found = describe(folder_of(tmp_path / "hub", config=theirs))
    assert found == Description("mae_vit_large_patch16", {}, 1.0, [])


@pytest.mark.parametrize("ratio", [0.875, 0.9, 1.0, 224 / 235])
def test_hugging_face(tmp_path: Path, ratio: float) -> None:
    config = hugging_face.classifier_config(model(pool="token"), CLASSES)
    short = int(48 / ratio)
    processor = {"do_center_crop": True, "size": {"shortest_edge": short},
                 "crop_size": {"height": 48, "width": 48}}  # fmt: skip
    folder = folder_of(tmp_path / "hf", config=config, preprocessor_config=processor)
    found = describe(folder)
    assert found.classes == CLASSES and fits(found, pool="token")
    assert found.crop_ratio is not None
    image = torch.randint(0, 255, (3, 80, 100), dtype=torch.uint8)
    assert torch.equal(eval_crop(image, 48, found.crop_ratio), eval_crop(image, 48, ratio))


def test_numbers_as_labels_are_no_names(tmp_path: Path) -> None:
    config = {"hidden_size": 768, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    assert describe(folder_of(tmp_path / "hf", config=config)).classes == []


def test_the_card_of_an_export(tmp_path: Path) -> None:
    facts = facts_of(NAME, model(), 0.95)
    front = yaml.safe_dump({"tags": ["mae-scale"], FACTS: facts})
    (tmp_path / "weights.md").write_text(f"---\n{front}---\n\n# A card\n")
    found = describe(tmp_path / "weights.pth")
    assert found == Description(NAME, {"num_heads": 6}, 0.95, [])
    assert describe(str(tmp_path / "other.pth")) == Description()


@pytest.mark.parametrize("content", ['{"architecture": 3}', '{"hidden_size": "x"}'])
def test_other_content_says_nothing_wrong(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert describe(tmp_path).crop_ratio is None


@pytest.mark.parametrize(("content", "says"), [("{", "is not JSON"), ("[1]", "is no record")])
def test_a_damaged_config(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=says):
        describe(tmp_path)


def test_weights_with_other_heads_are_refused(tmp_path: Path) -> None:
    weights = build_classifier(NAME, 3, **SIZES)
    torch.save({"model": weights.state_dict()}, tmp_path / "w.pth")
    front = yaml.safe_dump({FACTS: facts_of(NAME, weights, None)})
    (tmp_path / "w.md").write_text(f"---\n{front}---\n")
    assert read_any(tmp_path / "w.pth", weights).keys() == weights.state_dict().keys()
    other = build_classifier(NAME, 3, **{**SIZES, "num_heads": 3})
    with pytest.raises(UserError, match="6 attention heads, num_heads of the model is 3; set it"):
        read_any(tmp_path / "w.pth", other)


@pytest.mark.parametrize("front", ["date: 2020-99-99", "[" * 5000, "a: [", "- 1", "a: \xff"])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path, front: str) -> None:
    (tmp_path / "w.md").write_bytes(f"---\n{front}\n---\n".encode("latin-1"))
    assert describe(tmp_path / "w.pth") == Description()
