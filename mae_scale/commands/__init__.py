"""The commands that are not tasks: making shards, planning, watching, evaluating, exporting."""

# Description of each command. Its module in `commands` has `parser(prog)` and `main(argv, prog) ->
# exit code`. The module imports torch and other slow packages only after parsing, so that --help
# and typing errors are answered at once.
COMMANDS = {
    "shard": "make shards of ImageNet, or of any images",
    "index": "index existing WebDataset tars",
    "verify": "check shards down to each image",
    "stats": "compute mean and deviation of each band of images, for data.mean and data.std",
    "evaluate": "measure a classifier, detector or segmenter on data sets",
    "knn": "measure an encoder by its nearest neighbours, without training",
    "features": "write encoder features of each image, as npy or Parquet",
    "plan": "plan memory, time, data and saves of a recipe on a cluster",
    "sweep": "run a table of experiments, such as the paper's ablations",
    "status": "print how runs are doing, on one screen",
    "report": "write an HTML page that shows one or several runs",
    "export": "write weights for the authors' code, timm or Hugging Face",
    "reconstruct": "draw a masked autoencoder's predictions for images",
    "attention": "draw where an encoder's class token looks in images",
    "predict": "draw what a classifier, detector or segmenter sees in images",
}
