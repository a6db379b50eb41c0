"""Write an encoder's features of each image of a shard folder, as npy or Parquet."""

from __future__ import annotations

from mae_scale.commands.arguments import (
    Parser,
    add_loading,
    add_pool,
    add_weights,
    command,
    file_name,
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


main = command(parser, "mae_scale.inference.features", all_ranks=True)
