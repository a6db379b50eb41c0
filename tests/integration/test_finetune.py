"""`mae-scale finetune`, `linprobe` and `evaluate` as users start and stop them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import VALIDATION_IMAGES, Run, ranks

from mae_scale.cli import main
from mae_scale.launch.stopping import STOPPED
from mae_scale.models import build_mae

TOTAL = 20  # steps: two epochs of 250 // 24 steps
CLASSIFIER = {"model.depth": 3, "train.precision": "fp32", "train.micro_batch_size": 6}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write weights in the authors' form, at half the resolution."""
    torch.manual_seed(0)
    mae = build_mae("mae_vit_tiny_patch16", img_size=16, patch_size=8, depth=3, decoder_depth=1)
    path = tmp_path_factory.mktemp("weights") / "mae pretrain.pth"
    torch.save({"model": mae.state_dict()}, path)
    return path


@pytest.fixture
def tuning(run: Run, pretrained: Path, val_shards: Path) -> Run:
    """Give a fine-tuning run that uses every feature; an epoch is ten steps."""
    settings = {**CLASSIFIER, "weights": pretrained, "data.val": val_shards,
                "model.drop_path": 0.2, "optim.layer_decay": 0.65}  # fmt: skip
    return replace(run, task="finetune", settings=settings)


def evaluate(run: Run, out: Path, *options: Any, processes: int = 1) -> dict[str, Any]:
    """Run `mae-scale evaluate` and give what it writes."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node {processes} -m mae_scale"
    command = [sys.executable, *(launch.split() if processes > 1 else ["-m", "mae_scale"])]
    command += ["evaluate", str(run.run_dir), *map(str, options), "--out", str(out)]
    command += ["--batch_size", "16", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "top-1" in done.stdout
    return json.loads(out.read_text())


@pytest.mark.parametrize(("processes", "stage", "ema"), [(1, 0, False), (2, 3, True)])
def test_an_interrupted_run_equals_an_undisturbed_one(
    tuning: Run, tmp_path: Path, processes: int, stage: int, ema: bool
) -> None:
    """Losses, validations and the average are equal bit for bit, with recomputing and dropped
    paths."""
    tuning.settings |= {"deepspeed": f"zero{stage}", "optim.ema_decay": 0.9 if ema else "null",
                        "train.activation_checkpointing": "full"}  # fmt: skip
    if processes > 1:
        tuning = replace(tuning, launcher="torchrun", processes=processes)
    whole = replace(tuning, run_dir=tmp_path / "whole")
    whole.finish()

    def terminate_one_rank(process: subprocess.Popen[str]) -> None:
        (ranks(process)[-1] if processes > 1 else process).terminate()

    tuning.stop(13, terminate_one_rank, STOPPED if processes == 1 else 1)
    assert 13 <= len(tuning.rows()) < TOTAL
    tuning.finish()
    assert tuning.rows() == whole.rows() and len(whole.rows()) == TOTAL
    validations = whole.rows("validation.jsonl")
    assert tuning.rows("validation.jsonl") == validations
    assert [row["step"] for row in validations] == [10, 20]
    for row in validations:
        assert row["images"] == VALIDATION_IMAGES and math.isfinite(row["loss"])
        assert ("ema_loss" in row) is ema
        assert not ema or row["ema_loss"] != row["loss"]
    if stage == 0:  # each layer has had its share of the learning rate
        last = whole.run_dir / "checkpoints" / "step-00000020" / "mp_rank_00_model_states.pt"
        groups = torch.load(last, weights_only=False)["optimizer"]["param_groups"]
        scales = {group["lr"] / whole.rows()[-1]["lr"] for group in groups}
        assert sorted(scales) == pytest.approx([0.65**k for k in (4, 3, 2, 1, 0)])


def test_at_448_pixels_it_stops_and_goes_on(run: Run, tmp_path: Path) -> None:
    """A narrow encoder stands for ViT-H: it has 32 x 32 patches and starts from weights for 16 x
    16."""
    torch.manual_seed(0)
    mae = build_mae("mae_vit_tiny_patch16", img_size=224, patch_size=14, depth=2, decoder_depth=1)
    weights = tmp_path / "at 224.pth"
    torch.save({"model": mae.state_dict()}, weights)
    run = replace(run, task="finetune", launcher="torchrun", processes=2, settings={
        "config": "finetune_vit_huge_448", "weights": weights, "model.depth": 2,
        "model.img_size": 448, "model.patch_size": 14,
        "train.global_batch_size": 4, "train.micro_batch_size": 2, "train.max_steps": 8,
    })  # fmt: skip
    whole = replace(run, run_dir=tmp_path / "whole")
    whole.finish()
    run.stop(2, lambda process: ranks(process)[1].terminate(), 1)
    assert 2 <= len(run.rows()) < 8
    run.finish()
    assert run.rows() == whole.rows() and len(whole.rows()) == 8
    assert all(math.isfinite(row["loss"]) for row in whole.rows())
    config = yaml.safe_load((run.run_dir / "config.yaml").read_text())
    assert config["train"]["activation_checkpointing"] == "full"
    last = run.run_dir / "checkpoints" / "step-00000008" / "mp_rank_00_model_states.pt"
    assert torch.load(last, weights_only=False)["module"]["pos_embed"].shape == (1, 1025, 192)


def test_validation_and_averaging_do_not_touch_the_training(tuning: Run, tmp_path: Path) -> None:
    """ZeRO-3 gathers a few weights at a time, ahead of their use, as it does for large models; the
    average's weights are put in and taken out in pieces."""
    file = tmp_path / "few at a time.json"
    zero = {"stage": 3, "overlap_comm": True, "contiguous_gradients": False,
            "reduce_bucket_size": 300_000, "stage3_prefetch_bucket_size": 400_000,
            "stage3_max_live_parameters": 700_000, "stage3_max_reuse_distance": 300_000,
            "stage3_param_persistence_threshold": 0}  # fmt: skip
    file.write_text(json.dumps({"zero_optimization": zero}))
    tuning = replace(tuning, launcher="torchrun", processes=2)
    tuning.settings |= {"deepspeed": file, "train.max_steps": 14}
    plain = replace(tuning, run_dir=tmp_path / "plain", settings=dict(tuning.settings))
    del plain.settings["data.val"]
    plain.finish()
    assert not (plain.run_dir / "validation.jsonl").exists()
    tuning.settings["optim.ema_decay"] = 0.9
    tuning.finish()
    assert tuning.rows() == plain.rows()
    (row,) = tuning.rows("validation.jsonl")
    assert math.isfinite(row["ema_loss"]) and row["ema_loss"] != row["loss"]


