"""Compute mean and deviation of each band of the images of a shard folder.

They are what data.mean and data.std of a config take. The range of the values of each band is shown
first, from which --value_range is chosen.
"""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import Parser, command, whole
from mae_scale.data.formats import MAX_PIXELS


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("data", help="shard folder")
    add("--in_chans", type=whole(1), default=3, help="bands of an image (default: %(default)s)")
    add(
        "--value_range",
        nargs="+",
        metavar="BLACK WHITE",
        help="values that become black and white, as data.value_range: two numbers, or two for "
        "each band; auto: for each band the range of all but 2 %% of its values on each side",
    )
    add(
        "--most",
        type=whole(1),
        default=2000,
        help="number of images at the most, spread over the shards (default: %(default)s)",
    )
    add("--max_pixels", type=whole(1), default=MAX_PIXELS, help="refuse larger images")
    add("--out", type=Path, help="YAML file to write, whose keys a config can take over")
    add("--cache_dir", help="folder into which remote shards are staged")
    return parser


main = command(parser, "mae_scale.data.band_statistics")
