"""Reconstructing: drawing what a pre-trained model makes of masked images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from mae_scale.config.sizes import ImageSize
from mae_scale.data.bands import RGB, Bands
from mae_scale.data.formats import IMAGE_SUFFIXES, MAX_PIXELS, image_files
from mae_scale.data.transforms import eval_crop
from mae_scale.errors import UserError
from mae_scale.files import read_file
from mae_scale.models import MaskedAutoencoderViT, build_mae
from mae_scale.models.description import describe
from mae_scale.models.weights import fit_to_mae, read_weights
from mae_scale.tasks.figures import save_reconstruction_grid
from mae_scale.tasks.trained import TrainedRun, bands_of, grid_in, is_ours
from mae_scale.train import checkpoint

log = logging.getLogger("mae_scale")


def reconstruct(
    weights: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    most: int,
    mask_ratio: float | None,
    seed: int,
    model: str | None = None,
    norm_pix_loss: str | None = None,
    max_pixels: int | None = None,
) -> None:
    """Write the grid of original, masked, reconstruction, and reconstruction with visible patches.

    Args:
        weights: run folder, step folder, or foreign weights with a decoder.
        images: image files, and folders of them.
        out: PNG to write or replace.
        most: largest number of images; more are thinned out evenly.
        mask_ratio: share of the patches that is removed, in (0, 1); None: that of the model.
        seed: number that decides the masks.
        model: architecture of foreign weights that do not name it.
        norm_pix_loss: "true" or "false": whether foreign weights predict normalised pixels; None:
            they say it themselves.
        max_pixels: most pixels that an image may have; None: the limit of the run.

    Raises:
        UserError: there are no weights or no images, an image cannot be decoded, or the mask ratio
            is out of its range.
    """
    weights, out = Path(weights), Path(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    if max_pixels is not None and max_pixels < 1:
        raise UserError(f"--max_pixels {max_pixels} must be at least 1")
    if most < 1:
        raise UserError(f"--most {most} must be at least 1")
    files = choose_images([Path(image) for image in images], most)
    if is_ours(weights):
        if model is not None or norm_pix_loss is not None:
            raise UserError(
                f"--model and --norm_pix_loss are of foreign weights; {weights} is a run"
            )
        folder = checkpoint.find_checkpoint(weights)
        trained = TrainedRun.read(folder)
        mae = load_mae(folder)
        limit, bands = trained.config.data.max_pixels, Bands.of(trained.config)
        step = checkpoint.Commit.read(folder).step
        source = f"{folder.parents[1].resolve().name} at step {step:,}"
    else:
        (mae, bands), source = load_foreign(weights, model, norm_pix_loss), weights.name
        limit = MAX_PIXELS
    size = mae.patch_embed.img_size
    pixels = torch.stack([read_centre(file, size, max_pixels or limit, bands) for file in files])
    number = torch.arange(len(files))
    noise = mae.noise(seed, torch.zeros_like(number), number, mask_ratio)
    inputs = bands.normalize(pixels)
    reconstruction, mask = mae.reconstruct(inputs, noise, mask_ratio)
    ratio = mae.mask_ratio if mask_ratio is None else mask_ratio
    save_reconstruction_grid(
        out,
        bands.denormalize(inputs),
        mask,
        bands.denormalize(reconstruction),
        title=f"{source}: {100 * ratio:g} % of the patches are hidden",
        captions=[file.name for file in files],
    )
    log.info("wrote %s: %d images", out, len(files))


def load_mae(folder: Path) -> MaskedAutoencoderViT:
    """Load the masked autoencoder of a checkpoint, in fp32 on the CPU, as the run's config says.

    Args:
        folder: step folder.

    Raises:
        UserError: the run is not one of pre-training, or the checkpoint does not fit its config.
    """
    trained = TrainedRun.read(folder)
    if trained.task.name != "pretrain":
        raise UserError(f"{trained.run_dir} is a run of {trained.task.name}, which has no decoder")
    model: MaskedAutoencoderViT = trained.model_with_weights()
    return model.eval()


def load_foreign(
    path: Path, name: str | None, norm_pix_loss: str | None
) -> tuple[MaskedAutoencoderViT, Bands]:
    """Load the masked autoencoder of foreign weights, in fp32 on the CPU, and its images' bands.

    The sizes of the model follow from the shapes of the weights.

    Args:
        path: file or folder of weights.
        name: architecture; None: the one that the weights name.
        norm_pix_loss: "true" or "false"; None: what the weights say.

    Raises:
        UserError: the weights do not fit or have no decoder, or nothing says what they are.
    """
    if not path.exists():
        raise UserError(f"there is no run folder, step folder or file of weights {path}")
    described = describe(path)
    name = name or described.name
    if name is None:
        raise UserError(
            f"{path} is neither a run folder nor a committed checkpoint of one; of weights from "
            "elsewhere say what they are: --model NAME"
        )
    state = read_weights(path)
    switches = described.switches
    if norm_pix_loss is not None:
        switches = {**switches, "norm_pix_loss": norm_pix_loss == "true"}
    if "norm_pix_loss" not in switches:
        raise UserError(
            f"{path} does not say whether it predicts normalised pixels, and published weights "
            "exist in both kinds; add --norm_pix_loss true or --norm_pix_loss false"
        )
    sizes = described.sizes_for(state, decoder=True)
    model = build_mae(name, **switches, **sizes)
    model.load_state_dict(fit_to_mae(state, model, whole=True, grid=grid_in(sizes)))
    return model.eval(), bands_of(path, described, sizes)


def choose_images(paths: list[Path], most: int) -> list[Path]:
    """List image files, and those in folders; where there are too many, some at even distances.

    Args:
        paths: image files, and folders of them.
        most: largest number of files.

    Raises:
        UserError: a path does not exist, or a folder holds no images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = image_files(path)
            if not found:
                raise UserError(f"{path} holds no images (.{', .'.join(IMAGE_SUFFIXES)})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"there is no image or folder {path}")
    if len(files) <= most:
        return files
    return [files[i * len(files) // most] for i in range(most)]


def read_centre(
    file: Path, size: ImageSize, max_pixels: int, bands: Bands = RGB, crop_ratio: float = 1.0
) -> torch.Tensor:
    """Read the centre of an image, resized to `size`, as uint8 [C, height, width].

    Args:
        file: image file.
        size: side, or height and width, in pixels.
        max_pixels: most pixels that the image may have.
        bands: bands of the image.
        crop_ratio: share of the image that the centre covers, as for `eval_crop`.

    Raises:
        UserError: the file cannot be read or decoded.
    """
    try:
        return eval_crop(bands.decode(read_file(file), max_pixels), size, crop_ratio)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} {error}") from None
