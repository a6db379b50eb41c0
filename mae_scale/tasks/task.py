"""The registry of tasks: every other part asks it what a run consists of.

Importing it needs no torch. The code of a task that needs torch is its module, `tasks/NAME.py`:

    build(config, num_classes) -> model        the model that is trained, on the context's device
    trial_loss(model, images) -> loss          loss of images with targets that are made up
    prepare(config, world) -> TrainingSetup    everything that `train.run.train` needs
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mae_scale.config.batch import check_schedule
from mae_scale.config.classification import FinetuneConfig, LinprobeConfig
from mae_scale.config.detect import DetectConfig
from mae_scale.config.identity import flatten
from mae_scale.config.keys import config_keys, key_names
from mae_scale.config.parsing import Arguments, build, given_values
from mae_scale.config.pretraining import PretrainConfig
from mae_scale.config.sections import RunConfig
from mae_scale.config.segment import SegmentConfig
from mae_scale.errors import UserError, renamed
from mae_scale.world import World

log = logging.getLogger("mae_scale")

# Prefix of the names of scores that the moving average of the weights has reached.
AVERAGED = "ema_"
# Scores of each kind of task: the label of each by its name in validation.jsonl.
CLASSIFICATION = {"top1": "top-1, %", "top5": "top-5, %", "loss": "loss"}
PROBES = {
    "knn_top1": "kNN top-1, %",
    "knn_top5": "kNN top-5, %",
    "linear_top1": "linear top-1, %",
    "linear_top5": "linear top-5, %",
}
DETECTION = {
    f"{what}_{score}": f"{what} {label}"
    for what in ("box", "mask")
    for score, label in (
        ("ap", "AP"),
        ("ap50", "AP50"),
        ("ap75", "AP75"),
        ("ap_small", "AP, small"),
        ("ap_medium", "AP, medium"),
        ("ap_large", "AP, large"),
    )
}

SEGMENTATION = {"miou": "mIoU, %", "macc": "mean accuracy, %", "aacc": "pixel accuracy, %"}


@dataclass(frozen=True)
class Task:
    """A kind of run: its name, its config, its scores, and its module."""

    name: str
    """Name of the command that trains it and of its module in `tasks/`."""
    config: type[RunConfig]
    """Class of its config."""
    about: str
    """Line about the command for `mae-scale --help`."""
    card: str
    """Description of the model for a model card."""
    hub_tag: str
    """Pipeline tag of the model on the Hugging Face Hub."""
    scores: Mapping[str, str] = field(default_factory=dict)
    """Scores of a validation: the label of each by its name in validation.jsonl."""
    best_by: str = ""
    """Score whose highest value is the best validation. It also decides which checkpoint is the
    best one, except in pre-training, where that is always the newest."""
    num_classes: int = 0
    """Number of classes where no data set is given: that of the paper's data set."""

    @property
    def module(self) -> ModuleType:
        """Module of the task, which imports torch."""
        return importlib.import_module(f"mae_scale.tasks.{self.name}")

    def best_score(self, row: Mapping[str, Any]) -> str | None:
        """Name the score by which a validation counts; None: the validation has no such score.

        It is the score of the moving average of the weights where the run keeps one.

        Args:
            row: row of validation.jsonl.
        """
        names = (AVERAGED + self.best_by, self.best_by)
        return next((n for n in names if type(row.get(n)) in (int, float)), None)

    def best_row(self, rows: Iterable[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
        """Return the name of the deciding score, and the first validation in which it is highest.

        None: no validation has a score.
        """
        scored = [(name, row) for row in rows if (name := self.best_score(row))]
        return max(scored, key=lambda pair: pair[1][pair[0]]) if scored else None


TASKS = {
    task.name: task
    for task in (
        Task(
            "pretrain",
            PretrainConfig,
            "train a masked autoencoder on shards",
            "Masked autoencoder, pre-trained",
            "image-feature-extraction",
            PROBES,
            "knn_top1",
        ),
        Task(
            "finetune",
            FinetuneConfig,
            "train a classifier, from weights or from scratch",
            "Classifier on the encoder of a masked autoencoder, fine-tuned",
            "image-classification",
            CLASSIFICATION,
            "top1",
            1000,
        ),
        Task(
            "linprobe",
            LinprobeConfig,
            "train a linear classifier on a frozen encoder",
            "Linear classifier on the frozen encoder of a masked autoencoder",
            "image-classification",
            CLASSIFICATION,
            "top1",
            1000,
        ),
        Task(
            "detect",
            DetectConfig,
            "train Mask R-CNN on the encoder, on shards of COCO",
            "Mask R-CNN on the encoder of a masked autoencoder",
            "object-detection",
            DETECTION,
            "box_ap",
            80,
        ),
        Task(
            "segment",
            SegmentConfig,
            "train UperNet on the encoder, on shards of ADE20K",
            "UperNet on the encoder of a masked autoencoder",
            "image-segmentation",
            SEGMENTATION,
            "miou",
            150,
        ),
    )
}


def task_of(config: Mapping[str, Any]) -> Task:
    """Find the task of a run or a recipe by the content of its config.

    A config that does not name its task belongs to the task that knows most of its keys.

    Args:
        config: nested or dotted keys.

    Raises:
        UserError: the config names a task that does not exist.
    """
    flat = flatten(dict(config))
    name = flat.get("task")
    if name is not None:
        if not isinstance(name, str) or name not in TASKS:
            raise UserError(f"task {name!r:.80} is not known; tasks: {', '.join(TASKS)}")
        return TASKS[name]
    return max(TASKS.values(), key=lambda task: sum(k in config_keys(task.config) for k in flat))


def task_of_arguments(argv: list[str]) -> Task:
    """Find the task that `--config` files and `--section.key` arguments belong to.

    Raises:
        UserError: a file is missing or not YAML.
    """
    return task_of(given_values(argv))


def _check_task(task: Task, given: Arguments) -> None:
    """Raise a UserError where a `--config` file belongs to another task."""
    for file, values in given.files:
        own = values.keys() <= config_keys(task.config).keys()
        if not own or values.get("task", task.name) != task.name:
            other = task_of(values)
            if other is not task and values.keys() <= config_keys(other.config).keys():
                raise UserError(
                    f"--config {file} is one of {other.name}, not of {task.name}; start it by "
                    f"mae-scale {other.name}"
                )


def main(name: str, argv: list[str], prog: str) -> int:
    """Train a task and return the exit code: 0 finished, 85 stopped early.

    Errors in the input are found while the training is prepared, before anything is written.

    Args:
        name: name of the task.
        argv: arguments behind the name of the command.
        prog: name of the command, for messages.

    Raises:
        UserError: something is wrong with the input.
        RunError: the run failed.
    """
    task = TASKS[name]
    given = Arguments.read(argv)
    _check_task(task, given)
    config = build(task.config, given, prog)
    world = World.from_environment()

    from mae_scale.launch.logs import set_up_logging
    from mae_scale.tasks.summary import summary
    from mae_scale.train.run import deepspeed_config, train

    set_up_logging(world)
    check_schedule(config)
    ds_config = deepspeed_config(config, world)
    with renamed(key_names(config)):
        training = task.module.prepare(config, world)
        for line in summary(config, world, training.model, training.loader.steps_per_epoch):
            log.info(line)
        return train(config, world, ds_config, training)
