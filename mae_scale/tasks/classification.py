"""The code that fine-tuning and probing share: classes, initial weights, validation."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import torch

from mae_scale.config.classification import FinetuneConfig, LinprobeConfig
from mae_scale.config.sections import RunConfig
from mae_scale.data.bands import Bands
from mae_scale.data.loader import EvalLoader
from mae_scale.data.shards import ShardSet, open_shards, shared_images
from mae_scale.errors import UserError
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models.classifier import Classifier
from mae_scale.models.weights import fit_to_classifier
from mae_scale.sharding.labels import normal
from mae_scale.tasks.summary import fitted
from mae_scale.tasks.trained import CLASSES, grid_of, read_any, warn_of_other_bands
from mae_scale.tasks.validating import validation_by
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loaders import common_to_loaders
from mae_scale.train.loop import Validation
from mae_scale.train.validation import evaluate
from mae_scale.world import World

log = logging.getLogger("mae_scale")


def classes_of(shards: ShardSet) -> list[str]:
    """Return the names of the classes of labelled shards, in the order of their labels.

    Raises:
        UserError: there are labels outside of the list, or fewer than two classes.
    """
    labels = shards.index["label"]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(shards.classes):
        raise UserError(
            f"{shards.root} has labels from {low} to {high}, but {len(shards.classes)} classes; "
            "expected 0 to one less than the classes (-1 is a sample without a label)"
        )
    if len(shards.classes) < 2:
        raise UserError(f"{shards.root} has {len(shards.classes)} class; nothing to classify")
    return shards.classes


def matched(
    shards: ShardSet, classes: list[str], whose: str = "the training shards'"
) -> torch.Tensor | None:
    """Match the labels of other shards with a list of classes, by the names of the classes.

    Accents may be written as one character or as two. The shards may have fewer classes.

    Args:
        shards: the other shards.
        classes: names of the classes, in the order of the model's outputs.
        whose: owner of these classes, for the message.

    Returns:
        Place among `classes` of each label of the shards, int64 [classes of the shards]; None:
        each label is its own place.

    Raises:
        UserError: the shards have classes that are not among `classes`.
    """
    own = [normal(name) for name in classes_of(shards)]
    place = {normal(name): i for i, name in enumerate(classes)}
    missing = [name for name in own if name not in place]
    if missing:
        more = ", …" if len(missing) > 4 else ""
        raise UserError(
            f"{shards.root} has {len(missing)} of {len(own)} classes that are not among {whose} "
            f"{len(classes)}: {', '.join(map(ascii, missing[:4]))}{more}; those are "
            f"{', '.join(map(ascii, classes[:4]))}, …"
        )
    numbers = [place[name] for name in own]
    return None if numbers == list(range(len(classes))) else torch.tensor(numbers)


def initial_weights(
    config: FinetuneConfig | LinprobeConfig, model: Classifier, new_head: bool = False
) -> Callable[[], dict[str, torch.Tensor]] | None:
    """Return a function that reads the weights to start from; None: training starts from scratch.

    Args:
        config: config of the run.
        model: model that gets them; it may be on the meta device.
        new_head: whether to leave out the head that the weights may have.
    """
    spec = config.weights
    if spec is None:
        return None

    def read() -> dict[str, torch.Tensor]:
        state = read_any(spec, model)
        warn_of_other_bands(spec, state, Bands.of(config))
        grid = grid_of(spec, state)
        weights = fit_to_classifier(state, model, new_head=new_head, grid=grid)
        log.info("from %s: %s", spec, fitted(state, weights, model))
        return weights

    return read


def notes(classes: list[str]) -> dict[str, str]:
    """Return the contents of the files that evaluation reads in a run folder, by file name."""
    return {CLASSES: json.dumps(classes) + "\n"}


def eval_loader(
    config: RunConfig, world: World, shards: ShardSet, crop_ratio: float | None = None
) -> EvalLoader:
    """Make the loader of this rank's part of data.val, as the sections of a config say.

    Args:
        config: config of the run.
        world: this process among the others.
        shards: shards of data.val.
        crop_ratio: share of the short side that the centre crop covers; None: 0.875 up to 224
            pixels, 1.0 above.
    """
    return EvalLoader(
        shards,
        batch_size=config.train.micro_batch_size,
        crop_ratio=crop_ratio,
        bands=Bands.of(config),
        **common_to_loaders(config, world),
    )


def validation(
    config: FinetuneConfig | LinprobeConfig, world: World, train: ShardSet
) -> Validation | None:
    """Make the validation that measures top-1, top-5 and loss on data.val; None without data.val.

    Where the run keeps a moving average of the weights, that is measured as well.

    Raises:
        UserError: there are no shards, or their classes are not those of the training shards.
    """
    if config.data.val is None:
        return None
    shards = open_shards(config.data.val, config.data.cache_dir)
    label_of = matched(shards, train.classes)
    if world.rank == 0 and (count := shared_images(shards, train)):
        log.warning("%d of the %d images of data.val are in data.train, too", count, len(shards))
    loader = eval_loader(config, world, shards, config.model.crop_ratio)

    def scores(
        engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        found = evaluate(
            engine,
            loader,
            classes=len(train.classes),
            device=world.device,
            doing=watchdog.doing,
            what="validating",
            stop=stop,
            label_of=label_of,
        )
        return None if found is None else found.row()

    return validation_by(config, config.train.validate_epochs, scores)
