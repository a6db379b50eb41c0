"""Write an encoder's features of each image of a shard folder, as npy or Parquet."""

from __future__ import annotations

from mae_scale.commands.arguments import (
    Parser,
    add_loading,
    add_pool,
    add_weights,
    file_name,
    on_all_ranks,
)


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add_weights(parser, "pretrain, finetune or linprobe")
    parser.add_argument("data", help="shard folder")
    parser.add_argument(
        "--out",
        type=file_name(".npy", ".parquet"),
        required=True,
        help="F.npy: float32 [images, width], and beside it F.csv with key, label and class of "
        "each row; or F.parquet with all of it (needs pyarrow)",
    )
    add_pool(parser)
    add_loading(parser)
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, then import torch and do the work."""
    options = parser(prog).parse_intermixed_args(argv)

    from mae_scale.inference.features import run

    return on_all_ranks(run, options)
