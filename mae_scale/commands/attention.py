"""Draw where an encoder's class token looks: its attention in the last block, for each head."""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import (
    Parser,
    add_images,
    add_img_size,
    add_max_pixels,
    add_weights,
    command,
    file_name,
)


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add_weights(parser, "pretrain, finetune or linprobe")
    add_images(parser, most=8)
    parser.add_argument(
        "--out",
        type=file_name(".png"),
        default=Path("attention.png"),
        help="PNG to write (default: %(default)s)",
    )
    add_img_size(parser, "; a larger one gives finer maps")
    add_max_pixels(parser)
    return parser


main = command(parser, "mae_scale.inference.attention")
