"""Measure a trained model on data sets: accuracy, also on the robustness sets of Appendix C.

Detectors get COCO's average precision, segmenters the mean intersection over union.
"""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import IMG_SIZE, Parser, image_size
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.world import data_workers


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add(
        "weights",
        type=Path,
        help="run folder of finetune, linprobe, detect or segment (its best checkpoint is taken), "
        "a step folder in one, or fine-tuned weights: a .pth of the authors, a .safetensors, a "
        "folder of timm or Hugging Face",
    )
    add(
        "data",
        nargs="*",
        metavar="NAME=SHARDS",
        help="shard folders, each with a name for the table (without one, its path)",
    )
    add("--imagenet_c", help="folder of <corruption>/<severity>/ shard folders: ImageNet-C")
    add(
        "--tables",
        type=Path,
        help="for classifiers: folder for two CSV files of each data set: a row for each class, "
        "and the confusion matrix",
    )
    add("--out", type=Path, help="JSON file to write")
    add("--ema", action="store_true", help="measure the moving average of the weights")
    add("--model", help="architecture of foreign weights that do not say it, such as "
        "mae_vit_base_patch16")  # fmt: skip
    add(
        "--classes",
        help="classes of the outputs of foreign weights: shard folder, JSON list, or text with a "
        "name in each line; without it, those that the weights name, or else those of the data",
    )
    add("--img_size", type=image_size, help=IMG_SIZE)
    add(
        "--crop_ratio",
        type=float,
        help="share of the short side that the centre crop covers; default: that of the weights, "
        "or 0.875 up to 224 pixels and 1.0 above",
    )
    add("--batch_size", type=int, default=64, help="images per rank (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=data_workers(),
        help="data-loading processes per rank (default: one less than its CPUs, 16 at the most)",
    )
    add(
        "--multi_scale",
        action="store_true",
        help="for runs of segment: six sizes and their mirror images (ADE20K's test with "
        "augmentation)",
    )
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    add("--cache_dir", help="folder into which remote shards are staged")
    add(
        "--max_pixels",
        type=int,
        help="refuse larger images; default: data.max_pixels of the run, or for weights from "
        f"elsewhere {MAX_PIXELS}",
    )
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, evaluate, print the table and write the JSON."""
    options = parser(prog).parse_intermixed_args(argv)  # data sets may come after options

    from mae_scale.commands.evaluating import run
    from mae_scale.launch.distributed import process_group
    from mae_scale.launch.logs import set_up_logging
    from mae_scale.world import World

    world = World.from_environment()
    set_up_logging(world)
    with process_group(world, hang_timeout=1800.0) as watchdog:
        run(options, world, watchdog)
    return 0
