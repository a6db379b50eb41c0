"""Export: the weights of a run in the forms of the authors' code, timm and Hugging Face."""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mae_scale.config.sizes import ImageSize
from mae_scale.data.bands import RGB, Bands
from mae_scale.data.transforms import default_crop_ratio
from mae_scale.errors import RunError, UserError
from mae_scale.files import as_utf8, is_utf8, owner, sync_folder, sync_tree
from mae_scale.inference.model_card import MARK, model_card
from mae_scale.models import hugging_face, timm_form
from mae_scale.models.classifier import Classifier, ProbeHead
from mae_scale.models.dense_weights import BACKBONE
from mae_scale.models.description import CARD, CONFIG, PREPROCESSOR, facts_of
from mae_scale.models.hugging_face import StateDict
from mae_scale.tasks.trained import TrainedRun
from mae_scale.world import World

log = logging.getLogger("mae_scale")

SAFETENSORS, PTH = "model.safetensors", "model.pth"
SINGLE_FILE = {"official": ".pth", "timm": ".safetensors"}  # ending of OUT where it is a file


def run(options: argparse.Namespace, world: World) -> None:
    """Export as the options of `mae-scale export` say; see `export`."""
    export(options.run, options.to, options.out, options.ema)


def export(run: str | Path, to: str, out: str | Path, ema: bool = False) -> None:
    """Write the weights of a run, and a model card, into a new folder or file.

    The GPUs that trained them are not needed. Only the weights of the checkpoint are read into
    memory, once, and no other state.

    Args:
        run: run folder, or a step folder in one.
        to: form of the weights: official, timm or huggingface.
        out: folder to make, or a file where one is enough (`SINGLE_FILE`), with the card beside
            it. It is written whole or not at all, and replaces an earlier export.
        ema: whether to export the moving average of the weights.

    Raises:
        UserError: there is no checkpoint, `out` holds something else, or the form cannot hold this
            model.
        RunError: the export cannot be written.
    """
    out = Path(out)
    check_place(out, to)
    trained = TrainedRun.chosen(run)
    with torch.device("meta"):
        model = trained.model()
    try:
        form = FORMATS[to](trained, model, lambda: _weights(trained, model, ema))
    except UserError as error:
        raise UserError(f"--to {to}: {error}") from None
    single = out.suffix == SINGLE_FILE.get(to)
    lines = [line for line in form.code.splitlines() if not (single and "FOLDER" in line)]
    places = {"FOLDER": str(out), "FILE": str(out if single else out / form.weights)}
    code = re.sub("FOLDER|FILE", lambda found: places[found[0]], "\n".join(lines).strip())
    facts = facts_of(
        trained.config.model.name,
        model,
        crop_ratio=_crop_ratio(trained, trained.config.model.img_size) if trained.classes else None,
        switches=vars(trained.config.model),
        **_facts_of_images(trained),
        **(
            {"classes": trained.classes}
            if to == "official" and isinstance(model, Classifier)
            else {}
        ),
    )
    card = model_card(trained, ema, to, form.library, code, facts)
    try:
        if single:
            _write_file(out, form, card)
        else:
            _write_folder(out, form, card)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} cannot be written: {error}") from None
    size = sum(value.nbytes for value in form.state.values())
    log.info("wrote %s: %s of %s, %.1f MB", out, to, trained.folder, size / 1e6)


def check_place(out: Path, to: str) -> None:
    """Raise a UserError where `out` cannot be made, or holds anything but an earlier export.

    Args:
        out: folder or file to write.
        to: form of the weights.
    """
    if not is_utf8(out):
        raise UserError(f"path {str(out)!r} is not UTF-8, which PyTorch needs; use another name")
    endings = (*SINGLE_FILE.values(), ".pt", ".bin")
    wanted = SINGLE_FILE.get(to)
    if out.suffix in endings and out.suffix != wanted:
        may = f"a folder or a file ending in {wanted}" if wanted else "a folder"
        raise UserError(f"{out}: --to {to} writes {may}")
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{out} cannot be made: {parent} is no folder")
    if out.suffix == wanted:
        card = out.with_suffix(".md")
        if out.is_dir() or ((out.exists() or card.exists()) and not _is_card(card)):
            raise UserError(f"{out} or {card} exists and is no earlier export; use another name")
        return
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; --to {to} writes a folder")
    names = {path.name for path in out.iterdir()}
    ours = names <= {CARD, SAFETENSORS, PTH, CONFIG, PREPROCESSOR} and _is_card(out / CARD)
    if names and not ours:
        raise UserError(
            f"{out} is a folder that holds something else than an earlier export; use an empty or "
            "new one"
        )


