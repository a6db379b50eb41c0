"""The plan's counts compared with measurements, its choice, its times, and bad input."""

from __future__ import annotations

import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mae_scale.cli import main
from mae_scale.config.classification import FinetuneOptimConfig, LarsConfig
from mae_scale.config.deepspeed import fit_to_model, load_deepspeed_config
from mae_scale.config.parsing import RECIPES, recipe_names
from mae_scale.config.sections import OptimConfig
from mae_scale.models import build_classifier, build_mae
from mae_scale.planning.activations import activations as counted
from mae_scale.planning.fit import Row, choose
from mae_scale.planning.flops import count_flops
from mae_scale.planning.measured import MODELS, ROWS, Measured, Work, predict
from mae_scale.planning.memory import ParameterStates, Traffic, model_states, traffic, trained_by
from mae_scale.tasks import pretrain

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from plan_error import activations  # noqa: E402

MAE: list[dict[str, Any]] = [
    {"img_size": 32, "patch_size": 8, "depth": 3, "decoder_embed_dim": 96, "mask_ratio": 0.5},
    {"img_size": 56, "patch_size": 14, "decoder_depth": 1, "decoder_num_heads": 8},
    {"img_size": 32, "patch_size": 4, "depth": 1, "decoder_depth": 3, "norm_pix_loss": True},
    {"img_size": 112, "patch_size": 16, "depth": 2, "embed_dim": 96, "num_heads": 4},
    {"img_size": 32, "patch_size": 8, "depth": 2, "mask_tokens_in_encoder": True, "target": "pca"},
    {"img_size": 32, "patch_size": 8, "depth": 2, "target": "tokens", "vocabulary_size": 77},
]
CLASSIFIERS: list[dict[str, Any]] = [
    {"classes": 10, "img_size": 32, "patch_size": 8, "depth": 3, **more}
    for more in (
        {"pool": "mean", "head": "linear", "drop_path": 0.2},
        {"pool": "token", "head": "mlp"},
        {"pool": "mean", "head": "linear", "tune": 0},
        {"pool": "token", "head": "linear", "tune": 0.5},
        {"pool": "token", "head": "linear", "tune": 2, "drop_path": 0.1},
        {"pool": "token", "head": "probe"},
    )
]
WAYS: list[tuple[Any, bool]] = [("none", False), (2, False), ("full", False), (3, True)]
# Each shape in both precisions and with one way of recomputing.
CASES = [
    {"precision": precision, "way": WAYS[number % 4], **shape}
    for number, shape in enumerate([*MAE, *CLASSIFIERS])
    for precision in ("fp32", "bf16")
]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


# --- activations --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_activations(case: dict[str, Any]) -> None:
    """What is counted on the meta device is what a step on the CPU holds at its worst moment."""
    peak, planned = activations({"name": "mae_vit_tiny_patch16", "batch": 16, **case})
    assert planned == pytest.approx(peak, rel=0.06)


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch16", "mae_vit_base_patch16"])
def test_every_fourth_block_lies_between(name: str) -> None:
    """The plan derives it from none and every second block, by the recomputed operations."""
    with torch.device("meta"):
        model = build_mae(name)
    flops, found, again = count_flops(model, pretrain.trial_loss), {}, {}
    for way in ("none", 2, 4):
        model.set_activation_checkpointing(way)
        found[way], again[way] = counted(model, pretrain.trial_loss, 64), flops.again(model)
    derived = found["none"].towards(found[2], again[4] / again[2])
    assert derived.inputs == pytest.approx(found[4].inputs, rel=0.06)
    for images in (1, 8, 64):
        assert derived.peak(images) == pytest.approx(found[4].peak(images), rel=0.06)


def test_what_checkpointing_and_offload_change() -> None:
    with torch.device("meta"):
        model = build_mae("mae_vit_base_patch16").bfloat16()
    found = {}
    for every in ("none", 3):
        model.set_activation_checkpointing(every)
        found[every] = counted(model, pretrain.trial_loss, 8)
    none, third = found["none"], found[3]
    assert none.inputs == 0 and none.peak(8) > third.peak(8) > third.peak(8, offload=True)
    # Each 3rd block of 12 and of 8: its input, in bf16.
    assert third.inputs == 2 * (4 * 50 * 768 + 3 * 197 * 512)


