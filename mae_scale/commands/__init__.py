"""The commands that are not tasks: making shards, planning, watching, evaluating, exporting."""

# Description of each command. Its module in `commands` has `parser(prog)` and `main(argv, prog) ->
# exit code`. The module imports torch and other slow packages only after parsing, so that --help
# and typing errors are answered at once.
COMMANDS = {
    "shard": "make shards of ImageNet, or of any images",
    "index": "make WebDataset tars of others usable as they are",
    "verify": "check shards down to each image",
    "stats": "mean and deviation of each band of images, for data.mean and data.std",
    "evaluate": "accuracy of a classifier, also on robustness sets",
    "knn": "accuracy of an encoder's nearest neighbours, without training",
    "features": "what an encoder makes of each image, as npy or Parquet",
    "plan": "memory, time, data and saves of a recipe on a cluster",
    "sweep": "run a table of experiments, such as the paper's ablations",
    "status": "print how runs are doing, on one screen",
    "report": "write an HTML page that shows one or several runs",
    "export": "weights for the authors' code, timm or Hugging Face",
    "reconstruct": "draw what a trained one makes of images",
    "attention": "draw where an encoder's class token looks in images",
    "predict": "draw what a classifier, detector or segmenter sees in images",
}
