"""A trained run as evaluate, reconstruct and export see it: its config, its model, its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mae_scale.config.sections import FinetuneOptimConfig, ModelConfig
from mae_scale.errors import UserError
from mae_scale.models import Classifier, MaskedAutoencoderViT, build_classifier, build_mae
from mae_scale.tasks.classification import CLASSES, run_config
from mae_scale.train import checkpoint
from mae_scale.train.optimizers import optimizer_order


@dataclass
class Trained:
    """A checkpoint, and the run that it is of."""

    folder: Path
    """The step folder."""
    config: dict[str, Any]
    """Of the run."""
    task: str
    """pretrain, finetune or linprobe."""
    classes: list[str]
    """Of the outputs, in order; none of pre-training."""

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """Read what the run of a step folder says of it, but no weights."""
        config, notes = run_config(folder), folder.parents[1] / CLASSES
        if not notes.exists():
            return cls(folder, config, "pretrain", [])
        task = "linprobe" if "momentum" in config["optim"] else "finetune"
        return cls(folder, config, task, json.loads(notes.read_text()))

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.folder.parents[1]

    def mae(self) -> MaskedAutoencoderViT:
        """The model of a run of pre-training, with fresh weights."""
        return build_mae(**ModelConfig(**self.config["model"]).build_kwargs())

    def classifier(self, img_size: int | None = None) -> Classifier:
        """The model of a run of fine-tuning or probing, with fresh weights.

        Args:
            img_size: another one than it was trained at.
        """
        section = {k: v for k, v in self.config["model"].items() if v is not None}
        section.pop("crop_ratio", None)
        if self.task == "linprobe":
            section["head"] = "probe"
        if img_size is not None:
            section["img_size"] = img_size
        return build_classifier(num_classes=len(self.classes), **section)

    def weights(self, ema: bool = False) -> dict[str, torch.Tensor]:
        """The state dict in fp32; all ranks call.

        Args:
            ema: the moving averages of the parameters that were trained, instead of these.

        Raises:
            UserError: the run keeps no moving average.
        """
        if not ema:
            return checkpoint.load_weights(self.folder)
        if self.config["optim"].get("ema_decay") is None:
            raise UserError(f"--ema: {self.run_dir} keeps no moving average (optim.ema_decay)")
        with torch.device("meta"):
            model = self.classifier()
        if self.config["train"]["tune_blocks"] is not None:
            model.tune_last(self.config["train"]["tune_blocks"])
        order = optimizer_order(model, FinetuneOptimConfig(**self.config["optim"]))
        averages = checkpoint.load_averages(self.folder, order)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state = checkpoint.load_weights(self.folder)
        return state | {name: average.view(shapes[name]) for name, average in averages.items()}
