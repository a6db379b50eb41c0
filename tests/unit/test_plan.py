"""The plan's formulas compared with measurements, its table, its choice, and bad input."""

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
from torch.nn import functional as F

from mae_scale.cli import main
from mae_scale.config.classification import FinetuneOptimConfig, LarsConfig
from mae_scale.config.deepspeed import fit_to_model, load_deepspeed_config
from mae_scale.config.parsing import RECIPES, recipe_names
from mae_scale.config.sections import OptimConfig
from mae_scale.models import build_classifier, build_mae
from mae_scale.models.classifier import keep_statistics_in_fp32
from mae_scale.planning.choice import Row
from mae_scale.planning.choosing import choose, reason
from mae_scale.planning.flops import recomputed_flops, training_flops
from mae_scale.planning.memory import activation_parts, host_bytes, kept_bytes, peak_bytes, sizes
from mae_scale.planning.model_states import ParameterStates, model_states, traffic, trained_by

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from activation_memory import saved_bytes  # noqa: E402
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
    {"pool": "mean", "head": "linear", "drop_path": 0.2},
    {"pool": "token", "head": "mlp"},
    {"pool": "mean", "head": "linear", "tune": 0},
    {"pool": "token", "head": "linear", "tune": 0.5},
    {"pool": "token", "head": "linear", "tune": 2, "drop_path": 0.1},
    {"pool": "token", "head": "probe", "tune": 0},
]
WAYS: list[tuple[Any, bool]] = [("none", False), (2, False), ("full", False), (3, True)]
DTYPES = [torch.float32, torch.bfloat16]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


# --- activations --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MAE)
def test_saved_activations_of_a_masked_autoencoder(
    shape: dict[str, Any], dtype: torch.dtype, way: tuple[Any, bool]
) -> None:
    torch.manual_seed(0)
    model = build_mae("mae_vit_tiny_patch16", **shape).to(dtype)
    keep_statistics_in_fp32(model)
    model.set_activation_checkpointing(*way)
    images = torch.rand(3, 3, shape["img_size"], shape["img_size"])
    noise = torch.rand(3, model.num_patches)
    ids = torch.randint(0, 77, noise.shape)
    measured = saved_bytes(model, lambda: model(images, noise, token_ids=ids)[0])
    planned = 3 * kept_bytes(activation_parts(model, sizes(dtype, "cpu")))
    assert planned == pytest.approx(measured, abs=16)  # the sum of the mask, once a batch


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CLASSIFIERS)
def test_saved_activations_of_a_classifier(
    shape: dict[str, Any], dtype: torch.dtype, way: tuple[Any, bool]
) -> None:
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 3, **shape}
    tune = kwargs.pop("tune", None)
    model = build_classifier("mae_vit_tiny_patch16", 10, **kwargs).to(dtype)
    keep_statistics_in_fp32(model)
    if tune is not None:
        model.tune_last(tune)
    model.set_activation_checkpointing(*way)
    images = torch.rand(4, 3, 32, 32)
    target = torch.rand(4, 10)
    labels = target.argmax(1) if shape["head"] == "probe" else target
    measured = saved_bytes(model, lambda: F.cross_entropy(model(images), labels))
    planned = 4 * kept_bytes(activation_parts(model, sizes(dtype, "cpu")))
    assert planned == pytest.approx(measured, abs=16)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", [("none", False), ("full", False), ("full", True)])
def test_peak_of_a_step(way: tuple[Any, bool], precision: str) -> None:
    """The peak of forward and backward pass includes temporary tensors and one weight's
    gradient."""
    shape = {"name": "mae_vit_small_patch16", "precision": precision, "way": way, "batch": 8,
             "img_size": 80, "patch_size": 8, "depth": 4}  # fmt: skip
    saved, planned, peak, planned_peak = activations(shape)  # a CPU is its own host
    assert planned == pytest.approx(saved, abs=16)
    assert planned_peak == pytest.approx(peak, rel=0.1)
    assert peak > saved


def test_what_checkpointing_and_offload_change() -> None:
    with torch.device("meta"):
        model = build_mae("mae_vit_base_patch16")
    found = {}
    for way in WAYS:
        model.set_activation_checkpointing(*way)
        parts = activation_parts(model, sizes(torch.bfloat16))
        found[way] = (kept_bytes(parts), peak_bytes(parts, 8) / 8, host_bytes(parts))
        flops = recomputed_flops(model)
        assert (flops > 0) == (way[0] != "none")
    assert found["none", False][0] > found[2, False][0] > found["full", False][0]
    assert found["full", False][1] > found["full", False][0]
    assert [host for _, _, host in found.values()][:3] == [0, 0, 0]
    # Each 3rd block of 12 and of 8: its input, in bf16.
    assert found[3, True][2] == 2 * (4 * 50 * 768 + 3 * 197 * 512)
    model.set_activation_checkpointing("full")
    assert recomputed_flops(model) == pytest.approx(training_flops(model) / 3, rel=0.05)