# --- model states, messages, checkpoints --------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_each"),
    [
        (0, "bf16", 2 + 4 + 12),
        (1, "bf16", 2 + 4 + 12 / 4),
        (2, "bf16", 2 + 16 / 4),
        (3, "bf16", 18 / 4),
        (0, "fp32", 4 + 4 + 8),
        (1, "fp32", 4 + 4 + 12 / 4),
        (3, "fp32", 20 / 4),
    ],
)
def test_model_states(stage: int, precision: str, bytes_each: float) -> None:
    """The formulas give the table of docs/training.md and section 5 of the ZeRO paper."""
    zero = load_deepspeed_config(f"zero{stage}")["zero_optimization"]
    states = model_states(ParameterStates(10**9, 10**9, precision), zero, 4)
    bucket = 4 * 50_000_000 if (stage, precision) == (1, "fp32") else 0
    if stage == 3:
        bucket = 4 * 100_000_000  # DeepSpeed's own, for contiguous gradients
    assert states.held == bytes_each * 10**9 + bucket
    average = model_states(ParameterStates(10**9, 10**9, precision, ema=True), zero, 4)
    assert average.held - states.held == 4 * 10**9 / (1 if stage == 0 else 4)


def test_frozen_parameters_have_weights_only() -> None:
    zero = load_deepspeed_config("zero1")["zero_optimization"]
    states = model_states(ParameterStates(10**9, 0, "bf16"), zero, 8)
    assert (states.weights, states.gradients, states.optimizer) == (2 * 10**9, 0, 0)


def test_offload_takes_the_optimiser_to_the_host() -> None:
    zero = load_deepspeed_config("zero3_offload")["zero_optimization"]
    states = model_states(ParameterStates(10**9, 10**9, "bf16"), zero, 8)
    assert states.host == 20 * 10**9 / 8
    assert states.held == 2 * 10**9 / 8 + 4 * 20_000_000


def test_messages() -> None:
    """Each of 4 ranks sends 3/4 of a tensor to gather or scatter it; a step has 8 micro-batches."""
    run = ParameterStates(10**9, 10**9, "bf16")
    zeros = [load_deepspeed_config(f"zero{n}")["zero_optimization"] for n in range(4)]
    sent = [traffic(run, zero, 4, accumulation=8) for zero in zeros]
    assert [t.gradients / 10**9 for t in sent] == [6, 6, 48, 24]
    assert sent[0].weights == 0 and sent[1].weights == sent[2].weights == 1.5 * 10**9
    assert sent[3].weights == pytest.approx(8 * 1.9 * 1.5 * 10**9)  # all but 1e8 come twice
    halved = traffic(ParameterStates(10**9, 10**9, "bf16", grad_reduce="bf16"), zeros[1], 4, 8)
    assert halved.gradients == sent[1].gradients / 2
    assert all(traffic(run, zero, 1, 8).gradients == 0 for zero in zeros)


