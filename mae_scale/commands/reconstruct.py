"""Draw what a pre-trained model predicts for masked images."""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import (
    Parser,
    add_images,
    add_max_pixels,
    add_weights,
    command,
    file_name,
    number,
    whole,
)


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add_weights(parser, "pretrain", " with a decoder")
    add_images(parser, most=16)
    add = parser.add_argument
    add(
        "--out",
        type=file_name(".png"),
        default=Path("reconstructions.png"),
        help="PNG to write (default: %(default)s)",
    )
    add(
        "--mask_ratio",
        type=number(0, 1, open_at=(0, 1)),
        help="share of patches removed; default: that of the weights",
    )
    add("--seed", type=int, default=0, help="number that decides the masks (default: %(default)s)")
    add("--decoder_num_heads", type=whole(1), help="the same as --num_heads, of the decoder")
    add(
        "--norm_pix_loss",
        choices=["true", "false"],
        help="whether foreign weights predict normalised pixels; exports and Hugging Face's say so "
        "themselves",
    )
    add_max_pixels(parser)
    return parser


main = command(parser, "mae_scale.inference.reconstruct")
