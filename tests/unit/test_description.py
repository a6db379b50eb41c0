"""The descriptions that weights hold: our exports, folders of timm and of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mae_scale.config.classification import FinetuneConfig
from mae_scale.config.parsing import parse
from mae_scale.data.transforms import eval_crop
from mae_scale.errors import UserError
from mae_scale.models import build_classifier, build_mae, hugging_face, timm_form
from mae_scale.models.description import FACTS, Description, describe, facts_of
from mae_scale.tasks.classification import initial_weights
from mae_scale.tasks.trained import bands_of, grid_in, read_any

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
        again = build_classifier(str(found.name), 3, **{**found.sizes_for({}), **more})
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
    assert found.mean is None
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
    facts = facts_of(NAME, model(), crop_ratio=0.95, classes=CLASSES)
    front = yaml.safe_dump({"tags": ["mae-scale"], FACTS: facts})
    (tmp_path / "weights.md").write_text(f"---\n{front}---\n\n# A card\n")
    found = describe(tmp_path / "weights.pth")
    assert found == Description(NAME, {"img_size": 48, "num_heads": 6}, 0.95, CLASSES)
    assert describe(str(tmp_path / "other.pth")) == Description()


def test_the_card_of_wide_images_of_five_bands(tmp_path: Path) -> None:
    wide = {"img_size": (16, 64), "patch_size": 8, "depth": 1, "decoder_depth": 1, "in_chans": 5}
    weights = build_mae(NAME, **wide, mask_ratio=0.5, target="pca", pca_components=7)
    range_of_each = [[0, 10 + band] for band in range(5)]
    facts = facts_of(NAME, weights, switches={"mask_ratio": 0.5, "target": "pca", "name": NAME,
                                              "pca_components": 7, "norm_pix_loss": False},
                     mean=[0.5] * 5, std=[0.25] * 5, value_range=range_of_each)  # fmt: skip
    (tmp_path / "w.md").write_text(f"---\n{yaml.safe_dump({FACTS: facts})}---\n")
    found = describe(tmp_path / "w.pth")
    sizes = found.sizes_for(weights.state_dict(), decoder=True)
    again = build_mae(NAME, **found.switches, **sizes)
    again.load_state_dict(weights.state_dict())
    assert again.grid == (2, 8) == grid_in(sizes) and again.mask_ratio == 0.5
    bands = bands_of(tmp_path, found, sizes)
    assert (bands.count, bands.mean[4], bands.value_range[4]) == (5, 0.5, (0, 14))
    # Sizes that the weights contradict do not count, and a grid of 16 patches is 4 x 4 then.
    other = Description(NAME, {"img_size": (16, 48)})
    assert other.sizes_for(weights.state_dict())["img_size"] == 32
    with pytest.raises(UserError, match="images of 5 bands, and does not say how"):
        bands_of(tmp_path, other, sizes)


def test_other_values_than_those_of_the_weights_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = build_classifier(NAME, 3, **SIZES)
    torch.save({"model": weights.state_dict()}, tmp_path / "w.pth")
    own = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    front = yaml.safe_dump({FACTS: facts_of(NAME, weights, **own)})
    for card, given, warns in ((front, [], True), (front, own, False), ("a: 1", own, False)):
        (tmp_path / "w.md").write_text(f"---\n{card}\n---\n")
        keys = [f"--data.{key}={value}" for key, value in dict(given).items()]
        words = ["--run_dir=r", "--data.train=s", f"--weights={tmp_path / 'w.pth'}", *keys]
        config = parse(FinetuneConfig, words, "finetune")
        caplog.clear()
        read = initial_weights(config, weights)
        assert read is not None and read().keys() == weights.state_dict().keys()
        assert ("normalised by data.mean [0.5, 0.5, 0.5]" in caplog.text) is warns


@pytest.mark.parametrize(
    "facts",
    [
        {"mask_ratio": 2.0, "target": ["pca"], "norm_pix_loss": 1, "pca_components": True},
        {"mean": [0.5, "x"], "std": [float("nan")] * 3, "value_range": [[0, 1], 2]},
        {"img_size": [0, 8], "classes": [1, 2], "value_range": [3, 3]},
        {"img_size": True, "mean": 3, "std": [], "value_range": {"a": 1}},
    ],
)
def test_facts_out_of_their_range_count_as_unknown(tmp_path: Path, facts: dict[str, Any]) -> None:
    (tmp_path / "w.md").write_text(f"---\n{yaml.safe_dump({FACTS: facts})}---\n")
    assert describe(tmp_path / "w.pth") == Description()


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
    front = yaml.safe_dump({FACTS: facts_of(NAME, weights)})
    (tmp_path / "w.md").write_text(f"---\n{front}---\n")
    assert read_any(tmp_path / "w.pth", weights).keys() == weights.state_dict().keys()
    other = build_classifier(NAME, 3, **{**SIZES, "num_heads": 3})
    with pytest.raises(UserError, match=r"of another size; set model.num_heads 6"):
        read_any(tmp_path / "w.pth", other)


@pytest.mark.parametrize("front", ["date: 2020-99-99", "[" * 5000, "a: [", "- 1", "a: \xff"])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path, front: str) -> None:
    (tmp_path / "w.md").write_bytes(f"---\n{front}\n---\n".encode("latin-1"))
    assert describe(tmp_path / "w.pth") == Description()
