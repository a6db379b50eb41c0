"""`mae-scale export`: timm and transformers load its files and compute what our models compute."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from runs import VALIDATION_IMAGES, Run
from torch import nn

from mae_scale.cli import main
from mae_scale.data.transforms import decode_image, eval_crop, normalize
from mae_scale.models import MaskedAutoencoderViT, build_classifier, build_mae
from mae_scale.models.weights import fit_to_classifier, fit_to_mae, read_weights
from mae_scale.tasks.trained import TrainedRun
from mae_scale.train import checkpoint
from mae_scale.train.ds import deepspeed
from mae_scale.train.loading import load_weights
from mae_scale.train.records import read_metrics

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
FINETUNE = {"model.depth": 2, "train.precision": "fp32", "train.micro_batch_size": 12}
# Sizes of no published model; 2.6 x 52 and 2.6 x 76 are no whole numbers.
OWN = {"model.embed_dim": 52, "model.num_heads": 13, "model.depth": 3, "model.mlp_ratio": 2.6}
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "pretrain zero3": ("pretrain", 2, {"deepspeed": "zero3", "model.depth": 2}),
    "pretrain zero1": ("pretrain", 2, {"deepspeed": "zero1", "model.depth": 2,
                                       "model.norm_pix_loss": "false"}),
    "mean": ("finetune", 2, {**FINETUNE, "deepspeed": "zero3", "optim.ema_decay": 0.5,
                             "optim.base_lr": 0.05, "optim.warmup_epochs": 0}),
    "token": ("finetune", 1, {**FINETUNE, "model.pool": "token"}),
    "linprobe": ("linprobe", 1, {"model.depth": 2, "model.crop_ratio": 1.0,
                                 "train.micro_batch_size": 12, "optim.base_lr": 5,
                                 "optim.warmup_epochs": 0}),
    "own pretrain": ("pretrain", 1, {**OWN, "model.decoder_embed_dim": 76,
                                     "model.decoder_num_heads": 19}),
    "own token": ("finetune", 1, {**FINETUNE, **OWN, "model.pool": "token", "optim.base_lr": 0.05,
                                  "optim.warmup_epochs": 0}),
}  # fmt: skip
PRETRAINED, CLASSIFIERS = list(RUNS)[:2], list(RUNS)[2:5]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Path]:
    """Train runs of three steps, with two processes where weights are sharded."""
    folder = tmp_path_factory.mktemp("trained runs")
    for name, (task, processes, settings) in RUNS.items():
        launcher = "torchrun" if processes > 1 else ""
        settings = {**settings, "train.max_steps": 3}
        Run(folder / name, shards, settings, launcher, processes, task).finish()
    return {name: folder / name for name in RUNS}


def export(run: Path, to: str, out: Path, *options: str) -> Path:
    assert main(["export", str(run), "--to", to, str(out), *options]) == 0
    return out


def ours(run: Path, ema: bool = False) -> nn.Module:
    """Read the model of a run directly from its checkpoint."""
    trained = TrainedRun.read(checkpoint.find_checkpoint(run))
    model = trained.model()
    model.load_state_dict(trained.weights(ema))
    return model.eval()


@torch.no_grad()
def encoded(model: nn.Module) -> torch.Tensor:
    """Give the features [2, 17, 192] that a masked autoencoder's encoder computes from all
    patches."""
    x = model.prepend_cls_token(model.embed_patches(IMAGES))
    return model.norm(model.run_blocks(model.blocks, x))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32 and expected.std() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained(trained: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = ours(trained[name])
    assert isinstance(model, MaskedAutoencoderViT)
    loss, pred, mask = model(IMAGES, NOISE)

    out = export(trained[name], "huggingface", tmp_path / "hugging face")
    theirs, info = transformers.ViTMAEForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.norm_pix_loss is model.norm_pix_loss is (name == PRETRAINED[0])
    found = theirs.eval()(IMAGES, noise=NOISE)
    assert_same(found.logits, pred)
    torch.testing.assert_close(found.loss, loss, rtol=1e-6, atol=0)
    assert torch.equal(found.mask, mask)
    encoder = transformers.ViTMAEModel.from_pretrained(out, mask_ratio=0.0).eval()
    in_order = torch.arange(16.0).expand(2, -1)
    assert_same(encoder(IMAGES, noise=in_order).last_hidden_state, encoded(model))

    out = export(trained[name], "timm", tmp_path / "timm")
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0}
    file = str(out / "model.safetensors")
    loaded = timm.create_model("vit_tiny_patch16_224", **sizes)
    timm.models.load_checkpoint(loaded, file, strict=True)
    for theirs in (
        timm.create_model(f"local-dir:{out}", pretrained=True),
        timm.create_model("vit_tiny_patch16_224", checkpoint_path=file, **sizes),
        loaded,
    ):
        assert_same(theirs.eval().forward_features(IMAGES), encoded(model))
        assert_same(theirs(IMAGES), encoded(model)[:, 0])

    out = export(trained[name], "official", tmp_path / "mae.pth")
    content = torch.load(out, weights_only=True)
    assert list(content) == ["model"] and list(content["model"]) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(content["model"][key], value)
    for out in (tmp_path / "hugging face", tmp_path / "mae.pth"):  # and in again
        again = build_mae("mae_vit_tiny_patch16", img_size=32, patch_size=8, depth=2,
                          decoder_depth=1, norm_pix_loss=model.norm_pix_loss).eval()  # fmt: skip
        again.load_state_dict(fit_to_mae(read_weights(out), again, whole=True))
        assert_same(again(IMAGES, NOISE)[1], pred)


@torch.no_grad()
@pytest.mark.parametrize("name", [*CLASSIFIERS, "ema"])
def test_classifiers(trained: dict[str, Path], tmp_path: Path, name: str) -> None:
    run = trained["mean" if name == "ema" else name]
    options = ["--ema"] if name == "ema" else []
    model = ours(run, ema=name == "ema")
    logits = model(IMAGES)
    if name == "ema":
        assert not torch.equal(logits, ours(run)(IMAGES))
    pool = "avg" if model.pool == "mean" else "token"

    out = export(run, "timm", tmp_path / "timm", *options)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 250, "global_pool": pool}
    file = str(out / "model.safetensors")
    theirs = timm.create_model("vit_tiny_patch16_224", checkpoint_path=file, **sizes)
    assert_same(theirs.eval()(IMAGES), logits)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert_same(theirs.eval()(IMAGES), logits)
    data = timm.data.resolve_data_config(model=theirs)
    assert (data["input_size"], data["crop_pct"]) == (
        (3, 32, 32),
        1.0 if name == "linprobe" else 0.875,
    )
    fewer = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)
    assert fewer.eval()(IMAGES).shape == (2, 7)  # timm puts a new head on the same encoder

    export(run, "official", tmp_path / "official", *options)
    classes = json.loads((run / "classes.json").read_text())
    if pool == "token":
        out = export(run, "huggingface", tmp_path / "hugging face", *options)
        theirs, info = transformers.ViTForImageClassification.from_pretrained(
            out, output_loading_info=True
        )
        assert not any(info.values()), info
        assert_same(theirs.eval()(IMAGES).logits, logits)
        assert [theirs.config.id2label[i] for i in range(250)] == classes
    for out in sorted(tmp_path.iterdir()):  # and in again
        state = read_weights(out)
        head = "probe" if "head.1.weight" in state else "linear"
        again = build_classifier("mae_vit_tiny_patch16", 250, img_size=32, patch_size=8, depth=2,
                                 pool=model.pool, head=head).eval()  # fmt: skip
        again.load_state_dict(fit_to_classifier(state, again, whole=True))
        assert_same(again(IMAGES), logits)


@pytest.mark.parametrize("name", ["pretrain zero3", "mean"])
def test_sharded_weights_are_those_that_deepspeed_finds(
    trained: dict[str, Path], name: str
) -> None:
    folder = checkpoint.find_checkpoint(trained[name])
    found = load_weights(folder)
    convert = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
    expected = convert(str(folder.parent), tag=folder.name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], value), key


def test_hugging_faces_processor_prepares_images_as_our_evaluation(
    trained: dict[str, Path], imagenet_tree: Path, tmp_path: Path
) -> None:
    out = export(trained["token"], "huggingface", tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    file = next(imagenet_tree.rglob("*.JPEG"))
    with Image.open(file) as image:
        theirs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    expected = normalize(eval_crop(decode_image(file.read_bytes()), 32)[None])[0]
    assert theirs.shape == (3, 32, 32)
    assert (theirs - expected).abs().mean() < 0.05  # image decoders and rounding differ


def test_evaluate_and_reconstruct_take_every_form(
    trained: dict[str, Path], val_shards: Path, imagenet_tree: Path, tmp_path: Path
) -> None:
    rows = []
    for to, out in (
        ("", trained["linprobe"]),
        ("official", tmp_path / "p.pth"),
        ("timm", tmp_path / "p.safetensors"),
        ("huggingface", tmp_path / "p"),
    ):
        if to:
            export(trained["linprobe"], to, out)
        table = tmp_path / "table.json"
        data = [f"val={val_shards}", "--out", str(table), "--workers", "0"]
        assert main(["evaluate", str(out), *data]) == 0
        rows.append(json.loads(table.read_text())["sets"]["val"])
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
        assert (row["images"], row["top1"]) == (VALIDATION_IMAGES, rows[0]["top1"])

    run = trained["pretrain zero3"]
    image = str(next(imagenet_tree.rglob("*.JPEG")))
    pixels = []
    for to, out in (
        ("", run),
        ("official", tmp_path / "m.pth"),
        ("huggingface", tmp_path / "m"),
    ):
        if to:
            export(run, to, out)
        grid = tmp_path / f"grid {to}.png"
        assert main(["reconstruct", str(out), image, "--out", str(grid)]) == 0
        with Image.open(grid) as picture:
            pixels.append(np.asarray(picture.convert("RGB"))[60:].astype(int))  # not the title
    for found in pixels[1:]:
        assert np.abs(found - pixels[0]).max() <= 1


def exports(run: Path, folder: Path, forms: str) -> dict[str, Path]:
    return {"run": run, **{to: export(run, to, folder / to) for to in forms.split()}}


def test_a_model_of_own_sizes_is_read_back_from_every_form(
    trained: dict[str, Path], val_shards: Path, imagenet_tree: Path, tmp_path: Path
) -> None:
    """Width, heads, depth and mlp_ratio are the run's, for each command that takes weights."""
    images = list(map(str, sorted(imagenet_tree.rglob("*.JPEG"))[:2]))
    loading, out = ["--workers", "0"], tmp_path / "out"
    tables, scores = {}, {}
    places = exports(trained["own token"], tmp_path / "token", "official timm huggingface")
    for form, place in places.items():
        table = tmp_path / f"{form}.json"
        data = [f"val={val_shards}", "--out", str(table), *loading]
        assert main(["evaluate", str(place), *data]) == 0
        tables[form] = json.loads(table.read_text())["sets"]["val"]["loss"]
        assert main(["predict", str(place), *images, "--out", str(out / form)]) == 0
        seen = sorted((out / form).glob("*.json"))
        scores[form] = [json.loads(file.read_text())["classes"] for file in seen]
    assert len(scores["run"]) == 2
    for form in places:
        assert tables[form] == pytest.approx(tables["run"], rel=1e-6)
        for found, expected in zip(scores[form], scores["run"], strict=True):
            assert [each["name"] for each in found] == [each["name"] for each in expected]
            values = [[each["score"] for each in row] for row in (found, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-5)

    for name, forms in (("own token", places), (
        "own pretrain",
        exports(trained["own pretrain"], tmp_path / "mae", "official timm huggingface"),
    )):  # fmt: skip
        features, pictures = {}, {}
        for form, place in forms.items():
            table = tmp_path / f"{name} {form}.npy"
            command = ["features", str(place), str(val_shards), "--out", str(table), *loading]
            assert main(command) == 0
            features[form] = np.load(table)
            drawn = tmp_path / f"{name} {form}.png"
            assert main(["attention", str(place), *images, "--out", str(drawn)]) == 0
            pictures[form] = np.asarray(Image.open(drawn)).astype(int)
        for form in forms:
            np.testing.assert_allclose(features[form], features["run"], rtol=1e-4, atol=1e-5)
            assert np.abs(pictures[form] - pictures["run"]).max() <= 2
    grids = {}
    for form in ("run", "official", "huggingface"):
        grid = tmp_path / f"grid {form}.png"
        assert main(["reconstruct", str(forms[form]), *images, "--out", str(grid)]) == 0
        grids[form] = np.asarray(Image.open(grid).convert("RGB"))[60:].astype(int)
    for found in grids.values():
        assert np.abs(found - grids["run"]).max() <= 1


def test_fine_tuning_from_an_export_of_own_sizes(
    trained: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    forms = exports(trained["own pretrain"], tmp_path / "mae", "official timm huggingface")
    losses = []
    for form, place in forms.items():
        settings = {**FINETUNE, **OWN, "weights": place, "train.max_steps": 1}
        run = Run(tmp_path / f"tuned {form}", shards, settings, task="finetune")
        output = run.finish()
        assert "new fc_norm (2), head (2)" in output
        losses.append(run.rows()[0]["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-5)
    settings = {**FINETUNE, "weights": forms["official"]}
    output = Run(tmp_path / "of the name", shards, settings, task="finetune").finish(2)
    said = "is of another size; set model.embed_dim 52 and model.depth 3 and model.mlp_ratio 2."
    assert said in output and "and model.num_heads 13" in output and "Traceback" not in output


def test_pretraining_starts_from_an_export(
    trained: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    """An export with the decoder works, and one of an encoder only, with a warning, at another
    resolution."""
    source = ours(trained["pretrain zero3"]).state_dict()
    whole = export(trained["pretrain zero3"], "huggingface", tmp_path / "whole")
    encoder = export(trained["pretrain zero3"], "timm", tmp_path / "encoder.safetensors")
    settings = {"model.depth": 2, "train.max_steps": 1, "optim.base_lr": 0}
    for weights, more in ((whole, {}), (encoder, {"model.img_size": 64})):
        run = Run(tmp_path / f"from {weights.name}", shards)
        run.settings = {**settings, "weights": weights, **more}
        output = run.finish()
        found = ours(run.run_dir).state_dict()
        same = {key for key, value in found.items() if torch.equal(value, source[key])}
        if weights == whole:
            assert same == found.keys() and "has no decoder" not in output
        else:
            assert "has no decoder: training starts with a new one" in output
            decoder = {key for key in found if key.startswith(("decoder_", "mask_token"))}
            missing = {key for key in found.keys() - same if source[key].abs().sum() > 0}
            assert {"decoder_embed.weight", "mask_token", "pos_embed"} <= missing
            assert found.keys() - same <= decoder | {"pos_embed"}
    run = Run(tmp_path / "of another depth", shards, {"model.depth": 3, "weights": whole})
    output = run.finish(2)
    assert output.count("mae-scale: error:") == 1 and "Traceback" not in output
    assert "is of another size; set model.depth 2" in output
    assert not run.run_dir.exists()


def test_the_card_says_what_it_is(trained: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    run = trained["mean"]
    out = export(run, "timm", tmp_path / "a FILE" / "out")
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "timm",
        "tags": ["mae-scale", "masked-autoencoder"],
        "pipeline_tag": "image-classification",
        "mae_scale": {
            "architecture": "mae_vit_tiny_patch16",
            "img_size": 32,
            "num_heads": 3,
            "crop_pct": 0.875,
        },
    }
    last = read_metrics(run / "metrics.jsonl")[-1]
    manifest = checkpoint.Commit.read(checkpoint.find_checkpoint(run)).data
    for part in ("| Steps | 3 |", "| Images seen | 72 |", "| Epochs | 0.3 of 2 |", manifest,
                 f"{last['loss']:.4f} at step 3", f"`{shards}`", "250 of 250 classes", "ZeRO-3",
                 "optim.ema_decay: 0.5", "timm 1."):  # fmt: skip
        assert part in body, part
    code = body.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code, scope)  # the card's code, unchanged
    with torch.no_grad():
        assert_same(scope["model"].eval()(IMAGES), ours(run)(IMAGES))


def test_the_same_export_again_and_places_that_hold_something_else(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained["token"]
    out = export(run, "timm", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    export(run, "timm", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    export(run, "official", out)  # another form; no file of the first one stays
    assert {path.name for path in out.iterdir()} == {"README.md", "model.pth"}
    file = export(run, "timm", tmp_path / "file.safetensors")
    export(run, "timm", file)
    (out / "mine.txt").write_text("mine")
    (tmp_path / "mine.pth").write_text("mine")
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "empty").mkdir()
    export(run, "timm", tmp_path / "empty")
    capsys.readouterr()
    for to, place, message in (
        ("timm", out, "holds something else than an earlier export"),
        ("timm", run, "holds something else than an earlier export"),
        ("official", tmp_path / "mine.pth", "exists and is no earlier export"),
        ("timm", tmp_path / "new\udcff", "is not UTF-8, which PyTorch needs"),
        ("official", tmp_path / "notes.pth", "notes.md exists and is no earlier export"),
        ("official", tmp_path / "x.safetensors", "writes a folder or a file ending in .pth"),
        ("timm", tmp_path / "x.bin", "writes a folder or a file ending in .safetensors"),
        ("huggingface", tmp_path / "x.safetensors", "--to huggingface writes a folder"),
        ("timm", tmp_path / "mine.pth" / "x", "mine.pth is no folder"),
    ):
        check_error(capsys, ["export", str(run), "--to", to, str(place)], message)
    assert (out / "mine.txt").read_text() == (tmp_path / "mine.pth").read_text() == "mine"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["empty", "file.md", "file.safetensors", "mine.pth", "notes.md", "out"]


def check_error(capsys: pytest.CaptureFixture[str], command: list[str], message: str) -> None:
    assert main(command) == 2
    *said, error = capsys.readouterr().err.strip().splitlines()
    assert message in error and error.startswith("mae-scale: error: ")
    assert not said or (len(said) == 1 and "(the newest; nothing was validated)" in said[0])


@pytest.mark.parametrize("to", ["official", "timm"])
def test_a_full_disk_leaves_nothing(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    """A limit on the size of files stands for a full disk; the files that were there stay."""
    out = export(trained["token"], "timm", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        assert main(["export", str(trained["token"]), "--to", to, str(out)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    *said, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"mae-scale: error: {out} cannot be written: ")
    assert len(said) == 1 and "(the newest; nothing was validated)" in said[0]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlp = tmp_path / "mlp"
    shutil.copytree(trained["token"], mlp)
    text = (mlp / "config.yaml").read_text()
    (mlp / "config.yaml").write_text(text.replace("head: linear", "head: mlp"))
    out = tmp_path / "out"
    mean, token = trained["mean"], trained["token"]
    for run, options, message in (
        (
            mean,
            ["--to", "huggingface"],
            "the mean of the patches (pool mean); the form timm holds it",
        ),
        (mlp, ["--to", "timm"], "this one in an MLP (model.head mlp); use --to official"),
        (mlp, ["--to", "huggingface"], "this one in an MLP (model.head mlp); use --to official"),
        (mlp, ["--to", "official"], "does not fit the config of its run: see head."),
        (token, ["--to", "timm", "--ema"], "keeps no moving average (optim.ema_decay)"),
        (trained["pretrain zero1"], ["--to", "timm", "--ema"], "keeps no moving average"),
        (tmp_path / "nowhere", ["--to", "timm"], "is neither a run folder nor a committed"),
        (token, ["--to", "keras"], "invalid choice: 'keras'"),
        (token, [], "the following arguments are required: --to"),
        (token, ["--to", "timm", "--emma"], "unrecognized arguments: --emma"),
    ):
        check_error(capsys, ["export", str(run), *options, str(out)], message)
    assert not out.exists()


def test_what_reconstruct_refuses(
    trained: dict[str, Path],
    imagenet_tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pth = export(trained["pretrain zero1"], "official", tmp_path / "m.pth")
    bare = shutil.copy(pth, tmp_path / "without its card.pth")
    encoder = export(trained["pretrain zero1"], "timm", tmp_path / "m.safetensors")
    capsys.readouterr()
    tiny = ["--model", "mae_vit_tiny_patch16"]
    for path, options, message in (
        (bare, [], "does not say what it is: --model NAME"),
        (bare, tiny, "add --norm_pix_loss true or --norm_pix_loss false"),
        (bare, ["--model", "mae_vit_base_patch16", "--norm_pix_loss", "true"],
         "has embed_dim 192, mae_vit_base_patch16 has 768, and weights do not show their number "
         "of attention heads: --num_heads N"),
        (pth, ["--num_heads", "6"], "--num_heads 6: "),
        (encoder, [*tiny, "--norm_pix_loss", "true"], "they have no decoder, which reconstructs"),
        (tmp_path / "nowhere.pth", tiny, "there is no run folder, step folder or file of weights"),
        (trained["pretrain zero1"], tiny, "is a run, which says that itself"),
        (trained["token"], [], "is a run of finetune; expected one of pretrain"),
    ):  # fmt: skip
        check_error(capsys, ["reconstruct", str(path), str(imagenet_tree), *options], message)