def test_a_signal_during_validation_loses_nothing(tuning: Run, tmp_path: Path) -> None:
    whole = replace(tuning, run_dir=tmp_path / "whole", settings=dict(tuning.settings))
    tuning.settings["data.workers"] = 0  # a slow validation
    process = tuning.start()
    while len(tuning.rows()) < 10 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    assert re.search(r"mae-scale: stopping after .+; press again to see how long", output), output
    assert "stopped by SIGINT" in output and "Traceback" not in output
    tuning.finish()
    whole.finish()
    assert tuning.rows() == whole.rows()
    assert tuning.rows("validation.jsonl") == whole.rows("validation.jsonl")


def test_the_best_checkpoint_is_kept_and_evaluated_exactly(
    tuning: Run, shards: Path, val_shards: Path, tmp_path: Path
) -> None:
    """The size of the set divides by none of the world sizes, and the counts are the same at
    each."""
    tuning.settings |= {"checkpoint.keep": 1, "train.epochs": 4, "optim.base_lr": 0.05,
                        "optim.warmup_epochs": 0}  # fmt: skip
    tuning.finish()
    validations = tuning.rows("validation.jsonl")
    best = max(validations, key=lambda row: row["top1"])
    kept = sorted(p.name for p in (tuning.run_dir / "checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{best['step']:08d}", "step-00000040"})
    results = []
    for processes in (1, 2, 3, 4):
        options = [f"val={val_shards}", f"train={shards}"]
        out = tmp_path / f"{processes}.json"
        results.append(evaluate(tuning, out, *options, processes=processes))
    for found in results:
        assert found["step"] == best["step"]
        assert (
            found["sets"]["val"]["images"] == VALIDATION_IMAGES
            and found["sets"]["train"]["images"] == 250
        )
        for name in ("val", "train"):
            row, first = found["sets"][name], results[0]["sets"][name]
            assert row["loss"] == pytest.approx(first["loss"], rel=1e-12)
            assert {**row, "loss": 0} == {**first, "loss": 0}
    row = results[0]["sets"]["val"]
    assert (row["top1"], row["top5"]) == (best["top1"], best["top5"])
    shown = [value for value in row["per_class"].values() if value is not None]
    assert len(row["per_class"]) == 250 and len(shown) == VALIDATION_IMAGES
    assert sum(shown) / VALIDATION_IMAGES == pytest.approx(row["top1"])


