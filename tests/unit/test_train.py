"""The parts of training that need no process group: schedule, batch, DeepSpeed config, records."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_scale.config.batch import accumulation_steps, resolve_precision
from mae_scale.config.deepspeed import DS_CONFIGS, load_deepspeed_config
from mae_scale.config.sections import TrainConfig
from mae_scale.errors import UserError
from mae_scale.launch.distributed import World
from mae_scale.train.deepspeed_config import fill_deepspeed_config, zero_stage
from mae_scale.train.metrics import Meter, MetricsLog, Record
from mae_scale.train.records import read_metrics
from mae_scale.train.schedule import curve_rate, learning_rate

TABLE_8 = {"peak": 2.4e-3, "floor": 0.0, "warmup": 40.0, "epochs": 1600.0}


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0), (10, 6e-4), (20, 1.2e-3), (40, 2.4e-3), (820, 1.2e-3), (1600, 0)],
)
def test_learning_rate_of_table_8(epoch: float, expected: float) -> None:
    assert learning_rate(epoch, **TABLE_8) == pytest.approx(expected, abs=1e-12)


def test_learning_rate_follows_the_rule_of_the_reference() -> None:
    for epoch in (41.5, 333.3, 1234.5):
        e, w, n, lr, low = epoch, 5, 1600, 1e-3, 1e-6
        expected = low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (e - w) / (n - w)))
        got = learning_rate(e, peak=lr, floor=low, warmup=w, epochs=n)
        assert got == pytest.approx(expected, rel=1e-12)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, peak=1.0, floor=0.0, warmup=0, epochs=10) == 1.0


def test_learning_rates_of_the_published_detectors() -> None:
    warmup = {"peak": 1e-4, "floor": 0.0, "warmup_steps": 250, "warmup_factor": 1e-3}
    drops = (163_889 / 184_375, 177_546 / 184_375)
    vitdet = {
        step: curve_rate(step, 184_375, curve="steps", drops=drops, **warmup)
        for step in (0, 125, 250, 163_888, 163_889, 177_545, 177_546, 184_374)
    }
    expected = [1e-7, 1e-4 * 0.5005, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6]
    assert list(vitdet.values()) == pytest.approx(expected)
    li = [curve_rate(step, 1000, curve="cosine", **warmup) for step in (500, 1000)]
    assert li == pytest.approx([5e-5, 0], abs=1e-12)


def test_learning_rate_of_upernet() -> None:
    rule = {"peak": 1e-4, "floor": 0.0, "warmup_steps": 1500, "warmup_factor": 1e-6}
    found = [curve_rate(s, 160_000, curve="linear", **rule) for s in (0, 750, 80_000, 160_000)]
    before = 1e-4 * (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6))
    assert found == pytest.approx([1e-10, before, 5e-5, 0], abs=1e-15)


def test_accumulation_makes_up_the_global_batch() -> None:
    train = TrainConfig(global_batch_size=4096, micro_batch_size=64)
    assert [accumulation_steps(train, world) for world in (1, 8, 64)] == [64, 8, 1]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "would"),
    [
        (100, 16, 2, "train.micro_batch_size 10 would"),
        (4096, 64, 3, "train.global_batch_size 4032 would"),
        (7, 8, 1, "train.micro_batch_size 7 would"),
    ],
)
def test_a_batch_that_does_not_divide_says_what_would(
    batch: int, micro: int, world: int, would: str
) -> None:
    train = TrainConfig(global_batch_size=batch, micro_batch_size=micro)
    with pytest.raises(UserError, match=would):
        accumulation_steps(train, world)


@pytest.mark.parametrize("name", sorted(path.stem for path in DS_CONFIGS.glob("*.json")))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_deepspeed_config_is_filled_in(name: str, precision: str) -> None:
    train = TrainConfig(global_batch_size=64, micro_batch_size=8)
    config = fill_deepspeed_config(name, train, World(size=2), precision)
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 64
    assert config["gradient_accumulation_steps"] == 4
    assert config["bf16"]["enabled"] is (precision == "bf16")
    assert zero_stage(config) == int(name[4])
    assert config["communication_data_type"] == "fp32"
    sums_in = precision if name == "zero0" else "fp32"
    assert config["data_types"]["grad_accum_dtype"] == sums_in


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 512}, "train_batch_size 512 .* train.global_batch_size"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5 .* optim.clip_grad"),
        ({"bf16": {"enabled": True}}, "bf16.enabled true .* train.precision fp32"),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled true .* train.precision fp32"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16_optimizer_states .* fp32 optimiser"),
        ({"fp16": {"enabled": True}}, "'fp16' .* train.precision; fp16 is not offered"),
        ({"torch_autocast": {"enabled": True}}, "'torch_autocast' .* train.precision"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' .* remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' .* train.epochs; remove it"),
        ({"elasticity": {"enabled": True}}, "'elasticity' .* train.global_batch_size"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "'activation_checkpointing' .* train.activation_offload; remove it",
        ),
        (
            {"communication_data_type": "bf16"},
            'communication_data_type "bf16" .* train.grad_reduce',
        ),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op "sum" .* a mean'),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer true .* AdamW"),
        (
            {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}},
            'grad_accum_dtype "bf16" .* sum of gradients, which is fp32',
        ),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size .* no recipe"),
        ({"zero_optimization": {"stage": "auto"}}, 'stage "auto" .* is not 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": 4}}, "stage 4 .* is not 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "zero_optimization .* is not a JSON object"),
        ({"zero_optimization": {"stag": 2}}, "no key 'stag' .*did you mean 'stage'"),
        ({"gradient_cliping": 1.0}, "no key 'gradient_cliping'.*did you mean 'gradient_clipping'"),
        ({"foo_bar": {"enabled": False}}, "no key 'foo_bar'.*remove it"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum.*'grad_accum_dtype'"),
        ({"aio": {"blok_size": 1}}, "no key 'aio.blok_size'.*did you mean 'block_size'"),
        ({"wandb": {"enabled": True}}, "wandb.*remove it"),
        ({"comet": {"enabled": True}}, "comet.*remove it"),
        ({"tensorboard": {"enabled": True, "output_path": "/"}}, "tensorboard.*remove it"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size.*remove it"),
        ({"flops_profiler": {"enabled": True, "output_file": "x"}}, "output_file.*remove it"),
        ({"zero_optimization": {"stage": 1, "offload_param": 3}}, "DeepSpeed refuses .*offload"),
    ],
)
def test_a_deepspeed_config_that_contradicts_the_recipe(
    tmp_path: Path, content: dict[str, object], message: str
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        fill_deepspeed_config(str(file), TrainConfig(), World(), "fp32")


def test_a_deepspeed_config_of_the_users(tmp_path: Path) -> None:
    """Comments, other spellings and empty sections are accepted; the user's own values stay."""
    file = tmp_path / "mine.json"
    file.write_text("""{
        // as DeepSpeed's documentation writes it
        "zero_optimization": {"stage": "2", "reduce_bucket_size": 5e8, "overlap_comm": true,},
        "bfloat16": {"enabled": "auto"},
        "fp16": {"enabled": false, "loss_scale": 0},
        "activation_checkpointing": {"partition_activations": false, "number_checkpoints": null},
        "data_types": {"grad_accum_dtype": "float32"},
        "communication_data_type": "bf16", # half of what is sent
        "steps_per_print": 100
    }""")
    train = TrainConfig(grad_reduce="bf16")
    config = fill_deepspeed_config(str(file), train, World(size=4), "bf16")
    assert zero_stage(config) == 2
    assert config["zero_optimization"]["reduce_bucket_size"] == 5e8
    assert config["bf16"]["enabled"] is True and "bfloat16" not in config
    assert config["communication_data_type"] == "bf16" and config["steps_per_print"] == 100
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_a_missing_deepspeed_config_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'zero2'"):
        load_deepspeed_config("zero_2")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_deepspeed_config(str(broken))
    broken.write_text('{"bf16": {}, "bf16": {}}')
    with pytest.raises(UserError, match="'bf16' stands twice"):
        load_deepspeed_config(str(broken))


