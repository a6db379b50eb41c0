"""Config files, recipes, the command line, and the messages about mistakes in them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mae_scale.cli import main
from mae_scale.config.batch import check_schedule
from mae_scale.config.classification import FinetuneConfig, LinprobeConfig
from mae_scale.config.detect import DetectConfig
from mae_scale.config.identity import as_yaml, differences, flatten, identity_hash
from mae_scale.config.keys import config_keys, sections_of
from mae_scale.config.parsing import parse, recipe_names
from mae_scale.config.pretraining import PretrainConfig
from mae_scale.config.segment import SegmentConfig
from mae_scale.errors import UserError
from mae_scale.launch.stopping import SIGNALS
from mae_scale.tasks.task import task_of

NEEDED = ["--run_dir=r", "--data.train=d"]


def read(*argv: str) -> PretrainConfig:
    return parse(PretrainConfig, [*NEEDED, *argv], "mae-scale pretrain")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The command takes signals over; give them back to the tests."""
    numbers = SIGNALS
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_recipes_are_table_8(size: str) -> None:
    config = read("--config", f"pretrain_vit_{size}")
    patch = 14 if size == "huge" else 16
    assert config.model.name == f"mae_vit_{size}_patch{patch}"
    assert (config.model.img_size, config.model.mask_ratio) == (224, 0.75)
    assert config.model.norm_pix_loss
    assert (config.train.epochs, config.train.global_batch_size) == (1600, 4096)
    assert config.optim.base_lr == 1.5e-4 and config.optim.min_lr == 0
    assert config.optim.warmup_epochs == 40 and config.optim.weight_decay == 0.05
    assert tuple(config.optim.betas) == (0.9, 0.95)


TASKS = {
    "finetune": FinetuneConfig,
    "scratch": FinetuneConfig,
    "linprobe": LinprobeConfig,
    "pretrain": PretrainConfig,
    "demo": PretrainConfig,
    "detect": DetectConfig,
    "segment": SegmentConfig,
}


def read_recipe(name: str, *argv: str) -> Any:
    return parse(TASKS[name.split("_")[0]], [*NEEDED, "--config", name, *argv], "mae-scale")


@pytest.mark.slow
def test_every_recipe_reads_and_is_headed_by_what_it_reproduces() -> None:
    assert {"demo", "pretrain_vit_base"} <= set(recipe_names())
    for name in recipe_names():
        config = read_recipe(name)
        path = Path(__file__).parents[2] / "mae_scale" / "recipes" / f"{name}.yaml"
        head = path.read_text().split("\nmodel:")[0]
        assert head.startswith("#") and "eproduces" in head
        if not name.startswith("demo"):
            assert "# Hardware: " in head and "Time: " in head
        assert read_recipe(name, "--seed", "3").seed == 3 != config.seed


