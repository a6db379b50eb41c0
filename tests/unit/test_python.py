"""The names that `mae_scale` offers in Python, such as in a notebook."""

from __future__ import annotations

import inspect
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import mae_scale
from mae_scale.cli import main
from mae_scale.config.classification import ClassifierConfig
from mae_scale.config.pretraining import ModelConfig
from mae_scale.errors import UserError

TINY = {"img_size": 32, "patch_size": 8, "depth": 1, "decoder_depth": 1}


@pytest.mark.parametrize("kind", [str, Path])
def test_folders_are_taken_as_text_or_path(shards: Path, kind: type) -> None:
    folder = kind(shards)
    opened = mae_scale.open_shards(folder)
    batch = next(iter(mae_scale.TrainLoader(folder, img_size=32, global_batch_size=4)))
    again = next(iter(mae_scale.TrainLoader(opened, img_size=32, global_batch_size=4)))
    assert torch.equal(batch["image"], again["image"])
    assert next(iter(mae_scale.EvalLoader(folder, 32, 3)))["label"].shape == (3,)
    assert len(mae_scale.ShardDataset(folder)) == len(opened)


def test_shards_are_shown_on_one_line(shards: Path) -> None:
    text = repr(mae_scale.open_shards(shards))
    assert "\n" not in text and len(text) < 250
    assert f"{shards}" in text and "250 samples of 250 classes" in text


@pytest.mark.parametrize("kind", [str, Path])
def test_weights_are_read_from_files_and_folders(tmp_path: Path, kind: type) -> None:
    model = mae_scale.build_mae("mae_vit_tiny_patch16", **TINY)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    for place in (tmp_path, tmp_path / "model.pth"):
        state = mae_scale.read_weights(kind(place))
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="there is no file or folder"):
        mae_scale.read_weights(kind(tmp_path / "other"))


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
def test_a_model_draws_its_noise_itself(sampling: str) -> None:
    model = mae_scale.build_mae("mae_vit_tiny_patch16", mask_sampling=sampling, **TINY)
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(1)
    loss, _, mask = model(images)
    torch.manual_seed(1)
    assert torch.equal(mask, model(images)[2])
    assert loss.isfinite() and mask.sum(1).tolist() == [12, 12, 12]
    if sampling != "grid":
        assert not torch.equal(mask, model(images)[2])
    picture, pixels = model.reconstruct(images)
    assert picture.shape == images.shape and pixels.mean() == 0.75


@pytest.mark.parametrize("kind", ["mae", "classifier"])
def test_images_that_a_model_cannot_take_get_one_line(kind: str) -> None:
    if kind == "mae":
        model: Any = mae_scale.build_mae("mae_vit_tiny_patch16", **TINY)
    else:
        model = mae_scale.build_classifier("mae_vit_tiny_patch16", 3, img_size=32, depth=1)
    good = torch.randn(2, 3, 32, 32)
    for images, message in (
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"uint8, .* mae_scale\.normalize"),
        (good[0], r"\[3, 32, 32\], expected \[B, 3, 32, 32\]; images\[None\] is a batch"),
        (torch.randn(2, 3, 48, 48), r"\[2, 3, 48, 48\], expected \[B, 3, 32, 32\]"),
        (torch.randn(2, 1, 32, 32), r"\[2, 1, 32, 32\], expected \[B, 3, 32, 32\]"),
        (good.numpy(), "must be a tensor, not ndarray"),
    ):
        with pytest.raises(UserError, match=message) as error:
            model(images)
        assert "\n" not in str(error.value)
    assert torch.isfinite(model(mae_scale.normalize((good * 99).to(torch.uint8)))[0]).all()
    if kind == "mae":
        for noise in (0.75, torch.rand(2, 15)):
            with pytest.raises(UserError, match=r"tensor \[2, 16\], .* argument mask_ratio"):
                model(good, noise)


def test_misspelt_arguments_get_one_line() -> None:
    with pytest.raises(UserError, match=r"'mask_ration'; did you mean 'mask_ratio'\?"):
        mae_scale.build_mae("mae_vit_tiny_patch16", mask_ration=0.5)
    with pytest.raises(UserError, match=r"'drop_paths'; did you mean 'drop_path'\?"):
        mae_scale.build_classifier("mae_vit_tiny_patch16", 3, drop_paths=0.1)


def test_what_is_public() -> None:
    assert set(dir(mae_scale)) == {"__version__", *mae_scale.__all__}
    assert all(getattr(mae_scale, name) for name in dir(mae_scale))


def test_defaults_differ_from_those_of_a_recipe_where_the_docstring_says_so() -> None:
    built = inspect.signature(mae_scale.models.MaskedAutoencoderViT).parameters
    own = {name: value.default for name, value in built.items()}
    config = {k: v for k, v in ModelConfig().model_dump().items() if v is not None and k in own}
    assert {"mask_ratio", "target", "img_size"} < config.keys()
    assert {key for key, value in config.items() if value != own[key]} == {"norm_pix_loss"}
    assert "norm_pix_loss=True" in (mae_scale.build_mae.__doc__ or "")
    built = inspect.signature(mae_scale.models.Classifier).parameters
    section = ClassifierConfig().model_dump()
    assert all(section[k] in (None, v.default) for k, v in built.items() if k in section)


def test_the_examples_of_the_documentation(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "SHARDS").mkdir()
    (tmp_path / "SHARDS" / "train").symlink_to(shards)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text("run_dir: x\n")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 6
    for example in examples:
        exec(compile(example.replace("workers=4", "workers=0"), "api.md", "exec"), {})


def test_status_writes_into_a_notebook(tmp_path: Path) -> None:
    """A notebook's stdout, like a StringIO, cannot be reconfigured."""
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    with redirect_stdout(io.StringIO()) as shown:
        code = main(["status", str(tmp_path)])
    assert code == 0 and "not started" in shown.getvalue()


def test_a_command_gives_its_exit_code(tmp_path: Path) -> None:
    assert main(["status", str(tmp_path)]) == 2