def test_statistics_are_fp32_on_a_gpu() -> None:
    model = build_mae("mae_vit_tiny_patch16", img_size=32, patch_size=8)
    here, there = (
        kept_bytes(activation_parts(model, sizes(torch.bfloat16, kind))) for kind in ("cpu", "cuda")
    )
    norms = 5 * (2 * 12 + 1) + 17 * (2 * 4 + 1)  # tokens x norms; 2 statistics, 2 bytes more each
    assert there - here == 2 * 2 * norms


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


# --- the command --------------------------------------------------------------------------------


NOT_PLANNED = [name for name in recipe_names() if name.startswith(("detect", "segment"))]


@pytest.mark.parametrize("recipe", NOT_PLANNED)
def test_what_it_does_not_know_it_says(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, "--config", recipe, "--gpus", "8")
    assert (code, out) == (2, "")
    assert f"plan does not know the memory and the time of {recipe.split('_')[0]}" in err


def found_weights(recipe: str) -> str | None:
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()).get("weights")


@pytest.mark.parametrize("recipe", sorted({*recipe_names()} - {*NOT_PLANNED}))
def test_every_recipe(recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The plan has a table, a choice that fits, the command to submit, and all numbers as JSON."""
    file = tmp_path / "with a space.json"
    code, out, err = plan(capsys, "--config", recipe, "--gpus", "8", "--json", str(file))
    assert (code, err) == (0, "")
    (found,) = json.loads(file.read_text())["plans"]
    chosen = found["chosen"]
    assert chosen["fits"] and chosen["memory"] <= 72e9 and chosen in found["rows"]
    assert 0 < found["seconds"] == pytest.approx(found["images"] / chosen["images_per_second"])
    *lines, command = out.splitlines()  # the answer comes last
    assert "Choose " in out and command.startswith("sbatch")
    task = recipe.split("_")[0].replace("scratch", "finetune").replace("demo", "pretrain")
    words = shlex.split(command)
    assert words[1:4] == ["--nodes=1", "--gpus-per-node=8", f"slurm/{task}.sbatch"]
    assert words[words.index("--train.micro_batch_size") + 1] == str(chosen["micro_batch"])
    assert len([line for line in lines if line.startswith("* ")]) == 2
    assert all(len(line) <= 80 for line in lines)
    assert ("--weights WEIGHTS" in command) == (found_weights(recipe) is not None)
    assert ("--data.val VAL_SHARDS" in command) == (task != "pretrain")


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (REPOSITORY / "docs" / "scaling.md").read_text()
    (block,) = re.findall(r"```text\n\$ mae-scale (.*?)```", text, re.DOTALL)
    command, table = block.split("\n", 1)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == table


def test_a_small_gpu_makes_it_recompute_and_shard(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", "pretrain_vit_huge", "--gpus", "8")
    large, small = (
        plan(capsys, *arguments, "--memory_gb", size, "--gpu", "A100-40GB")[1]
        for size in ("80", "6")
    )
    assert "--deepspeed zero1 " in large and "--train.activation_checkpointing none" in large
    assert "--deepspeed zero1 " not in small
    code, _, err = plan(capsys, *arguments, "--memory_gb", "0.5", "--gpu", "A100-40GB")
    assert code == 2 and len(err.splitlines()) == 1
    needed = re.search(r"does not fit into 0.5 GB .* needs ([0-9.]+) GB", err)
    assert needed
    assert plan(capsys, *arguments, "--memory_gb", needed[1], "--gpu", "A100-40GB")[0] == 0


def test_a_slow_host_is_the_limit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A step takes no less than the host needs for it; larger micro-batches need less."""
    file = tmp_path / "plan.json"
    rates = {}
    for host_ms in ("0.001", "10"):
        _, out, _ = plan(
            capsys, "--config", "pretrain_vit_base", "--gpus", "8", "--deepspeed", "zero1",
            "--host_ms", host_ms, "--json", str(file),
        )  # fmt: skip
        (found,) = json.loads(file.read_text())["plans"]
        rates[host_ms] = {row["micro_batch"]: row for row in found["rows"] if row["fits"]}
        (line,) = [line for line in out.splitlines() if line.startswith("host  ")]
        least = int(re.search(r"from a micro-batch of (\d+) on the GPU takes longer", line)[1])
        assert least == (1 if host_ms == "0.001" else 512), line
    slow = rates["10"][16]
    # 12 + 8 blocks of 10 ms, for each micro-batch
    assert slow["host_s"] == pytest.approx(slow["accumulation"] * 20 * 0.01)
    assert slow["images_per_second"] == pytest.approx(4096 / slow["host_s"])
    assert rates["0.001"][16]["images_per_second"] > 2 * slow["images_per_second"]


def row(stage: str, rate: float | None, **more: Any) -> Row:
    numbers = dict.fromkeys(
        ("weights", "gradients", "optimizer", "activations", "buffers", "host", "sent",
         "network_s", "host_s", "recompute_share", "checkpoint"), 0.0,
    )  # fmt: skip
    plain = {"checkpointing": "none", "offload": False, "micro_batch": 64, "accumulation": 1,
             "fits": True, "busy": True, "compute_s": None}  # fmt: skip
    return Row(deepspeed=stage, images_per_second=rate, **{**numbers, **plain, **more})


@pytest.mark.parametrize(
    ("rows", "stage", "says"),
    [
        ([row("zero1", 100), row("zero2", 101)], "zero1", "within 2% of the fastest (101 images"),
        ([row("zero1", 90), row("zero2", 101)], "zero2", "the fastest of those that come into"),
        ([row("zero1", 9), row("zero2", 9)], "zero1", "of equals the first is taken: zero1"),
        ([row("zero1", 9), row("zero2", 8), row("zero3", 99)], "zero1", "zero3 is for what does"),
        ([row("zero0", 99), row("zero1", 9), row("zero2", 8)], "zero1", "zero0 is shown to"),
        ([row("zero1", 9), row("zero2", 8), row("zero3_offload", 99, host=1.0)], "zero1", "copies"),
        ([row("zero1", 9), row("zero2", 8), row("zero2", 99, busy=False)], "zero1", "2048 tokens"),
        ([row("zero1", None), row("zero2", None)], "zero1", "Times are not known here"),
        ([row("zero1", 9), row("zero2", 99, fits=False)], "zero1", "the only one that fits"),
        ([row("zero3", 9)], "zero3", "asked for"),
    ],
)
def test_a_choice_has_a_reason(rows: list[Row], stage: str, says: str) -> None:
    chosen = choose(rows)
    assert chosen is not None and chosen.deepspeed == stage
    assert says in reason(rows, chosen)


def test_where_nothing_fits_a_comparison_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, "--config", "pretrain_vit_huge", "--gpus", "1", "64",
                          "--gpu", "A10", "--memory_gb", "1")  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "pretrain_vit_huge" in lines
    first, second = [line for line in lines if re.match(r" +(1|64)  ", line)]
    assert first.endswith("nothing fits into 1 GB") and " zero" in second