def test_buckets_follow_the_size_of_the_model() -> None:
    """All buckets but the last are then sent while the backward pass computes."""
    for params, expected in ((30 * 10**6, 10**7), (112 * 10**6, 14 * 10**6), (10**9, 5 * 10**7)):
        zero = load_deepspeed_config("zero1")["zero_optimization"]
        fitting = fit_to_model("zero1", zero, params, 4)
        assert (fitting["overlap_comm"], fitting["reduce_bucket_size"]) == (True, expected)
        sent = traffic(ParameterStates(params, params, "bf16"), fitting, 4, accumulation=2)
        buckets = -(-params // expected)
        assert sent.overlapped / sent.gradients == pytest.approx((buckets - 1) * expected / params)
        assert sent.window == 1 / 2
    stage2 = load_deepspeed_config("zero2")["zero_optimization"]
    base = ParameterStates(112 * 10**6, 112 * 10**6, "bf16")
    assert traffic(base, stage2, 4, 1).overlapped == 0  # one bucket holds the whole model
    assert traffic(base, fit_to_model("zero2", stage2, 112 * 10**6, 4), 4, 1).overlapped > 0
    assert not fit_to_model("zero2", stage2, 112 * 10**6, 1)["overlap_comm"]
    own = {"stage": 2, "reduce_bucket_size": 7}
    assert fit_to_model("my/zero2.json", own, 10**9, 4) == own
    stage0 = load_deepspeed_config("zero0")["zero_optimization"]
    assert fit_to_model("zero0", stage0, 10**9, 4) == stage0


def test_size_of_a_checkpoint() -> None:
    with torch.device("meta"):
        model = build_classifier("mae_vit_tiny_patch16", 10)
    count = sum(p.numel() for p in model.parameters())
    size = partial(trained_by, model=model)
    assert size(OptimConfig(), precision="fp32").checkpoint_bytes(1) == 16 * count
    assert size(OptimConfig(), precision="bf16").checkpoint_bytes(2) == 14 * count
    assert size(OptimConfig(), precision="bf16").checkpoint_bytes(3) == 12 * count
    averaged = FinetuneOptimConfig(ema_decay=0.9)
    assert size(averaged, precision="fp32").checkpoint_bytes(1) == 20 * count
    model.tune_last(0)
    head = 10 * 193
    assert size(LarsConfig(), precision="fp32").checkpoint_bytes(0) == 4 * count + 4 * head


# --- time ---------------------------------------------------------------------------------------


def committed() -> list[Measured]:
    """Read the rows of our own training steps from benchmarks/results/."""
    found = []
    for path in sorted(RESULTS.glob("gpu*.txt")):
        text = path.read_text()
        card = re.search(r"on one NVIDIA (\w+)", text)
        pattern = (
            r"  model (\S+)  batch (\d+)  way (?:(zero\d), )?bf16, checkpointing none"
            r"(, compiled)?  images_per_second (\S+)  mfu (\S+)"
        )
        for model, batch, stage, compiled, rate, mfu in re.findall(pattern, text):
            row = (card and card[1], model, int(batch), float(rate), float(mfu))
            found.append(Measured(*row, stage or "zero1", bool(compiled)))  # type: ignore[arg-type]
    return found


def test_the_table_has_the_committed_rows() -> None:
    assert len(committed()) == 14 and set(committed()) == set(ROWS)


@pytest.mark.parametrize("row", committed(), ids=str)
def test_times_are_those_that_were_measured(row: Measured) -> None:
    blocks, flops = MODELS[row.model]
    work = Work("pretrain", blocks, flops, 0, "bf16", row.stage, row.compiled)
    found = predict(row.card, work, row.micro_batch)
    assert found.seconds is not None and found.host is not None
    assert row.micro_batch / found.seconds == pytest.approx(row.images_per_second, rel=0.15)
    # A smaller micro-batch takes the host as long; a larger one no less for each image.
    small, large = (predict(row.card, work, n).seconds for n in (1, 4 * row.micro_batch))
    assert small == found.host and large is not None and large >= found.seconds


def test_the_command_gives_the_rate_of_a_committed_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    arguments = ("--gpus", "1", "--gpu", "H200", "--train.micro_batch_size", "256")
    assert plan(capsys, *arguments, "--json", str(file))[0] == 0
    chosen = json.loads(file.read_text())["plans"][0]["chosen"]
    assert chosen["images_per_second"] == pytest.approx(3937.38, rel=0.15)
    assert "one H200, without a network" in chosen["basis"]


@pytest.mark.parametrize(
    ("card", "changes", "says"),
    [
        ("A100-80GB", {}, "no measurement on A100-80GB: time is not predicted"),
        ("H100", {"task": "detect"}, "no measurement of detect"),
        ("H100", {"precision": "fp32"}, "no measurement in fp32"),
        ("H100", {"stage": "my.json"}, "no measurement of my.json"),
        ("H100 PCIe", {}, "no measurement on H100 PCIe"),
    ],
)
def test_what_was_not_measured_is_not_predicted(
    card: str, changes: dict[str, Any], says: str
) -> None:
    plain = {"task": "pretrain", "blocks": 20, "flops": 6e10, "again": 0, "precision": "bf16",
             "stage": "zero1", "compiled": False}  # fmt: skip
    found = predict(card, Work(**{**plain, **changes}), 64)
    assert found.seconds is None and says in found.words


def test_a_rate_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The rate of one GPU is taken for each; a network of a known speed is added."""
    file, rates = tmp_path / "plan.json", []
    for more in ((), ("--network_gbs", "10")):
        code, out, _ = plan(capsys, "--config", "demo", "--gpus", "8", "--images_per_second",
                            "1000", "--json", str(file), *more)  # fmt: skip
        chosen = json.loads(file.read_text())["plans"][0]["chosen"]
        assert code == 0 and "from --images_per_second" in chosen["basis"] and "8 x" in out
        rates.append(chosen["images_per_second"])
    assert rates[0] == pytest.approx(8000) and rates[0] > rates[1] > 0


def test_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ten steps of the config are timed on the device that is here."""
    file = tmp_path / "plan.json"
    code, out, err = plan(capsys, "--config", "demo", "--measure", "--json", str(file))
    assert (code, err) == (0, "")
    (found,) = json.loads(file.read_text())["plans"]
    rate = found["chosen"]["images_per_second"]
    assert found["seconds"] == pytest.approx(found["images"] / rate) and rate > 1
    assert "measured here: 10 steps" in out and "torchrun" in out.splitlines()[-2]


# --- the command --------------------------------------------------------------------------------


def found_weights(recipe: str) -> str | None:
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()).get("weights")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe(recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The answer comes first: a setting that fits, and the command to submit; numbers as JSON."""
    file = tmp_path / "with a space.json"
    code, out, err = plan(capsys, "--config", recipe, "--gpus", "8", "--json", str(file))
    assert (code, err) == (0, "")
    (found,) = json.loads(file.read_text())["plans"]
    chosen = found["chosen"]
    assert chosen["fits"] and chosen["memory"] <= 72e9 and chosen in found["rows"]
    assert chosen["deepspeed"] in ("zero1", "zero2") or recipe.startswith("linprobe")
    *lines, command, last = out.splitlines()
    assert lines[0].startswith(recipe) and command.startswith("sbatch") and "--why" in last
    task = recipe.split("_")[0].replace("scratch", "finetune").replace("demo", "pretrain")
    words = shlex.split(command)
    assert words[1:4] == ["--nodes=1", "--gpus-per-node=8", f"slurm/{task}.sbatch"]
    assert words[words.index("--train.micro_batch_size") + 1] == str(chosen["micro_batch"])
    assert all(len(line) <= 80 for line in lines)
    assert ("--weights WEIGHTS" in command) == (found_weights(recipe) is not None)
    assert ("--data.val VAL_SHARDS" in command) == (task != "pretrain")


def test_why(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(capsys, "--config", "demo", "--gpus", "8", "--why")
    assert out.index("sbatch") < out.index("Rule: ")
    assert len([line for line in out.splitlines() if line.startswith("* ")]) == 2
    for stage in ("zero0", "zero1", "zero2", "zero3", "zero3_offload"):
        assert re.search(rf"^[ *x] {stage} +full, offload ", out, re.MULTILINE), stage


def test_a_small_gpu_makes_it_recompute_or_shard(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", "demo", "--gpus", "8", "--gpu", "A100-40GB")
    large, small = (plan(capsys, *arguments, "--memory_gb", size)[1] for size in ("40", "0.08"))
    usual = "--train.micro_batch_size 4 --train.activation_checkpointing none"
    assert f"--deepspeed zero1 {usual}" in large
    assert "sbatch" in small and f"--deepspeed zero1 {usual}" not in small
    code, _, err = plan(capsys, *arguments, "--memory_gb", "0.01")
    assert code == 2 and len(err.splitlines()) == 1
    needed = re.search(r"does not fit into 0.01 GB .* needs ([0-9.]+) GB", err)
    assert needed
    assert plan(capsys, *arguments, "--memory_gb", needed[1])[0] == 0


def test_a_gpu_without_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--config", "demo", "--gpus", "8", "--gpu", "V100-32GB")
    assert code == 0 and ", fp32, " in out and "--train.precision fp32" in out
    code, _, err = plan(capsys, "--config", "demo", "--gpus", "8", "--gpu", "V100-32GB",
                        "--train.precision", "bf16")  # fmt: skip
    assert code == 2 and "V100-32GB computes neither in bf16 nor in TF32" in err


def row(stage: str, **more: Any) -> Row:
    numbers = dict.fromkeys(
        ("states", "activations", "buffers", "host", "checkpoint", "network_s"), 0.0
    )
    plain = {"checkpointing": "none", "offload": False, "precision": "bf16", "micro_batch": 64,
             "accumulation": 1, "fits": True, "busy": True, "step_s": None, "host_s": None,
             "images_per_second": None, "basis": ""}  # fmt: skip
    nothing = Traffic(0, 0, 0, 1)
    return Row(deepspeed=stage, traffic=nothing, **{**numbers, **plain, **more})


@pytest.mark.parametrize(
    ("rows", "number"),
    [
        ([row("zero2"), row("zero1")], 1),
        ([row("zero0"), row("zero3"), row("zero2")], 2),
        ([row("zero1", micro_batch=64), row("zero1", micro_batch=128)], 1),
        ([row("zero1", fits=False), row("zero2", checkpointing="full"), row("zero3")], 1),
        ([row("zero1", busy=False), row("zero3")], 1),
        ([row("zero1", fits=False), row("zero3_offload", host=1.0), row("zero3", busy=False)], 2),
        ([row("zero2", checkpointing=2), row("zero1", checkpointing=4)], 1),
        ([row("zero0")], 0),
        ([row("zero1", fits=False)], None),
    ],
)
def test_the_choice(rows: list[Row], number: int | None) -> None:
    assert choose(rows) == (None if number is None else rows[number])


def test_several_numbers_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, "--config", "demo", "--gpus", "1", "8",
                          "--gpu", "A10", "--memory_gb", "0.065")  # fmt: skip
    assert (code, err) == (0, "")
    first, second = [line for line in out.splitlines() if re.match(r" +(1|8)  ", line)]
    assert " zero3_offload " in first and second.endswith("nothing fits into 0.065 GB")
    assert "no measurement on A10" in out


def test_what_is_on_the_command_line_is_fixed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    code, out, _ = plan(
        capsys, "--config", "pretrain_vit_base", "--gpus", "8", "--json", str(file),
        "--deepspeed", "zero3", "--train.micro_batch_size", "32",
        "--train.activation_checkpointing", "3", "--checkpoint.every_minutes", "60",
    )  # fmt: skip
    assert code == 0
    ((row,),) = [found["rows"] for found in json.loads(file.read_text())["plans"]]
    assert (row["deepspeed"], row["micro_batch"], row["checkpointing"]) == ("zero3", 32, 3)
    assert row["accumulation"] == 4096 // 8 // 32
    assert out.count("--deepspeed") == 1 and "--checkpoint.every_minutes 60" in out


def test_shards_give_the_number_of_images(
    shards: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    code, out, err = plan(capsys, "--config", "demo", "--this_machine", "--data.train", str(shards),
                          "--json", str(file))  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(file.read_text())["plans"][0]["images"] == 350 * (250 // 32) * 32
    assert f"--data.train {shlex.quote(str(shards))}" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8", "--config", "pretrain_vit_hug"], ["did you mean 'pretrain_vit_huge'"]),
        (
            ["--gpus", "8", "--gpu", "A100-80"],
            ["'A100-80'", "did you mean 'A100-80GB'?", "--memory_gb"],
        ),
        (["--gpus", "6"], ["4096", "6 GPUs", "4, 8"]),
        (["--gpus", "12"], ["12", "nodes of 8", "8 or 16"]),
        (["--gpus", "0"], ["--gpus 0"]),
        (["--gpus", "8", "--memory_gb", "0"], ["--memory_gb 0", "more than 0"]),
        (["--gpus", "8", "--measure", "--images_per_second", "40"], ["exclude each other"]),
        (["--gpus", "8", "64", "--measure"], ["--measure", "one number of --gpus"]),
        (["--measure", "--gpu", "H100"], ["--measure", "not --gpu H100"]),
        (["--gpus", "8", "--memry_gb", "80"], ["--memry_gb", "--memory_gb"]),
        (["--gpus", "8", "--train.epoch", "80"], ["train.epoch", "train.epochs"]),
        (["--gpus", "8", "--deepspeed", "zero4"], ["zero4", "did you mean"]),
        (
            ["--gpus", "8", "--config", "linprobe_vit_base", "--deepspeed", "zero2"],
            ["LARS", "zero0"],
        ),
        (["--gpus", "8", "--data.train", "/not/there"], ["/not/there", "does not exist"]),
        (["--gpus", "8", "--json", "/not/there/plan.json"], ["--json /not/there/plan.json"]),
        (["--gpus", "8", "--train.micro_batch_size", "60"], ["60", "train.micro_batch_size 64"]),
        (["--gpus", "eight"], ["--gpus", "eight"]),
        (["--this_machine", "--gpu", "H100"], ["--gpu", "--this_machine"]),
        ([], ["--gpus N"]),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = plan(capsys, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert all(word in err for word in words), err
