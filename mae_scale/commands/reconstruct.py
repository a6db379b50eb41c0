"""Draw what a pre-trained model makes of masked images."""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import Parser
from mae_scale.data.formats import MAX_PIXELS


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add(
        "weights",
        type=Path,
        help="run folder of pretrain, a step-… folder in it, or weights with a decoder: a .pth of "
        "the authors, a .safetensors, a folder of Hugging Face",
    )
    add("images", type=Path, nargs="+", help="image files, or folders of them")
    add(
        "--out",
        type=Path,
        default=Path("reconstructions.png"),
        help="PNG to write (default: %(default)s)",
    )
    add(
        "--most",
        type=int,
        default=16,
        help="number of images at the most (default: %(default)s)",
    )
    add("--mask_ratio", type=float, help="share of patches removed, in (0, 1)")
    add("--seed", type=int, default=0, help="number that decides the masks (default: %(default)s)")
    add("--model", help="architecture of foreign weights that do not say it")
    add(
        "--norm_pix_loss",
        choices=["true", "false"],
        help="whether foreign weights predict normalised pixels; exports and Hugging Face's say so "
        "themselves",
    )
    add(
        "--max_pixels",
        type=int,
        help="refuse larger images; default: data.max_pixels of the run, or for weights from "
        f"elsewhere {MAX_PIXELS}",
    )
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments and write the picture."""
    options = parser(prog).parse_args(argv)

    from mae_scale.commands.reconstructing import reconstruct
    from mae_scale.launch.logs import set_up_logging
    from mae_scale.world import World

    set_up_logging(World())
    reconstruct(**vars(options))
    return 0
