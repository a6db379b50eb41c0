"""Measure an encoder by its features' nearest neighbours, without training.

The rule is DINO's: the 20 nearest images by the cosine vote, with the weight exp(cosine / 0.07).
"""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import Parser
from mae_scale.commands.features import add_encoder_arguments


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add_encoder_arguments(parser)
    parser.add_argument("train", help="shard folder of the images that vote")
    parser.add_argument(
        "val", nargs="?",
        help="shard folder of the images that are classified; without it, each of the first folder "
        "by the others there",
    )  # fmt: skip
    parser.add_argument("--neighbours", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.07, help="default: %(default)s")
    parser.add_argument(
        "--picture", type=Path, help="PNG to write: some images and their nearest neighbours"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, evaluate, print the scores and write the JSON."""
    options = parser(prog).parse_intermixed_args(argv)

    from mae_scale.commands.neighbours import run
    from mae_scale.launch.distributed import process_group
    from mae_scale.launch.logs import set_up_logging
    from mae_scale.world import World

    world = World.from_environment()
    set_up_logging(world)
    with process_group(world, hang_timeout=1800.0) as watchdog:
        run(options, world, watchdog)
    return 0
