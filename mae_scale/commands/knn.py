"""Measure an encoder by its features' nearest neighbours, without training.

The rule is DINO's: the 20 nearest images by the cosine vote, with the weight exp(cosine / 0.07).
"""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import (
    Parser,
    add_loading,
    add_pool,
    add_weights,
    command,
    file_name,
    number,
    whole,
)


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add_weights(parser, "pretrain, finetune or linprobe")
    add = parser.add_argument
    add("train", help="shard folder of the images that vote")
    add(
        "val",
        nargs="?",
        help="shard folder of the images that are classified; without it, each of the first folder "
        "by the others there",
    )
    add("--neighbours", type=whole(1), default=20, help="default: %(default)s")
    add("--temperature", type=number(0.001), default=0.07, help="default: %(default)s")
    add(
        "--picture",
        type=file_name(".png"),
        help="PNG to write: some images and their nearest neighbours",
    )
    add("--out", type=Path, help="JSON file to write")
    add_pool(parser)
    add_loading(parser)
    return parser


main = command(parser, "mae_scale.inference.knn", all_ranks=True)