def test_auto_precision_is_fp32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_metrics_have_no_gap_and_no_repeat_after_a_kill(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 8):
        log.write({"step": step, "loss": 1 / step})
    log.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a write
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    again = MetricsLog(tmp_path, 5)  # goes on from a checkpoint of step 5
    again.write({"step": 6, "loss": 0.5})
    again.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[-1]["loss"] == 0.5


def test_tensorboard_has_all_points_of_both_records_after_a_resume(tmp_path: Path) -> None:
    """A second writer that begins at a step would hide the later points of the first one."""

    def log(done: int, steps: range) -> None:
        record = Record(
            run_dir=tmp_path, step=done, total_steps=9, steps_per_epoch=3, batch=4, log_every=1,
            workers=0, mfu_of=lambda rate: None, validates=True,
        )  # fmt: skip
        for step in steps:
            record.add(step=step, loss=1.0, lr=0.1, grad_norm=1.0, bad_steps=0, wait=0.0,
                       at=float(step))  # fmt: skip
            if step % 3 == 0:
                record.add_validation(step, {"top1": 50.0})
        record.close()

    log(0, range(1, 8))
    log(5, range(6, 10))  # goes on from a checkpoint of step 5
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("train/loss")] == list(range(1, 10))
    assert [point.step for point in board.Scalars("validation/top1")] == [3, 6, 9]


@pytest.mark.parametrize(("share", "lines"), [(0.05, 0), (0.3, 1)])
def test_slow_data_is_said_once(share: float, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = logging.getLogger("mae_scale")
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    at = time.monotonic()
    meter = Meter(images=64, workers=4)
    for _ in range(200):  # rows of ten steps of a second
        for _ in range(10):
            at += 1
            meter.add(share, at)
        rates = meter.rates()
        assert rates["data_wait"] == pytest.approx(share, rel=0.01)
        assert rates["images_per_second"] == pytest.approx(64, rel=0.01)
    assert len(said) == lines
    assert all("raise data.workers (now 4 per rank" in line for line in said)


def test_the_last_step_of_a_run_is_always_recorded(tmp_path: Path) -> None:
    record = Record(
        run_dir=tmp_path, step=0, total_steps=5, steps_per_epoch=5, batch=8, log_every=2, workers=0,
        mfu_of=lambda rate: None,
    )  # fmt: skip
    for step in range(1, 6):
        record.add(step=step, loss=1.0, lr=0.1, grad_norm=2.0, bad_steps=0, wait=0.0,
                   at=time.monotonic())  # fmt: skip
    record.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 5]