def _is_card(path: Path) -> bool:
    return path.is_file() and MARK in path.read_text(errors="replace")


def _weights(trained: TrainedRun, model: torch.nn.Module, ema: bool) -> StateDict:
    """Read all weights by the authors' keys, in the order of the model; all but counters are fp32.

    Raises:
        UserError: the weights do not fit the model that the run's config describes.
    """
    expected = model.state_dict()
    state = trained.whole_weights(ema)
    return {key: state[key].to(value.dtype) for key, value in expected.items()}


@dataclass
class Form:
    """The contents of an export."""

    state: StateDict
    """Weights by the keys of this form."""
    weights: str
    """Name of the file of the weights, where the export is a folder."""
    files: dict[str, Any]
    """Contents of the JSON files beside the weights, by file name."""
    library: str
    """Library that loads the weights, as the Hub names it."""
    code: str
    """Lines of Python that load the weights from FOLDER, or from FILE in it."""


def official(trained: TrainedRun, model: Any, weights: Callable[[], StateDict]) -> Form:
    """Make the form of the authors' code: all weights, or the encoder of a detector or segmenter.

    Args:
        trained: checkpoint to export.
        model: its model on the meta device.
        weights: function that reads the weights by the authors' keys.
    """
    code = """
import torch

state = torch.load("FILE", weights_only=True)["model"]  # keys of facebookresearch/mae
"""
    state = weights()
    inner = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
    return Form(inner or state, PTH, {}, "pytorch", code)


def timm(trained: TrainedRun, model: Any, weights: Callable[[], StateDict]) -> Form:
    """Make the form of timm: the encoder of a masked autoencoder, or a classifier.

    Arguments are those of `official`.

    Raises:
        UserError: the classifier's head is not one linear layer, or timm has no such encoder.
    """
    _check_encoder(model)
    _check_head(model)
    name, kwargs = timm_form.arguments(trained.config.model.name, model)
    state = timm_form.to_timm(_folded(weights(), model), name, kwargs)
    code = f"""
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)
model = timm.create_model({_call(name, kwargs)}, checkpoint_path="FILE")
"""
    bands = Bands.of(trained.config)
    preprocessing = {
        "interpolation": "bicubic",
        "crop_pct": _crop_ratio(trained, model.patch_embed.img_size),
        "crop_mode": "center",
        "mean": list(bands.mean),
        "std": list(bands.std),
    }
    config = timm_form.config(name, kwargs, model, trained.classes, preprocessing)
    return Form(state, SAFETENSORS, {CONFIG: config}, "timm", code)