def test_training_learns_and_scratch_keeps_an_average_over_world_sizes(
    run: Run, shards: Path, tmp_path: Path
) -> None:
    """The moving average goes from 2 ranks under ZeRO-3 to 1 rank under ZeRO-1, and is
    evaluated."""
    settings = {**CLASSIFIER, "data.val": shards, "optim.ema_decay": 0.5, "train.epochs": 15,
                "optim.base_lr": 0.02, "deepspeed": "zero3", "train.max_steps": 70,
                "augment.rand_augment": "null", "augment.mixup": 0, "augment.cutmix": 0,
                "augment.erasing": 0, "augment.label_smoothing": 0, "train.validate_epochs": 5,
                "augment.crop_scale": "[0.9, 1.0]", "train.micro_batch_size": 12}  # fmt: skip
    run = replace(run, task="finetune", settings=settings, launcher="torchrun", processes=2)
    run.finish()
    run = replace(run, launcher="", processes=1)
    run.settings |= {"deepspeed": "zero1", "train.max_steps": 150}
    assert "converting it for 1 under ZeRO-1" in run.finish()
    validations = run.rows("validation.jsonl")
    assert [row["step"] for row in validations] == [50, 100, 150]
    last = validations[-1]
    by_chance = 100 / 250
    assert last["top1"] > 10 * by_chance and last["ema_top1"] > 10 * by_chance
    assert last["loss"] < validations[0]["loss"] < math.log(250) and last["loss"] < math.log(100)
    step = run.run_dir / "checkpoints" / "step-00000150"
    plain = evaluate(replace(run, run_dir=step), tmp_path / "plain.json", f"train={shards}")
    average = evaluate(
        replace(run, run_dir=step), tmp_path / "ema.json", f"train={shards}", "--ema"
    )
    for found, key in ((plain, "loss"), (average, "ema_loss")):
        assert found["sets"]["train"]["loss"] == pytest.approx(last[key], rel=1e-5)
    assert average["sets"]["train"]["loss"] != plain["sets"]["train"]["loss"]


def test_linear_probing_trains_the_head_only(
    run: Run, tmp_path: Path, pretrained: Path, val_shards: Path
) -> None:
    """A bf16 probe is interrupted, goes on with another number of ranks, and is evaluated."""
    settings = {"model.depth": 3, "weights": pretrained, "data.val": val_shards,
                "train.precision": "bf16", "train.micro_batch_size": 12,
                "train.max_steps": 14}  # fmt: skip
    run = replace(run, task="linprobe", settings=settings, launcher="torchrun", processes=2)
    whole = replace(run, run_dir=tmp_path / "whole")
    whole.finish()
    run.settings = {**settings, "train.max_steps": 12}
    run.finish()
    run.settings = settings
    run.finish()
    assert run.rows() == whole.rows()
    states = [
        torch.load(
            whole.run_dir / "checkpoints" / f"step-{step:08d}" / "mp_rank_00_model_states.pt",
            weights_only=False,
        )["module"]
        for step in (10, 14)
    ]
    changed = {key for key in states[0] if not torch.equal(states[0][key], states[1][key])}
    assert changed == {"head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked",
                       "head.1.weight", "head.1.bias"}  # fmt: skip
    assert states[0]["head.0.running_var"].dtype == torch.float32
    found = evaluate(whole, tmp_path / "out.json", val_shards, "--precision", "bf16")
    assert found["sets"][str(val_shards)]["images"] == VALIDATION_IMAGES
    one = replace(run, launcher="", processes=1, settings={**settings, "train.max_steps": 16})
    assert "converting it for 1 under ZeRO-0" in one.finish()


