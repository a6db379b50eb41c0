"""Show what a trained model sees in images, as pictures, JSON, and for classifiers a CSV."""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import (
    Parser,
    add_images,
    add_img_size,
    add_max_pixels,
    add_weights,
    command,
    number,
    whole,
)


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add_weights(parser, "finetune, linprobe, detect or segment", " of a classifier", classes=True)
    add_images(parser)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("predictions"),
        help="folder for <image>.png and <image>.json, and for classifiers predictions.csv "
        "(default: %(default)s)",
    )
    add(
        "--top",
        type=whole(1),
        default=5,
        help="number of names that a classifier gives (default: %(default)s)",
    )
    add(
        "--score",
        type=number(0, 1),
        default=0.5,
        help="lowest score of an object that is shown (default: %(default)s)",
    )
    add_img_size(parser, "; for classifiers only")
    add_max_pixels(parser)
    return parser


main = command(parser, "mae_scale.inference.predict")
