"""Measure a trained model on data sets: accuracy, also on the robustness sets of Appendix C.

Detectors get COCO's average precision, segmenters the mean intersection over union.
"""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import Parser, add_loading, add_weights, command


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add_weights(parser, "finetune, linprobe, detect or segment", " of a classifier", classes=True)
    add = parser.add_argument
    add(
        "data",
        nargs="*",
        metavar="NAME=SHARDS",
        help="shard folders, each with a name for the table (without one, its path)",
    )
    add("--imagenet_c", help="folder of <corruption>/<severity>/ shard folders: ImageNet-C")
    add(
        "--classes-of-data",
        "--classes_of_data",
        action="store_true",
        help="for classifiers: on each data set only the outputs of its own classes count, which "
        "is the protocol of ImageNet-A and -R; without it all outputs count",
    )
    add(
        "--tables",
        type=Path,
        help="for classifiers: folder for two CSV files of each data set: a row for each class, "
        "and the confusion matrix",
    )
    add("--out", type=Path, help="JSON file to write")
    add(
        "--multi_scale",
        action="store_true",
        help="for runs of segment: six sizes and their mirror images (ADE20K's test with "
        "augmentation)",
    )
    add_loading(parser)
    return parser


main = command(parser, "mae_scale.inference.evaluate", all_ranks=True)