DETECTORS = {  # as published: peak rate at batch 64, decay by layer, drop path, epochs, no decay
    "detect_vit_base": (
        8e-5,
        1.0,
        0.1,
        100,
        ("layer_norm", "channel_norm", "position", "relative"),
    ),
    "detect_vitdet_base": (1e-4, 0.7, 0.1, 100, ("layer_norm", "position")),
    "detect_vitdet_large": (1e-4, 0.8, 0.4, 100, ("layer_norm", "position")),
    "detect_vitdet_huge": (1e-4, 0.9, 0.5, 75, ()),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_recipes_of_detection(name: str) -> None:
    config = read_recipe(name)
    rate, layer_decay, drop_path, epochs, no_decay = DETECTORS[name]
    assert config.optim.base_lr * config.train.global_batch_size / 256 == pytest.approx(rate)
    assert (config.optim.layer_decay, config.model.drop_path) == (layer_decay, drop_path)
    assert (config.train.epochs, config.optim.no_decay) == (epochs, no_decay)
    assert config.optim.weight_decay == 0.1 and config.model.img_size == 1024
    simple = name != "detect_vit_base"
    assert config.model.pyramid == ("simple" if simple else "fpn")
    assert config.model.window == (14 if simple else 16)
    assert config.optim.schedule == ("steps" if simple else "cosine")


REGULARISED = {  # Tables 9 and 11
    "augment.rand_augment": "rand-m9-mstd0.5-inc1",
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.label_smoothing": 0.1,
    "augment.crop_scale": (0.08, 1.0),
    "model.pool": "mean",
    "model.head": "linear",
}
TABLE_9 = {
    **REGULARISED,
    "augment.erasing": 0.25,
    "train.global_batch_size": 1024,
    "optim.warmup_epochs": 5,
    "optim.min_lr": 1e-6,
    "optim.weight_decay": 0.05,
    "optim.betas": (0.9, 0.999),
    "optim.ema_decay": None,
    "train.tune_blocks": None,
}
TABLE_9_BY_SIZE = {
    "base": {"train.epochs": 100, "optim.base_lr": 5e-4, "optim.layer_decay": 0.65,
             "model.drop_path": 0.1},
    "large": {"train.epochs": 50, "optim.base_lr": 1e-3, "optim.layer_decay": 0.75,
              "model.drop_path": 0.2},
    "huge": {"train.epochs": 50, "optim.base_lr": 1e-3, "optim.layer_decay": 0.75,
             "model.drop_path": 0.3},
}  # fmt: skip
TABLE_10 = {
    "model.pool": "token",
    "augment.crop_scale": (0.08, 1.0),
    "train.global_batch_size": 16384,
    "optim.base_lr": 0.1,
    "optim.min_lr": 0,
    "optim.warmup_epochs": 10,
    "optim.weight_decay": 0,
    "optim.momentum": 0.9,
    "deepspeed": "zero0",
}
TABLE_11 = {
    **REGULARISED,
    "weights": None,
    "augment.erasing": 0,
    "train.global_batch_size": 4096,
    "optim.base_lr": 1e-4,
    "optim.warmup_epochs": 20,
    "optim.weight_decay": 0.3,
    "optim.betas": (0.9, 0.95),
    "optim.layer_decay": 1.0,
    "optim.ema_decay": 0.9999,
    "train.tune_blocks": None,
}


@pytest.mark.parametrize("size", ["base", "large", "huge"])
@pytest.mark.parametrize("kind", ["finetune", "finetune_448", "linprobe", "scratch"])
def test_recipes_are_tables_9_to_11(kind: str, size: str) -> None:
    task, _, pixels = kind.partition("_")
    name = f"{task}_vit_{size}" + (f"_{pixels}" if pixels else "")
    flat = flatten(read_recipe(name).model_dump())
    patch = 14 if size == "huge" else 16
    expected: dict[str, Any] = {
        "model.name": f"mae_vit_{size}_patch{patch}",
        "model.img_size": int(pixels or 224),
        "model.crop_ratio": None,
    }
    if task == "finetune":
        expected |= {**TABLE_9, **TABLE_9_BY_SIZE[size]}
    elif task == "linprobe":
        expected |= {"augment.crop": "clipped"}
        expected |= {**TABLE_10, "train.epochs": 90 if size == "base" else 50}
    else:
        drop_path, epochs = (0.1, 300) if size == "base" else (0.2, 200)
        expected |= {**TABLE_11, "model.drop_path": drop_path, "train.epochs": epochs}
    if task != "scratch":
        expected["weights"] = f"mae_pretrain_vit_{size}.pth"
    found = {key: tuple(v) if isinstance(v := flat[key], list) else v for key in expected}
    assert found == expected
    micro = flat["train.micro_batch_size"]
    assert flat["train.global_batch_size"] % (8 * micro) == 0  # runs on one node of eight


def test_the_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "my config.yaml"
    file.write_text("train: {epochs: 7, global_batch_size: 32}\nmodel: {img_size: 64}\n")
    argv = ["--train.epochs", "9", f"--config={file}", "--train.activation_checkpointing", "2"]
    config = read(*argv)
    assert (config.train.epochs, config.train.global_batch_size) == (9, 32)
    assert config.model.img_size == 64 and config.train.activation_checkpointing == 2


def test_what_is_printed_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read("--config", "demo", "--optim.betas", "[0.8, 0.99]")
    file = tmp_path / "config.yaml"
    file.write_text(as_yaml(config))
    again = parse(PretrainConfig, ["--config", str(file)], "mae-scale pretrain")
    assert again == config
    with pytest.raises(SystemExit) as end:
        main(["pretrain", *NEEDED, "--config", "demo", "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["img_size"] == 48


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[2:])) <= 80
    assert {"model", "augment"} < set(sections_of(PretrainConfig))
    for key in config_keys(PretrainConfig):
        assert f"\n  --{key}" in text, key
    joined = " ".join(text.split())
    for explained in ("--data.window 2048 Samples of a lane", "in pixels", "in gigabytes",
                      "--checkpoint.every_minutes 30 Minutes between", "--run_dir Folder of",
                      "(needed; text; may change)"):  # fmt: skip
        assert explained in joined
    first = [text.index(f"--{key}") for key in ("run_dir", "train.epochs", "optim.base_lr")]
    assert max(first) < text.index("--data.lanes")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--trian.epochs", "3"],
            "unknown config key 'trian.epochs'; did you mean 'train.epochs'?",
        ),
        (["--epochs", "3"], "unknown config key 'epochs'; did you mean 'train.epochs'?"),
        (["--lr", "3"], "did you mean 'optim.base_lr'?"),
        (["--batch_size", "3"], "did you mean 'train.global_batch_size' (images of a step"),
        (["--data.path", "x"], "did you mean 'data.train'?"),
        (["--gpu", "A100"], "--gpu belongs to mae-scale plan"),
        (["--model", "mae_vit_large_patch16"], "did you mean --model.name mae_vit_large_patch16?"),
        (
            ["--optim.betas", "0.9,0.95"],
            "'0.9,0.95' is not a list of 2 in brackets, each number from",
        ),
        (["--optim.betas", "[0.9]"], "[0.9] is not a list of 2 in brackets"),
        (["--resume", "x"], "the same command with the same run_dir continues by itself"),
        (
            ["--config", "finetune_vit_base"],
            "is one of finetune, not of pretrain; start it by mae-scale finetune",
        ),
        (
            ["--train.epochs", "three"],
            "config key \"train.epochs\": 'three' is not a whole number from 1 on",
        ),
        (["--train.epochs", "0"], '"train.epochs": 0 is not a whole number from 1 on'),
        (["--optim.base_lr", "-1"], '"optim.base_lr": -1 is not a number from 0 on'),
        (["--optim.base_lr", ".nan"], "is not a number from 0 on"),
        (["--optim.betas", "[2,3]"], "each number from 0 to below 1 (see 2)"),
        (["--data.workers", "1000"], "1000 is not a whole number from 0 to 256 or null"),
        (["--checkpoint.every_minutes", "0"], "0 is not a number above 0 or null"),
        (
            ["--train.activation_checkpointing", "all"],
            "'all' is not one of none, full or whole number from 1 on\n",
        ),
        (
            ["--model.img_size", "224x448"],
            "'224x448' is not a whole number from 1 to 16384 or list",
        ),
        (["--data.mean", "0.5"], "0.5 is not a list in brackets, each number from 0 on or null"),
        (["--train.precision", "fp16"], "'fp16' is not one of auto, bf16, fp32"),
        (["--config", "pretrain_vit_bse"], "did you mean 'pretrain_vit_base'?"),
        (["--config", "nowhere.yaml"], "neither a file nor a recipe"),
        (["--config"], "neither a file nor a recipe"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_mistakes_get_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *NEEDED, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "modle: {name: x}",
            "unknown config key 'modle.name' in {file}; did you mean 'model.name'?",
        ),
        ("model: [", "{file} is not valid YAML"),
        ("just words", "{file} holds no config keys"),
        ("", "{file} holds no config keys"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read("--config", str(file))
    assert message.format(file=file) in str(error.value)


def test_a_missing_key_and_command_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--run_dir", "x"]) == 2
    assert "data.train" in capsys.readouterr().err
    assert main(["pretrian"]) == 2
    error = capsys.readouterr().err
    assert "unknown command 'pretrian'; did you mean 'pretrain'? commands: pretrain" in error
    assert main(["--help"]) == 0
    assert "pretrain" in capsys.readouterr().out


def test_what_a_run_may_change() -> None:
    old = yaml.safe_load(as_yaml(read()))
    free = ["--train.max_steps=5", "--deepspeed=zero3", "--data.workers=0", "--checkpoint.keep=9"]
    same = read(*free)
    assert differences(old, same) == []
    assert identity_hash(same) == identity_hash(read())
    other = read("--seed=1", "--optim.base_lr=1e-3")
    assert differences(old, other) == [
        "optim.base_lr: 0.00015 -> 0.001",
        "seed: 0 -> 1",
    ]
    assert identity_hash(other) != identity_hash(read())


def test_a_run_from_before_a_key_joined_goes_on() -> None:
    """At its default the key changes nothing; at another value it is a difference."""
    old, before = yaml.safe_load(as_yaml(read())), identity_hash(read())
    del old["model"]["mask_sampling"], old["augment"]
    assert differences(old, read()) == []
    block = read("--model.mask_sampling=block", "--augment.crop=none")
    assert differences(old, block) == [
        "model.mask_sampling: random -> block",
        "augment.crop: random -> none",
    ]

    class LaterConfig(PretrainConfig):
        joined: int = 3

    later = LaterConfig(**vars(read()))
    assert differences(old, later) == [] and identity_hash(later) == before
    later.joined = 4
    assert differences(old, later) == ["joined: 3 -> 4"] and identity_hash(later) != before


def test_a_schedule_that_cannot_be() -> None:
    check_schedule(read("--config", "demo"))
    with pytest.raises(UserError, match=r"warmup_epochs 10 is longer than the run, train.epochs 9"):
        check_schedule(read("--config", "demo", "--train.epochs", "9"))
    with pytest.raises(UserError, match=r"min_lr 5 is more than the peak learning rate 0.002"):
        check_schedule(read("--config", "demo", "--optim.min_lr", "5"))


def test_a_home_folder_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of a user")
    file = tmp_path / "c.yaml"
    file.write_text("data: {val: ~/val}\n")
    config = parse(PretrainConfig, ["--run_dir=~/r", "--data.train=d", f"--config={file}"], "x")
    assert (config.run_dir, config.data.val) == ("/home/of a user/r", "/home/of a user/val")


def test_a_run_names_its_task_and_older_ones_are_found_out() -> None:
    for name in ("demo", "finetune_demo", "scratch_vit_base", "linprobe_demo", "detect_vit_base",
                 "segment_vit_base"):  # fmt: skip
        config = read_recipe(name)
        content = yaml.safe_load(as_yaml(config))
        assert next(iter(content)) == "task" and task_of(content).config is type(config)
        del content["task"]
        assert task_of(content).config is type(config)
    with pytest.raises(UserError, match="task 'pretrian' is not known; tasks: pretrain, finetune"):
        task_of({"task": "pretrian"})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: 3", "train is a section of keys such as 'epochs: ...', but holds 3"),
        ("optim:", "optim is a section of keys such as 'base_lr: ...', but holds nothing"),
        ("model: {img_size: }", 'config key "model.img_size": null is not a whole number from 1'),
        ("- a", "holds no config keys"),
    ],
)
def test_files_without_keys_or_values(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content + "\n")
    with pytest.raises(UserError) as error:
        read("--config", str(tmp_path / "config.yaml"))
    assert says in str(error.value)
