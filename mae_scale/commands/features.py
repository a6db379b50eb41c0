"""Write an encoder's features of each image of a shard folder, as npy or Parquet."""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_scale.commands.arguments import IMG_SIZE, Parser, image_size
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.world import data_workers


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `features` and `knn` share."""
    parser.add_argument(
        "weights",
        type=Path,
        help="run folder of pretrain, finetune or linprobe, a step folder in it, or weights: a "
        ".pth of the authors, a .safetensors, a folder of timm or Hugging Face",
    )
    parser.add_argument(
        "--pool", choices=["token", "mean"],
        help="what describes an image: the class token, or the mean of the patches; default: the "
        "token of a pre-trained model, what the head sees of a classifier",
    )  # fmt: skip
    parser.add_argument("--model", help="of foreign weights: mae_vit_base_patch16 or the like")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--img_size", type=image_size, help=IMG_SIZE)
    parser.add_argument(
        "--crop_ratio", type=float,
        help="share of the short side that the centre crop covers; default: the run's, or 0.875 "
        "up to 224 pixels and 1.0 above",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images per rank")
    parser.add_argument(
        "--workers", type=int, default=data_workers(),
        help="data-loading processes per rank, by default one less than its CPUs, 16 at the most",
    )  # fmt: skip
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--cache_dir", help="folder into which remote shards are staged")
    parser.add_argument(
        "--max_pixels", type=int,
        help="refuse larger images; default: data.max_pixels of the run, or for weights from "
        f"elsewhere {MAX_PIXELS}",
    )  # fmt: skip


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add_encoder_arguments(parser)
    parser.add_argument("data", help="shard folder")
    parser.add_argument(
        "--out", type=Path, required=True,
        help="F.npy: float32 [images, width], and beside it F.csv with key, label and class of "
        "each row; or F.parquet with all of it (needs pyarrow)",
    )  # fmt: skip
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, compute the features and write the files."""
    options = parser(prog).parse_intermixed_args(argv)

    from mae_scale.commands.describing import run
    from mae_scale.launch.distributed import process_group
    from mae_scale.launch.logs import set_up_logging
    from mae_scale.world import World

    world = World.from_environment()
    set_up_logging(world)
    with process_group(world, hang_timeout=1800.0) as watchdog:
        run(options, world, watchdog)
    return 0