def test_from_a_run_of_pretraining_under_zero_3(run: Run, tmp_path: Path) -> None:
    """The result is fine-tuned again, at another resolution, with half a block tuned."""
    run.settings = {"deepspeed": "zero3", "model.depth": 3, "train.max_steps": 2}
    run = replace(run, launcher="torchrun", processes=2)
    run.finish()
    first = Run(tmp_path / "first", run.shards, task="finetune")
    first.settings = {**CLASSIFIER, "weights": run.run_dir, "train.max_steps": 1}
    first.finish()
    second = Run(tmp_path / "second", run.shards, task="finetune")
    second.settings = {**first.settings, "weights": first.run_dir, "model.img_size": 64,
                       "train.tune_blocks": 0.5, "train.max_steps": 2, "model.drop_path": 0.1,
                       "train.activation_checkpointing": "full"}  # fmt: skip
    second.finish()
    trained = torch.load(
        second.run_dir / "checkpoints/step-00000002/mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    source = torch.load(
        first.run_dir / "checkpoints/step-00000001/mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    same = {k for k in source if k != "pos_embed" and torch.equal(trained[k], source[k])}
    assert not any(key.startswith(("head.", "blocks.2.mlp.")) for key in same)
    assert {"blocks.2.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "cls_token"} <= same
    assert trained["pos_embed"].shape == (1, 65, 192)


WRONG = [
    ("finetune", {"model.img_size": 30}, "img_size 30 is no multiple of model.patch_size 8"),
    ("finetune", {"train.tune_blocks": 1.5}, "train.tune_blocks 1.5 must be 0, 0.5 or"),
    ("finetune", {"train.micro_batch_size": 3}, "train.micro_batch_size 3 must be even"),
    ("finetune", {"optim.layer_decay": 0}, 'optim.layer_decay": 0 is not a number above 0'),
    ("finetune", {"optim.ema_decay": 1}, 'optim.ema_decay": 1 is not a number from 0 to below 1'),
    ("finetune", {"model.drop_path": 1}, 'drop_path": 1 is not a number'),
    ("finetune", {"augment.erasing": 2}, 'augment.erasing": 2 is not a number from 0 to 1'),
    ("finetune", {"augment.rand_augment": "strong"}, "augment.rand_augment 'strong'"),
    ("finetune", {"model.crop_ratio": 0}, 'model.crop_ratio": 0 is not a number'),
    ("finetune", {"data.val": "/nowhere"}, "/nowhere"),
    ("linprobe", {"deepspeed": "zero2"}, "ZeRO-2 cuts the weights into pieces, and LARS"),
]


@pytest.mark.parametrize(("task", "settings", "message"), WRONG)
def test_bad_settings_get_one_line_and_leave_nothing(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    task: str,
    settings: dict,
    message: str,
) -> None:
    """The commands run in this process and must not take over its signals."""
    monkeypatch.setattr("mae_scale.launch.stopping.catch_signals_early", lambda: None)
    run = replace(run, task=task, settings={"model.depth": 3, **settings})
    command = run.command()
    assert main(command[command.index(task) :]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]  # after the summary of the run
    assert message in error and error.startswith("mae-scale: error: ")
    assert not run.run_dir.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "nowhere.pth"}, "weights: there is no file or folder nowhere.pth"),
        ({"model.depth": 4}, "is of another size; set model.depth 3"),
    ],
)
def test_bad_weights_get_one_line_and_leave_nothing(
    run: Run, pretrained: Path, settings: dict, message: str
) -> None:
    """Rank 0 alone reads the weights, and the error still comes once."""
    run = replace(run, task="finetune", launcher="deepspeed", processes=2)
    run.settings = {"model.depth": 3, "weights": pretrained, **settings}
    output = run.finish(2)
    lines = [line for line in output.splitlines() if "mae-scale: error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in output and not run.run_dir.exists()


def test_other_classes_for_validation_and_a_head_of_others(
    tuning: Run, shards: Path, tmp_path: Path
) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in shards.iterdir():
        (other / path.name).symlink_to(path)
    (other / "manifest.json").unlink()
    manifest["classes"] = [f"x{name}" for name in manifest["classes"]]
    (other / "manifest.json").write_text(json.dumps(manifest))
    tuning.settings["data.val"] = other
    assert "classes that are not among the training shards' 250" in tuning.finish(2)
    del tuning.settings["data.val"]
    tuning.settings["train.max_steps"] = 1
    tuning.finish()
    command = [sys.executable, "-m", "mae_scale", "evaluate", tuning.run_dir, f"other={other}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("mae-scale: error") == 1, done.stderr
    assert "has 250 of 250 classes that are not among the classifier's 250" in done.stderr
