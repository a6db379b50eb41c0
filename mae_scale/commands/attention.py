"""Draw where an encoder's class token looks: its attention in the last block, for each head."""

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
        help="run folder of pretrain, finetune or linprobe, a step folder in it, or weights: an "
        "export, a .pth of the authors, a .safetensors, a folder of timm or Hugging Face",
    )
    add("images", type=Path, nargs="+", help="image files, or folders of them")
    add(
        "--out",
        type=Path,
        default=Path("attention.png"),
        help="PNG to write (default: %(default)s)",
    )
    add("--most", type=int, default=8, help="number of images at the most (default: %(default)s)")
    add("--model", help="architecture of foreign weights that do not say it")
    add("--ema", action="store_true", help="use the moving average of the weights")
    add("--img_size", type=image_size, help=f"{IMG_SIZE}; a larger one gives finer maps")
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

    from mae_scale.commands.attending import run
    from mae_scale.launch.logs import set_up_logging
    from mae_scale.world import World

    world = World()
    set_up_logging(world)
    run(options, world)
    return 0