def huggingface(trained: TrainedRun, model: Any, weights: Callable[[], StateDict]) -> Form:
    """Make the form of Hugging Face: a ViTMAEForPreTraining or a ViTForImageClassification.

    Arguments are those of `official`.

    Raises:
        UserError: the classifier's head is not one linear layer, or these classes cannot hold the
            model.
    """
    _check_encoder(model)
    if not trained.classes:
        names = ["ViTMAEForPreTraining", "ViTMAEModel"]
        config = hugging_face.mae_config(model)
    else:
        _check_head(model)
        names = ["ViTForImageClassification"]
        config = hugging_face.classifier_config(model, trained.classes)
    state = hugging_face.to_hugging_face(_folded(weights(), model))
    bands, (height, width) = Bands.of(trained.config), model.patch_embed.img_size
    sizes: dict[str, Any] = {
        "image_processor_type": "BitImageProcessor",  # it resizes the short side, then crops
        "size": {"shortest_edge": int(height / _crop_ratio(trained, height))},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
    if height != width:
        # The BitImageProcessor would crop too little of a rectangle, and fill up the rest. The
        # ViTImageProcessor stretches the image instead.
        size = {"height": height, "width": width}
        sizes = {"image_processor_type": "ViTImageProcessor", "size": size}
    preprocessor = {
        **sizes,
        "do_convert_rgb": bands.count == 3,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(bands.mean),
        "image_std": list(bands.std),
    }
    loads = "\n".join(f'model = {name}.from_pretrained("FOLDER")' for name in names)
    code = f"""
from transformers import AutoImageProcessor, {", ".join(names)}

processor = AutoImageProcessor.from_pretrained("FOLDER")
{loads}
"""
    files = {CONFIG: config, PREPROCESSOR: preprocessor}
    return Form(state, SAFETENSORS, files, "transformers", code)


FORMATS: dict[str, Callable[[TrainedRun, Any, Callable[[], StateDict]], Form]] = {
    "official": official,
    "timm": timm,
    "huggingface": huggingface,
}


def _check_encoder(model: Any) -> None:
    """Raise a UserError for an encoder that the models of other libraries cannot represent."""
    if hasattr(model, "backbone"):
        raise UserError(
            "its models have no windows and no relative positions, which the encoder "
            "of this one has; --to official writes the encoder"
        )


def _check_head(model: Any) -> None:
    if "head.fc1.weight" in model.state_dict():
        raise UserError(
            "its classifiers end in one linear layer, this one in an MLP (model.head "
            "mlp); use --to official"
        )


def _folded(state: StateDict, model: Any) -> StateDict:
    if isinstance(getattr(model, "head", None), ProbeHead):
        return timm_form.fold_probe(state, model.head[0].eps)
    return state


def _crop_ratio(trained: TrainedRun, size: ImageSize) -> float:
    return getattr(trained.config.model, "crop_ratio", None) or default_crop_ratio(size)


def _facts_of_images(trained: TrainedRun) -> dict[str, Any]:
    """Return the bands of the images for the card, where they are not ImageNet's."""
    bands = Bands.of(trained.config)
    if bands == RGB:
        return {}
    facts: dict[str, Any] = {"mean": list(bands.mean), "std": list(bands.std)}
    if bands.value_range is not None:
        facts["value_range"] = np.array(bands.value_range).tolist()
    return facts


def _call(name: str, kwargs: dict[str, Any]) -> str:
    return ", ".join([f'"{name}"', *(f"{k}={json.dumps(v)}" for k, v in kwargs.items())])


def _save(form: Form, path: Path, mode: int) -> None:
    if path.suffix == ".pth":
        try:
            torch.save({"model": form.state}, path)
        except RuntimeError:  # its message speaks of positions in a zip file, which helps nobody
            raise OSError("torch.save failed; is there room on the disk?") from None
    else:
        save_file(form.state, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors makes files that only their owner can read


def _write_folder(out: Path, form: Form, card: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(out) as new:
        new.mkdir()
        (new / CARD).write_bytes(as_utf8(card))
        _save(form, new / form.weights, mode=(new / CARD).stat().st_mode)
        for name, content in form.files.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n")
        sync_tree(new)
        with _unfinished(out, "old") as old:
            if out.exists():
                out.rename(old)
            new.rename(out)
    sync_folder(out.parent)


def _write_file(out: Path, form: Form, card: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(out) as new:
        new.mkdir()
        (new / CARD).write_bytes(as_utf8(card))
        _save(form, new / out.name, mode=(new / CARD).stat().st_mode)
        sync_tree(new)
        (new / CARD).replace(out.with_suffix(".md"))
        (new / out.name).replace(out)
    sync_folder(out.parent)


@contextmanager
def _unfinished(out: Path, what: str = "new") -> Iterator[Path]:
    """Yield a temporary path beside `out`, and remove in the end what is left there."""
    path = out.with_name(f".{out.name}.{owner()}.{what}")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
