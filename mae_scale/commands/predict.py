"""Show what a trained model sees in images, as pictures, JSON, and for classifiers a CSV."""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import IMG_SIZE, Parser, image_size
from mae_scale.data.formats import MAX_PIXELS


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add(
        "weights",
        type=Path,
        help="run folder of finetune, linprobe, detect or segment (its best checkpoint is taken), "
        "a step folder in it, or a classifier's weights: an export, a .pth of the authors, a "
        ".safetensors, a folder of timm or Hugging Face",
    )
    add("images", type=Path, nargs="+", help="image files, or folders of them")
    add(
        "--out",
        type=Path,
        default=Path("predictions"),
        help="folder for <image>.png and <image>.json, and for classifiers predictions.csv "
        "(default: %(default)s)",
    )
    add(
        "--top",
        type=int,
        default=5,
        help="number of names that a classifier gives (default: %(default)s)",
    )
    add(
        "--score",
        type=float,
        default=0.5,
        help="lowest score of an object that is shown (default: %(default)s)",
    )
    add("--img_size", type=image_size, help=f"of a classifier: {IMG_SIZE}")
    add("--model", help="architecture of foreign weights that do not say it, such as "
        "mae_vit_base_patch16")  # fmt: skip
    add(
        "--classes",
        help="classes of the outputs of foreign weights: shard folder, JSON list, or text with a "
        "name in each line; default: those that the weights name, or else numbers",
    )
    add("--ema", action="store_true", help="use the moving average of the weights")
    add(
        "--max_pixels",
        type=int,
        help="refuse larger images; default: data.max_pixels of the run, or for weights from "
        f"elsewhere {MAX_PIXELS}",
    )
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments and write pictures and JSON."""
    options = parser(prog).parse_args(argv)

    from mae_scale.commands.predicting import run
    from mae_scale.launch.logs import set_up_logging
    from mae_scale.world import World

    world = World()
    set_up_logging(world)
    run(options, world)
    return 0