def test_what_is_on_the_command_line_is_fixed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    code, out, _ = plan(
        capsys, "--config", "pretrain_vit_base", "--gpus", "8", "--json", str(file),
        "--deepspeed", "zero3", "--train.micro_batch_size", "32",
        "--train.activation_checkpointing", "3", "--checkpoint_minutes", "60",
    )  # fmt: skip
    assert code == 0
    ((row,),) = [found["rows"] for found in json.loads(file.read_text())["plans"]]
    assert (row["deepspeed"], row["micro_batch"], row["checkpointing"]) == ("zero3", 32, 3)
    assert row["accumulation"] == 4096 // 8 // 32
    assert out.count("--deepspeed") == 1 and "--checkpoint.every_minutes 60" in out
    lost = json.loads(file.read_text())["plans"][0]["lost_minutes"]
    assert 35 < lost["expected"] < 36 and 65 < lost["worst"] < 66


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
            ["'A100-80'", "did you mean 'A100-80GB'?", "--tflops"],
        ),
        (["--gpus", "8", "--gpu", "V100-32GB"], ["peak of V100-32GB", "--tflops"]),
        (["--gpus", "6"], ["4096", "6 GPUs", "4, 8"]),
        (["--gpus", "12"], ["12", "nodes of 8", "8 or 16"]),
        (["--gpus", "0"], ["--gpus 0"]),
        (["--gpus", "8", "--memory_gb", "0"], ["--memory_gb 0", "more than 0"]),
        (["--gpus", "8", "--mfu", "40"], ["--mfu 40", "at most 1"]),
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
