"""Weights of the authors, timm and Hugging Face go into the classifier; errors name the keys."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from mae_scale.errors import UserError
from mae_scale.models import MODELS, Classifier, build_classifier, build_mae, timm_form
from mae_scale.models.hugging_face import from_hugging_face, to_hugging_face
from mae_scale.models.mae import MaskedAutoencoderViT
from mae_scale.models.weights import fit_to_classifier, fit_to_mae, read_weights, sizes_of

SIZES = {"img_size": 32, "patch_size": 8, "depth": 2}
HF = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 32,
    "patch_size": 8,
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def classifier(**overrides: object) -> Classifier:
    return build_classifier("mae_vit_tiny_patch16", **{"num_classes": 5, **SIZES, **overrides})


def features(model: Classifier) -> torch.Tensor:
    """Give the features [2, 17, 192] of all tokens after the blocks."""
    x = model.prepend_cls_token(model.embed_patches(IMAGES))
    return model.run_blocks(model.blocks, x)


@pytest.mark.parametrize("with_decoder", [True, False])
def test_the_authors_pretrained_files(tmp_path: Path, with_decoder: bool) -> None:
    mae = build_mae("mae_vit_tiny_patch16", **SIZES)
    state = {
        key: value
        for key, value in mae.state_dict().items()
        if with_decoder or not key.startswith(("decoder_", "mask_token"))
    }
    torch.save({"model": state, "epoch": 800}, tmp_path / "mae.pth")
    model = classifier()
    fitting = fit_to_classifier(read_weights(tmp_path / "mae.pth"), model)
    result = model.load_state_dict(fitting, strict=False)
    assert result.missing_keys == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert not result.unexpected_keys
    torch.testing.assert_close(model.blocks[1].mlp.fc1.weight, mae.blocks[1].mlp.fc1.weight)
    token = classifier(pool="token", head="probe")
    fitting = fit_to_classifier(state, token)
    assert "norm.weight" in fitting and not any(key.startswith("head.") for key in fitting)


def test_timms_folder_and_file(tmp_path: Path) -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, global_pool="avg", **SIZES
    ).eval()
    timm.models.save_for_hf(theirs, tmp_path)
    save_file(theirs.state_dict(), tmp_path / "mine.safetensors")
    for path in (tmp_path, tmp_path / "mine.safetensors"):
        model = classifier().eval()
        model.load_state_dict(fit_to_classifier(read_weights(path), model, whole=True))
        torch.testing.assert_close(model(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 2])
def test_hugging_faces_mae(tmp_path: Path, shards: int) -> None:
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**HF, mask_ratio=0.0, layer_norm_eps=1e-6)).eval()
    theirs.save_pretrained(tmp_path)
    if shards == 2:  # sharded as large models are
        state = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        names = sorted(state)
        parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
        for file, keys in parts.items():
            save_file({key: state[key] for key in keys}, tmp_path / file)
        index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = classifier(pool="token").eval()
    fitting = fit_to_classifier(read_weights(tmp_path), model)
    assert set(model.state_dict()) - set(fitting) == {"head.weight", "head.bias"}
    model.load_state_dict(fitting, strict=False)
    noise = torch.arange(16.0).expand(2, -1)  # keeps all patches, in order
    expected = theirs.vit(IMAGES, noise=noise).last_hidden_state
    torch.testing.assert_close(model.norm(features(model)), expected, rtol=1e-4, atol=1e-5)


def mae(**overrides: object) -> MaskedAutoencoderViT:
    return build_mae("mae_vit_tiny_patch16", **{**SIZES, "decoder_depth": 2, **overrides})


def test_hugging_faces_mae_with_its_decoder(tmp_path: Path) -> None:
    """Weights are read as transformers 5 saves them and under the names of the published files."""
    config = ViTMAEConfig(
        **HF,
        decoder_hidden_size=128,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=512,
        layer_norm_eps=1e-6,
    )
    theirs = ViTMAEForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {key.replace("decoder_encoder.layer.", "decoder_layers."): v for key, v in state.items()}
    save_file(old, tmp_path / "old.safetensors")
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(IMAGES, noise=noise).logits
        for path in (tmp_path, tmp_path / "old.safetensors"):
            model = mae().eval()
            model.load_state_dict(fit_to_mae(read_weights(path), model, whole=True))
            torch.testing.assert_close(model(IMAGES, noise)[1], expected, rtol=0, atol=1e-5)
    assert to_hugging_face(from_hugging_face(old)).keys() == old.keys()


def test_fixed_positions_of_another_resolution_are_computed_and_trained_ones_interpolated() -> None:
    target = mae(img_size=64)
    fixed = mae().state_dict()
    fitted = fit_to_mae(fixed, target)
    assert fitted.keys() == fixed.keys() - {"pos_embed", "decoder_pos_embed"}
    trained = {**fixed, "pos_embed": torch.randn(1, 17, 192)}
    fitted = fit_to_mae(trained, target)
    assert fitted.keys() == fixed.keys() - {"decoder_pos_embed"}
    assert fitted["pos_embed"].shape == (1, 65, 192)
    assert torch.equal(fitted["pos_embed"][:, 0], trained["pos_embed"][:, 0])
    same = fit_to_mae(trained, mae())
    assert torch.equal(same["pos_embed"], trained["pos_embed"]) and "decoder_pos_embed" in same


def test_what_a_masked_autoencoder_takes_of_other_weights() -> None:
    whole = mae().state_dict()
    encoder = {k: v for k, v in whole.items() if not k.startswith(("decoder_", "mask_token"))}
    assert fit_to_mae(encoder, mae()).keys() == encoder.keys()
    assert fit_to_mae(classifier(pool="token").state_dict(), mae()).keys() == encoder.keys()
    fitted = fit_to_mae(classifier().state_dict(), mae())
    assert encoder.keys() - fitted.keys() == {"norm.weight", "norm.bias"}
    for state, target, whole_asked, message in (
        (encoder, {}, True, "they have no decoder, which reconstructs"),
        (whole, {"decoder_depth": 3}, False, "missing: decoder_blocks.2.norm1.weight, .* 8 more"),
        (whole, {"decoder_depth": 1}, False, "not known to the model: decoder_blocks.1.norm1"),
        (whole, {"decoder_embed_dim": 64}, False, r"mask_token is \[1, 1, 128\], expected"),
        (whole, {"patch_size": 4, "img_size": 16}, False, r"decoder_pred.weight is \[192, 128\]"),
        ({k: v for k, v in encoder.items() if not k.startswith("norm.")}, {}, False,
         "missing: norm.weight, norm.bias"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            fit_to_mae(state, mae(**target), whole=whole_asked)
        assert "--new_head" not in str(error.value)


def test_the_sizes_that_weights_show() -> None:
    own = {**SIZES, "embed_dim": 192, "mlp_ratio": 4}
    expected = {**own, "decoder_embed_dim": 128, "decoder_depth": 2}
    assert sizes_of(mae().state_dict()) == expected
    assert sizes_of(classifier().state_dict()) == own
    for width, ratio in ((192, 2.6), (100, 0.57), (52, 4.1), (12, 0.1)):  # the MLPs round it down
        sizes = {"embed_dim": width, "num_heads": 1, "mlp_ratio": ratio, "decoder_embed_dim": 76}
        state = mae(**sizes).state_dict()
        again = mae(**{**sizes, **sizes_of(state)}).state_dict()
        assert [v.shape for v in again.values()] == [v.shape for v in state.values()]
    assert sizes_of({"fc.weight": torch.zeros(2, 2)}) == {}


@pytest.mark.parametrize("name", MODELS)
def test_timm_has_every_model_at_its_own_sizes(name: str) -> None:
    with torch.device("meta"):
        pretrained, tuned = build_mae(name), build_classifier(name, 1000)
    for model, usual in ((pretrained, (0, "token")), (tuned, (1000, "avg"))):
        theirs, kwargs = timm_form.arguments(name, model)
        assert kwargs == {"num_classes": usual[0], "global_pool": usual[1]}
        kept = timm_form.to_timm(model.state_dict(), theirs, kwargs)
        left = {key for key in model.state_dict() if key not in kept}
        assert all(key.startswith(("decoder_", "mask_token")) for key in left)


def test_a_folded_probe_computes_the_same() -> None:
    model = classifier(pool="token", head="probe").double().eval()
    model.head[0].running_mean.normal_()
    model.head[0].running_var.uniform_(0.01, 4)
    state = {key: value.float() for key, value in model.state_dict().items()}
    folded = timm_form.fold_probe(state, model.head[0].eps)
    features = torch.randn(4, 192, dtype=torch.float64)
    found = features @ folded["head.weight"].double().T + folded["head.bias"]
    torch.testing.assert_close(found, model.head[1](model.head[0](features)), rtol=1e-5, atol=1e-5)
    assert not any(key.startswith(("head.0", "head.1")) for key in folded)


def test_hugging_faces_classifier(tmp_path: Path) -> None:
    theirs = ViTForImageClassification(ViTConfig(**HF, num_labels=5, layer_norm_eps=1e-6)).eval()
    theirs.save_pretrained(tmp_path)
    model = classifier(pool="token").eval()
    model.load_state_dict(fit_to_classifier(read_weights(tmp_path), model, whole=True))
    torch.testing.assert_close(model(IMAGES), theirs(IMAGES).logits, rtol=1e-4, atol=1e-5)


def test_another_resolution_interpolates_the_positions() -> None:
    """From 224 to 448 pixels positions equal bicubic interpolation as the official code does it."""
    model = build_classifier("mae_vit_tiny_patch16", 5, img_size=448, depth=1)
    state = build_classifier("mae_vit_tiny_patch16", 5, img_size=224, depth=1).state_dict()
    state["pos_embed"] = torch.randn(1, 197, 192)
    fitted = fit_to_classifier(state, model)["pos_embed"]
    assert fitted.shape == (1, 785, 192)
    assert torch.equal(fitted[:, 0], state["pos_embed"][:, 0])

    def kernel(x: float) -> float:  # Keys' cubic with a = -0.75, PyTorch's
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weights = torch.zeros(28, 14, dtype=torch.float64)
    for out in range(28):
        at = (out + 0.5) * 14 / 28 - 0.5  # align_corners=False: centres of pixels meet
        for tap in range(int(at // 1) - 1, int(at // 1) + 3):
            weights[out, min(max(tap, 0), 13)] += kernel(at - tap)
    old = state["pos_embed"][0, 1:].double().view(14, 14, 192)
    expected = torch.einsum("yi,xj,ijc->yxc", weights, weights, old).reshape(784, 192)
    torch.testing.assert_close(fitted[0, 1:].double(), expected, rtol=1e-4, atol=1e-5)


def test_only_tensors_are_unpickled(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["\udcff.pth", "\udcff.safetensors"])
def test_a_path_that_is_not_utf8_gets_a_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights"
    state = build_mae("mae_vit_tiny_patch16", depth=1, decoder_depth=1).state_dict()
    torch.save(state, path) if name.endswith(".pth") else save_file(state, path)
    with pytest.raises(UserError, match=r"is not (valid )?UTF-8"):
        read_weights(path.rename(tmp_path / name))


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_the_authors_program_and_of_old_pytorch(
    tmp_path: Path, zipped: bool
) -> None:
    state = classifier().state_dict()
    content = {"model": state, "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    assert read_weights(tmp_path / "c.pth").keys() == state.keys()


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda state: {f"module.{k}": v for k, v in state.items()}, "module."),
        (lambda state: {"model": {f"_orig_mod.{k}": v for k, v in state.items()}}, "_orig_mod."),
        (lambda state: {"module": {f"module.model.{k}": v for k, v in state.items()}}, "model."),
        (lambda state: {k.replace("blocks.1.", "blocks.1._orig_mod."): v
                        for k, v in state.items()}, "_orig_mod."),
        (lambda state: {"state_dict": {"loss.weight": torch.ones(3),
                                       **{f"model.{k}": v for k, v in state.items()}}},
         "1 others are left out: loss.weight"),
        (lambda state: {"student": {"a": torch.ones(1)},
                        "teacher": {"head.mlp.0.weight": torch.ones(3, 3),
                                    **{f"module.backbone.{k}": v for k, v in state.items()}}},
         "module.backbone.; 1 others are left out: head.mlp.0.weight"),
        (lambda state: {"model": {prefix + k: v for k, v in state.items()
                                  for prefix in ("student.", "teacher.backbone.")}},
         "teacher.backbone."),
    ],
)  # fmt: skip
def test_prefixes_of_wrappers_are_taken_off_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrap: Any, says: str
) -> None:
    state = classifier().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    with caplog.at_level("INFO", "mae_scale"):
        found = read_weights(tmp_path / "w.pth")
    assert found.keys() == state.keys() and says in caplog.text
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_weights_of_several_models_and_weights_that_are_not_finite(tmp_path: Path) -> None:
    state = classifier().state_dict()
    both = {
        prefix + key: value for key, value in state.items() for prefix in ("model.", "teacher.")
    }
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(UserError, match=r"several models, .* 'model.' and 'teacher.'"):
        read_weights(tmp_path / "both.pth")
    kept = {f"backbone.{key}": value for key, value in state.items()}
    save_file(kept, tmp_path / "kept.safetensors")
    assert read_weights(tmp_path / "kept.safetensors", keep="backbone.").keys() == kept.keys()
    assert read_weights(tmp_path / "kept.safetensors").keys() == state.keys()
    for value, dtype in ((torch.nan, torch.float32), (-torch.inf, torch.bfloat16)):
        bad = {key: tensor.to(dtype, copy=True) for key, tensor in state.items()}
        bad["blocks.1.norm1.bias"][3] = value
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(
            UserError, match=r"bad.pth holds values that are NaN or infinite, in bl"
        ):
            read_weights(tmp_path / "bad.pth")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("text.pth", "cannot be read"),
        ("text.safetensors", "cannot be read"),
        ("list.pth", "holds a list, no state dict"),
        ("empty.pth", "holds no tensors; its keys: epoch"),
        ("folder", "holds none of model.safetensors"),
        ("nowhere.pth", "there is no file or folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_weights(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"patch_size": 4, "img_size": 16},
         r"patch_embed.proj.weight is \[192, 3, 8, 8\], expected \[192, 3, 4, 4\]"),
        ({"depth": 3}, "missing: blocks.2.norm1.weight, .* and 8 more"),
        ({"depth": 1}, "not known to the model: blocks.1.norm1.weight, .* and 8 more"),
        ({"num_classes": 6}, r"head.weight is \[5, 192\], expected \[6, 192\].*new_head true"),
        ({"head": "mlp"}, "missing: head.fc1.weight.*new_head true"),
        ({"pool": "token"}, "missing: norm.weight"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_name_the_keys(target: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_to_classifier(classifier().state_dict(), classifier(**target))


def test_a_new_head_takes_any_encoder() -> None:
    state = classifier().state_dict()
    for target in ({"num_classes": 6}, {"head": "mlp"}, {"pool": "token"}):
        fitting = fit_to_classifier(state, classifier(**target), new_head=True)
        assert not any(key.startswith(("head.", "fc_norm.", "norm.")) for key in fitting)
    with pytest.raises(UserError, match="they have no head; fine-tune them first"):
        fit_to_classifier(build_mae("mae_vit_tiny_patch16", **SIZES).state_dict(), classifier(),
                          whole=True)  # fmt: skip
