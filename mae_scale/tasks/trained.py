"""Trained runs for other commands: reading their config, their model and their weights."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_scale.config.parsing import from_mapping
from mae_scale.config.sections import RunConfig
from mae_scale.config.sizes import ImageSize, sides
from mae_scale.config.yaml_files import read_yaml
from mae_scale.data.bands import RGB, Bands, checked_range
from mae_scale.errors import UserError
from mae_scale.files import read_file
from mae_scale.launch.distributed import on_rank0
from mae_scale.models.dense_weights import BACKBONE
from mae_scale.models.description import Description, describe
from mae_scale.models.weights import check_finite, read_weights, sizes_of
from mae_scale.tasks.task import Task, task_of
from mae_scale.train import checkpoint
from mae_scale.train.loading import load_averages, load_weights
from mae_scale.train.optimizers import optimizer_order

log = logging.getLogger("mae_scale")

_MOST_BYTES = 1 << 24  # size limit of classes.json
CLASSES = "classes.json"  # in the run folder of a task that has classes


def read_any(path: str | Path, model: Any = None) -> dict[str, torch.Tensor]:
    """Read weights of any kind as a state dict.

    Args:
        path: run folder, whose best or newest checkpoint is taken, a step folder in one, or
            foreign weights: a file, or a folder of timm or Hugging Face.
        model: model that gets the weights, whose sizes must be theirs; None: nothing is compared.

    Raises:
        UserError: there are no weights, or they are those of a model of other sizes. Attention
            heads count as far as the weights say how many they have: the shapes are the same for
            any number, but the model would compute something else.
    """
    run = TrainedRun.read(best_checkpoint(path)) if is_ours(path) else None
    is_dense = hasattr(model, "backbone")
    keep = BACKBONE if is_dense else ""
    state = read_weights(path, keep) if run is None else run.weights()
    if model is None:
        return state
    if run is None:
        inner = _encoder_of(state)
        theirs = describe(path).sizes_for(inner, decoder="decoder_embed.weight" in inner)
    else:
        with torch.device("meta"):
            theirs = _sizes_of(run.model())
    own, free = _sizes_of(model), ("img_size", "in_chans", *(("patch_size",) if is_dense else ()))
    wrong = {key: theirs[key] for key in own if theirs.get(key, own[key]) != own[key]}
    settings = [f"model.{key} {value}" for key, value in wrong.items() if key not in free]
    if settings:
        raise UserError(f"weights: {path} is of another size; set {' and '.join(settings)}")
    return state


def _encoder_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inner = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
    return inner or state


def _sizes_of(model: Any) -> dict[str, Any]:
    """Return the sizes of a model, attention heads included, as arguments that build it."""
    sizes = sizes_of(_encoder_of(model.state_dict()))
    sizes["num_heads"] = getattr(model, "backbone", model).blocks[0].attn.num_heads
    if hasattr(model, "decoder_blocks"):
        sizes["decoder_num_heads"] = model.decoder_blocks[0].attn.num_heads
    return sizes


def bands_of(path: str | Path, described: Description, sizes: dict[str, Any]) -> Bands:
    """Return the bands of the images that foreign weights are for.

    Without a description images of three bands are normalised as ImageNet's.

    Args:
        path: path of the weights, for the message.
        described: description that lies beside the weights.
        sizes: sizes of their model, from `Description.sizes_for`.

    Raises:
        UserError: the images have another number of bands, and nothing says how to normalise them.
    """
    count, mean, std = sizes.get("in_chans", 3), described.mean, described.std
    if mean and std and len(mean) == len(std) == count and min(std) > 0:
        try:
            return Bands(count, mean, std, checked_range(described.value_range, count))
        except ValueError as error:
            raise UserError(f"{path}: value_range {error}") from None
    if count != 3:
        raise UserError(
            f"{path} is for images of {count} bands, and does not say how they are normalised; "
            "use the run folder"
        )
    return RGB


def warn_of_other_bands(path: str | Path, state: dict[str, torch.Tensor], bands: Bands) -> None:
    """Warn where weights to start from know their images with other values than a run has.

    Args:
        path: run folder, step folder, or foreign weights.
        state: the weights.
        bands: bands of the run that starts from them.
    """
    if is_ours(path):
        theirs = Bands.of(TrainedRun.read(best_checkpoint(path)).config)
    else:
        described = describe(path)
        sizes = described.sizes_for(state)
        if described.mean is None or sizes.get("in_chans", 3) != bands.count:
            return
        theirs = bands_of(path, described, sizes)
    names = ("mean", "std", "value_range")
    differ = [name for name in names if getattr(theirs, name) != getattr(bands, name)]
    if theirs.count == bands.count and differ:
        log.warning(
            "%s: images were normalised by %s; this run has %s",
            path,
            ", ".join(f"data.{name} {_shown(getattr(theirs, name))}" for name in differ),
            ", ".join(_shown(getattr(bands, name)) for name in differ),
        )


def _shown(value: Any) -> str:
    return "null" if value is None else str(np.array(value).tolist())


def grid_in(sizes: dict[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of patches of a model; None for square images.

    Args:
        sizes: sizes of the model, from `Description.sizes_for`.
    """
    height, width = sides(sizes.get("img_size", 0))
    patch = sizes.get("patch_size", 16)
    return None if height == width else (height // patch, width // patch)


def grid_of(path: str | Path, state: dict[str, torch.Tensor]) -> tuple[int, int] | None:
    """Return the rows and columns of patches of weights whose images are not square.

    None: the images are square, or nothing says that they are not.

    Args:
        path: run folder, step folder, or foreign weights.
        state: the weights.
    """
    if not is_ours(path):
        return grid_in(describe(path).sizes_for(state))
    trained = TrainedRun.read(best_checkpoint(path))
    if isinstance(trained.config.model.img_size, int):
        return None
    with torch.device("meta"):
        return trained.model().grid


def is_ours(path: str | Path) -> bool:
    """Return whether a path is a run folder or a committed step folder."""
    path = Path(path)
    return (path / checkpoint.COMMITTED).exists() or (path / "config.yaml").exists()


def best_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint of a run folder that has the best validation, or else the newest one.

    If the path is a step folder, that is the checkpoint.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    return chosen_checkpoint(path)[0]


def chosen_checkpoint(path: str | Path) -> tuple[Path, str]:
    """Find the checkpoint that `best_checkpoint` finds, and say in words why it is the one."""
    path = Path(path)
    best = None if (path / checkpoint.COMMITTED).exists() else checkpoint.best_of(path)
    folder = checkpoint.find_checkpoint(best or path)
    if folder == path:
        return folder, "the step that was named"
    score = checkpoint.Commit.read(folder).score
    if best is None or score is None:
        return folder, "the newest; nothing was validated"
    return folder, f"the best validation, {score:.4g}"


def _sizes(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


@dataclass
class TrainedRun:
    """A checkpoint, and the run that it belongs to."""

    folder: Path
    """Step folder of the checkpoint."""
    task: Task
    """Task of the run."""
    config: RunConfig
    """Config of the run."""
    classes: list[str]
    """Names of the model's outputs, in order; empty for pre-training."""
    why: str = ""
    """Reason in words why this checkpoint of the run was chosen."""

    @classmethod
    def chosen(cls, path: str | Path) -> TrainedRun:
        """Read the run of the checkpoint that `chosen_checkpoint` finds, and log which it is.

        All ranks call.
        """
        folder, why = on_rank0(lambda: chosen_checkpoint(path))
        run = replace(cls.read(folder), why=why)
        log.info("%s: %s (%s)", run.run_dir, folder.name, why)
        return run

    @classmethod
    def read(cls, folder: str | Path) -> TrainedRun:
        """Read the config and the classes of the run that a step folder belongs to, but no weights.

        Raises:
            UserError: config.yaml or classes.json of the run cannot be read.
        """
        folder = Path(folder)
        run_dir = folder.parents[1]
        path, notes = run_dir / "config.yaml", run_dir / CLASSES
        try:
            content = read_yaml(path, of_a_run=True)
            classes = json.loads(read_file(notes, _MOST_BYTES)) if notes.exists() else []
        except (OSError, ValueError, RecursionError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{run_dir} is no run folder that can be read: {text}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path} is not the config of a run")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"{notes} is not a list of the names of classes")
        task = task_of(content)
        return cls(folder, task, from_mapping(task.config, content), classes)

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.folder.parents[1]

    def model(self, img_size: ImageSize | None = None) -> Any:
        """Build the model of the run with new weights, on the device of the context.

        Args:
            img_size: side, or height and width, of the images in pixels; None: that of training.
        """
        config = self.config
        if img_size is not None:
            section = config.model.model_copy(update={"img_size": img_size})
            config = config.model_copy(update={"model": section})
        return self.task.module.build(config, len(self.classes))

    def model_with_weights(self, ema: bool = False) -> Any:
        """Build the model of the run with its weights, in fp32 on the CPU; all ranks call.

        Arguments and errors are those of `whole_weights`.
        """
        state = self.whole_weights(ema)
        model = self.model()
        model.load_state_dict(state)
        return model

    def whole_weights(self, ema: bool = False) -> dict[str, torch.Tensor]:
        """Read the state dict in fp32, and check its keys and shapes by the model; all ranks call.

        Args:
            ema: whether to take the moving averages, as for `weights`.

        Raises:
            UserError: the checkpoint does not hold the weights of the run's model.
        """
        state = self.weights(ema)
        # On the meta device, a config that does not belong to the weights needs no memory.
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in self.model().state_dict().items()}
        found = {key: value.shape for key, value in state.items()}
        if shapes != found:
            key = next(k for k in [*shapes, *found] if shapes.get(k) != found.get(k))
            raise UserError(
                f"{self.folder} does not fit the config of its run: see {key}, which has the shape "
                f"{_sizes(found.get(key))}, expected {_sizes(shapes.get(key))}"
            )
        return state

    def weights(self, ema: bool = False) -> dict[str, torch.Tensor]:
        """Read the state dict in fp32; all ranks call.

        Args:
            ema: whether to take, in the place of each trained parameter, its moving average.

        Raises:
            UserError: the run keeps no moving average.
        """
        state = load_weights(self.folder)
        check_finite(state, self.folder)
        if not ema:
            return state
        if self.config.optim.average_decay is None:
            raise UserError(f"{self.run_dir} keeps no moving average (optim.ema_decay)")
        with torch.device("meta"):
            model = self.model()
        averages = load_averages(self.folder, optimizer_order(model, self.config.optim))
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return state | {name: average.view(shapes[name]) for name, average in averages.items()}
