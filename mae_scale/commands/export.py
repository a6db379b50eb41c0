"""Write the weights of a run for the authors' code, timm or Hugging Face."""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import Parser, command

FORMATS = ("official", "timm", "huggingface")


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add(
        "run",
        type=Path,
        help="run folder (its checkpoint with the best validation, or the newest one where "
        "nothing was validated), or a step-… folder in it",
    )
    add(
        "out",
        type=Path,
        help="folder to make; or a file: ending in .pth with --to official, in .safetensors with "
        "--to timm",
    )
    add("--to", choices=FORMATS, required=True, help="whose form the weights get")
    add("--ema", action="store_true", help="export the moving average of the weights")
    return parser


main = command(parser, "mae_scale.inference.export")
