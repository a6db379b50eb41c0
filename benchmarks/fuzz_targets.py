"""The targets of fuzzing: places where a file of somebody else is parsed, and good files for
each."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_inputs import (
    dumped,
    in_file,
    json_files,
    json_lines,
    plain,
    spoilt,
    tars,
    yaml_files,
)
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from mae_scale.commands import status
from mae_scale.commands.sweep import read_sweep
from mae_scale.config.parsing import parse
from mae_scale.config.pretraining import PretrainConfig
from mae_scale.config.sections import TrainConfig
from mae_scale.data.annotated_transforms import (
    DetectionTransform,
    SegmentationTransform,
)
from mae_scale.data.images_dataset import ShardDataset
from mae_scale.data.loader import TrainLoader
from mae_scale.data.shards import open_shards
from mae_scale.data.transforms import decode_image
from mae_scale.errors import UserError
from mae_scale.inference.evaluate import outputs_of
from mae_scale.inference.model import read_model
from mae_scale.sharding.coco import read_coco
from mae_scale.sharding.foreign import index_shards
from mae_scale.sharding.images import image_damage, shrink
from mae_scale.sharding.lists import read_classes, read_list
from mae_scale.sharding.sources import find_source
from mae_scale.sharding.verify import verify
from mae_scale.tasks.trained import TrainedRun, best_checkpoint
from mae_scale.train import checkpoint, elastic
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.loading import load_weights
from mae_scale.train.reading import load_tensors
from mae_scale.train.run_dir import check_run, read_history
from mae_scale.watching.page import write_report
from mae_scale.watching.run_view import RunView
from mae_scale.world import World

Files = dict[str, bytes]
SMALL = {
    "model.name": "mae_vit_tiny_patch16", "model.img_size": 32, "model.patch_size": 8,
    "model.depth": 1, "data.workers": 0, "data.lanes": 2, "data.window": 8, "train.epochs": 1,
    "train.max_steps": 2, "train.global_batch_size": 4, "train.micro_batch_size": 4,
    "train.log_every": 1, "optim.warmup_epochs": 0, "checkpoint.every_minutes": "null",
}  # fmt: skip
DECODER = {
    "model.decoder_depth": 1,
    "model.decoder_embed_dim": 32,
    "train.reconstruct_every": "null",
}


def _unlimited() -> None:
    """Lift the memory limit of this process for a child process."""
    limit = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@dataclass(frozen=True)
class Target:
    """A parser, and files for it.

    Args:
        name: name of the target in the table.
        files: function that gives the strategy of the files' contents, by name.
        read: function that reads the files in a folder as the program does.
    """

    name: str
    files: Callable[[Material], st.SearchStrategy[Files]]
    read: Callable[[Material, Path], Any]


class Material:
    """Good files, each made when it is first asked for.

    Args:
        shards: folder of shards with real images.
        folder: empty folder for the files that are made.
    """

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self._folder = shards, folder
        dataset = ShardDataset(shards)
        pixels = dataset[0][0][:, :60, :80].permute(1, 2, 0).numpy()
        self.image = Image.fromarray(pixels)

    def encoded(self, form: str, **options: Any) -> bytes:
        """Encode the image as a file of this form."""
        stream = io.BytesIO()
        self.image.save(stream, form, **options)
        return stream.getvalue()

    @cached_property
    def jpeg(self) -> bytes:
        """Encode the image as JPEG."""
        return self.encoded("JPEG")

    @cached_property
    def few(self) -> Path:
        """Make shards of four small images."""
        out = self._folder / "few"
        tar = self._folder / "x.tar"
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as stream:
            for i in range(4):
                for name, content in ((f"k{i}.jpg", self.jpeg), (f"k{i}.cls", b"%d" % (i % 2))):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    stream.addfile(member, io.BytesIO(content))
        out.mkdir()
        shutil.move(tar, out / "x.tar")
        index_shards([str(out)])
        return out

    def run(self, task: str, **settings: Any) -> Path:
        """Train a run of two steps by the command."""
        run_dir = self._folder / "-".join([task, *map(str, settings.values())]).replace("/", "_")
        if not run_dir.exists():
            given = {**SMALL, **(DECODER if task == "pretrain" else {}), "data.train": self.shards,
                     "run_dir": run_dir, **settings}  # fmt: skip
            command = [sys.executable, "-m", "mae_scale", task]
            command += [f"--{key}={value}" for key, value in given.items()]
            environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
            subprocess.run(
                command, check=True, capture_output=True, env=environment, preexec_fn=_unlimited
            )
        return run_dir

    @property
    def pretrained(self) -> Path:
        """Train a run of pre-training under ZeRO-1."""
        return self.run("pretrain", deepspeed="zero1")

    @property
    def finetuned(self) -> Path:
        """Train a run of fine-tuning, with one validation."""
        run = self.run("finetune", **{"data.val": self.shards})
        row = {"step": 2, "epoch": 0.03, "samples": 8, "images": 250, "top1": 0.4, "top5": 2.0}
        row |= {"loss": 5.5, "ema_top1": 0.4, "time": 1.8e9}
        (run / "validation.jsonl").write_text(json.dumps(row) + "\n")
        return run

    def step(self, run: Path) -> Path:
        """Give the newest step folder of a run."""
        return sorted((run / "checkpoints").glob("step-*"))[-1]

    def contents(self, folder: Path) -> Files:
        """Read all files of a folder by their names in it."""
        paths = [
            p for p in sorted(folder.rglob("*")) if p.is_file() and "tensorboard" not in str(p)
        ]
        return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def beside(files: Files, name: str, strategy: st.SearchStrategy[bytes]) -> st.SearchStrategy[Files]:
    """Make a strategy of a folder of good files in which one file is replaced."""
    return strategy.map(lambda content: {**files, name: content})


def tolerant(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function whose documentation has it raise a ValueError or OSError on bad content."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None


# Shards


def read_shards(material: Material, folder: Path) -> None:
    """Open shards, read each image, verify them, and draw the first batch of an epoch."""
    dataset = ShardDataset(folder)
    with contextlib.suppress(ValueError, OSError):
        for i in range(len(dataset)):
            dataset[i]
    verify(folder, fast=True)
    loader = TrainLoader(
        open_shards(folder), img_size=16, global_batch_size=2, lanes=1, window=4,
        max_bad_fraction=1.0,
    )  # fmt: skip
    with contextlib.closing(iter(loader)) as batches, contextlib.suppress(OSError):
        next(batches)


def manifests(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of shards with a spoilt manifest."""
    files = material.contents(material.few)
    return beside(files, "manifest.json", json_files(json.loads(files["manifest.json"])))


@st.composite
def arrays(draw: st.DrawFn, material: Material) -> Files:
    """Make shards with a spoilt array of the index."""
    files = material.contents(material.few)
    name = draw(st.sampled_from(["index.npy", "checksums.npy"]))
    if draw(st.booleans()):
        return {**files, name: draw(spoilt(files[name]))}
    index = np.load(io.BytesIO(files["index.npy"]))
    numbers = st.sampled_from([-1, 0, 1, 511, 512, 513, 2**31 - 1, -(2**31), 2**30, 7])
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from(index.dtype.names))
        index[field][draw(st.integers(0, len(index) - 1))] = draw(numbers)
    kind = draw(st.sampled_from(["index", "index", "objects", "more", "others"]))
    value: Any = {
        "index": index,
        "objects": np.array([print, {}], dtype=object),
        "more": np.concatenate([index, index]),
        "others": index["offset"].astype(float),
    }[kind]
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=True)
    return {**files, "index.npy": stream.getvalue()}


def tar_files(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of tars to index."""
    return tars(material.jpeg).map(in_file("x.tar"))


def read_tar(material: Material, folder: Path) -> None:
    """Index a tar, and read it through the index."""
    index_shards([str(folder)])
    read_shards(material, folder)


def changed_tars(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of shards with a spoilt tar."""
    files = material.contents(material.few)
    return beside(files, "x.tar", spoilt(files["x.tar"]) | tars(material.jpeg))


def tar_sources(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of sources with a tar."""
    names = st.sampled_from(
        ["n01440764.tar", "ILSVRC2012_img_train.tar", "train.tar.gz", "cat.tar"]
    )
    plainly = st.tuples(names, tars(material.jpeg))

    def packed(pair: tuple[str, bytes]) -> Files:
        import gzip

        name, content = pair
        return {name: gzip.compress(content, 1) if name.endswith("gz") else content}

    return plainly.map(packed)


def read_source(material: Material, folder: Path) -> None:
    """List the images of a folder in any layout, as sharding does, and read each."""
    work = folder / "work"
    source = tolerant(find_source, folder, "train", 1, None, work)
    for i in range(len(source)):
        tolerant(source.read, i)


@st.composite
def parquets(draw: st.DrawFn, material: Material) -> Files:
    """Make a source with a parquet file."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    cell = st.fixed_dictionaries(
        {"bytes": st.sampled_from([material.jpeg, b"", None]) | st.binary(max_size=9),
         "path": st.sampled_from(["a.jpg", None, "../../x", "\x1b", "a\nb.png", ""])}
    )  # fmt: skip
    rows = draw(st.lists(cell, max_size=4))
    labels = draw(
        st.sampled_from(
            [[0] * len(rows), [-1] * len(rows), [2**40] * len(rows), [None] * len(rows)]
        )
        | st.lists(st.text(max_size=9), min_size=len(rows), max_size=len(rows))
    )
    table = arrow.table({draw(st.sampled_from(["image", "img", "x"])): rows, "label": labels})
    names = draw(st.sampled_from([["a", "b"], [], "a", None, [1], [{}]]) | plain())
    facts = {"info": {"features": {"label": {"names": names}}}}
    meta = draw(st.sampled_from([dumped(facts), b"[" * 5000, b"\xff"]) | json_files(facts))
    table = table.replace_schema_metadata({"huggingface": meta})
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    content = stream.getvalue()
    return {"train-0.parquet": draw(st.just(content) | spoilt(content))}


def list_files(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of lists of images and classes."""
    text = b"filename,label\na/x.jpg,0\nb/y.jpg,7\n# z\n../q.jpg\t3\n"
    return st.one_of(
        spoilt(text).map(in_file("list.txt")),
        json_files(["a", "b"]).map(in_file("list.json")),
        st.text(max_size=60).map(lambda t: {"list.csv": t.encode("utf-8", "surrogatepass")}),
    )


def read_lists(material: Material, folder: Path) -> None:
    """Read a file as a list of images and as a list of classes."""
    path = next(folder.glob("list.*"))
    for read in (read_list, read_classes):
        with contextlib.suppress(UserError):
            read(path)


# Annotations


def coco_document(material: Material) -> dict[str, Any]:
    """Give a file of instances in COCO's form."""
    shape = [[10.0, 8.0, 40.0, 8.0, 40.0, 30.0, 10.0, 30.0]]
    runs = {"size": [60, 80], "counts": [600, 600, 3600]}
    mask = rle.encode(np.asfortranarray(np.eye(60, 80, dtype=np.uint8)))
    text = {"size": [60, 80], "counts": mask["counts"].decode()}
    return {
        "info": {},
        "images": [{"id": 3, "file_name": "a.jpg", "height": 60, "width": 80}],
        "annotations": [
            {"id": i, "image_id": 3, "category_id": 7, "iscrowd": 0, "area": 660.0,
             "bbox": [10.0, 8.0, 30.0, 22.0], "segmentation": found}
            for i, found in enumerate((shape, runs, text))
        ],
        "categories": [{"id": 7, "name": "cup"}],
    }  # fmt: skip


def coco_files(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of COCO's files."""
    return beside({"a.jpg": material.jpeg}, "coco.json", json_files(coco_document(material)))


def read_coco_file(material: Material, folder: Path) -> None:
    """Read COCO's file as sharding does, and draw the objects of each image as training does."""
    source = read_coco(folder / "coco.json", folder)
    transform = DetectionTransform(source.facts["categories"])
    for i in range(len(source)):
        for key in range(2):
            data, record = bytearray(source.read(i)), bytearray(source.annotation(i))
            tolerant(transform, data, record, 32, (0, 0, key))


def coco_records(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of COCO's records in shards."""
    record = {"annotations": coco_document(material)["annotations"]}
    return json_files(record).map(in_file("a.json"))


def read_coco_record(material: Material, folder: Path) -> None:
    """Train on an image with this record."""
    transform = DetectionTransform(coco_document(material)["categories"])
    for key in range(2):
        record = bytearray((folder / "a.json").read_bytes())
        tolerant(transform, bytearray(material.jpeg), record, 32, (0, 0, key))


def label_maps(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of label maps."""
    values = np.asarray(material.image.convert("L")) % 5
    forms = [Image.fromarray(values), Image.fromarray(values).convert("P"), material.image]
    found = []
    for image in forms:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        found.append(stream.getvalue())
    return st.sampled_from(found).flatmap(spoilt).map(in_file("a.png"))


def read_label_maps(material: Material, folder: Path) -> None:
    """Train on an image with this map of classes."""
    mask = bytearray((folder / "a.png").read_bytes())
    tolerant(SegmentationTransform(), bytearray(material.jpeg), mask, 32, (0, 0, 1))


# Images

# Forms of PIL, with the options of each.
FORMS: dict[str, dict[str, str]] = {
    "JPEG": {}, "PNG": {}, "WEBP": {}, "TIFF": {"compression": "tiff_lzw"}, "GIF": {}, "BMP": {},
    "PPM": {}, "JPEG2000": {},
}  # fmt: skip


@st.composite
def images(draw: st.DrawFn, material: Material) -> Files:
    """Make an image file, whole or spoilt."""
    form = draw(st.sampled_from(sorted(FORMS)))
    data = material.encoded(form, **FORMS[form])
    if draw(st.integers(0, 3)) == 0:
        data = material.encoded("JPEG", progressive=draw(st.booleans()), quality=30)
        at = data.index(b"\xff\xc2" if b"\xff\xc2" in data[:600] else b"\xff\xc0")
        size = draw(st.sampled_from([(65535, 65535), (1, 65535), (0, 5), (24000, 24000), (9, 9)]))
        data = data[: at + 5] + struct.pack(">HH", *size) + data[at + 9 :]
        if draw(st.booleans()):
            return {"a": data}
    return {"a": draw(spoilt(data))}


def read_images(material: Material, folder: Path) -> None:
    """Decode an image for training, look at it as sharding does, and make it smaller."""
    data = (folder / "a").read_bytes()
    if image_damage(data) is None:
        tolerant(decode_image, data)
        shrink(data, 32, 90)
    else:
        tolerant(decode_image, data)


# Run folders


def configs(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of configs."""
    run = material.pretrained
    text = (run / "config.yaml").read_bytes()
    files = {k: v for k, v in material.contents(run).items() if "states" not in k}
    return beside(files, "config.yaml", yaml_files(text, yaml.safe_load(text)))


def read_config(material: Material, folder: Path) -> None:
    """Read the config of a run: as other commands, as a resume, as --config, as status do."""
    step = material.step(folder)
    good = TrainedRun.read(material.step(material.pretrained)).config
    refusals = 0
    for read in (
        lambda: TrainedRun.read(step),
        lambda: check_run(folder, good),
        lambda: parse(PretrainConfig, [f"--config={folder / 'config.yaml'}"], "x"),
        lambda: status.status(RunView(folder)),
        lambda: write_report([folder], folder / "report.html"),
        lambda: read_sweep(folder / "config.yaml", folder, {}),
    ):
        try:
            read()
        except UserError:
            refusals += 1
    if refusals == 6:
        raise UserError("refused by all")


def deepspeed_files(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of DeepSpeed's JSON files."""
    document = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": "auto"},
        "bf16": {"enabled": "auto"}, "train_batch_size": "auto", "gradient_clipping": "auto",
    }  # fmt: skip
    return json_files(document).map(in_file("ds.json"))


def read_deepspeed(material: Material, folder: Path) -> None:
    """Complete a DeepSpeed JSON from the recipe."""
    train = TrainConfig(global_batch_size=8, micro_batch_size=8, epochs=1)
    fill_deepspeed_config(str(folder / "ds.json"), train, World(), "fp32")


def commits(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of step folders with a spoilt COMMITTED.json."""
    files = material.contents(material.finetuned)
    name = next(name for name in files if name.endswith("COMMITTED.json"))
    return beside(files, name, json_files(json.loads(files[name])))


def read_commit(material: Material, folder: Path) -> None:
    """Find the checkpoint of a run with this commit, and show the run."""
    checkpoint.exists(folder)
    checkpoint.best_score(folder)
    view = RunView(folder)
    status.status(view)
    write_report([folder], folder / "report.html")
    step = best_checkpoint(folder)
    load_weights(step)


def class_files(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of runs with a spoilt classes.json."""
    run = material.finetuned
    files = material.contents(run)
    return beside(files, "classes.json", json_files(json.loads(files["classes.json"])))


def read_class_file(material: Material, folder: Path) -> None:
    """Load the classifier of a run with these classes."""
    loaded = read_model(folder, "classifier")
    outputs_of(open_shards(material.shards), loaded.classes)


def rows(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of runs with spoilt records."""
    run = material.finetuned
    files = {k: v for k, v in material.contents(run).items() if "states" not in k}

    def record(name: str) -> st.SearchStrategy[bytes]:
        return json_lines([json.loads(line) for line in files[name].splitlines()] * 3)

    names = ("metrics.jsonl", "history.jsonl", "validation.jsonl")
    one = st.sampled_from(names).flatmap(lambda name: beside(files, name, record(name)))
    several = st.tuples(*map(record, names)).map(
        lambda contents: {**files, **dict(zip(names, contents, strict=True))}
    )
    return one | several


def read_rows(material: Material, folder: Path) -> None:
    """Show a run with these records: status, report; and read them as a resume does."""
    view = RunView(folder)
    text = status.status(view)
    if not text.replace("\n", "").isprintable():
        raise AssertionError(f"status prints control characters: {text!r}")
    write_report([folder, material.finetuned], folder / "report.html")
    page = (folder / "report.html").read_text()
    if "<script" in page or "<img src=x" in page:
        raise AssertionError("the report holds HTML of a record")
    read_history(folder)


# Weights and checkpoints


def states(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of step folders with a spoilt file of states whose checksum is right."""
    step = material.step(material.pretrained)
    files = material.contents(step)
    names = [name for name in files if name.endswith("_states.pt")]

    def other(name: str) -> st.SearchStrategy[bytes]:
        content = torch.load(io.BytesIO(files[name]), weights_only=False)
        return spoilt(files[name]) | changed_state(content) | changed_state(content)

    return st.sampled_from(names).flatmap(lambda name: beside(files, name, other(name)))


@st.composite
def changed_state(draw: st.DrawFn, content: dict[str, Any]) -> bytes:
    """Make what `torch.save` writes of a state with other values, in either of its two forms."""
    tensors = [
        torch.zeros(0), torch.zeros(2, 2), torch.tensor(3.0), torch.zeros(1).expand(10**9),
        torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64),
        torch.zeros(4).to_sparse(), torch.empty(10**12, device="meta"),
    ]  # fmt: skip
    state = dict(content)
    holder: Any = state
    while True:
        keys = list(holder.keys() if isinstance(holder, dict) else range(len(holder)))
        key = keys[draw(st.integers(0, len(keys) - 1))]
        deeper = isinstance(holder[key], (dict, list)) and len(holder[key]) > 0
        if not deeper or draw(st.integers(0, 3)) == 0:
            break
        holder[key] = holder[key].copy()
        holder = holder[key]
    if draw(st.booleans()):
        holder[key] = draw(st.sampled_from(tensors))
    elif draw(st.booleans()) and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw(plain())
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=draw(st.booleans()))
    return stream.getvalue()


def read_states(material: Material, folder: Path) -> None:
    """Read a step folder as exports do, and convert it as an elastic resume does."""
    run = folder / "run" / "checkpoints"
    run.mkdir(parents=True)
    good = material.step(material.pretrained)
    step = run / good.name
    step.mkdir()
    for path in [p for p in folder.iterdir() if p.is_file()]:
        path.rename(step / path.name)
    shutil.copy(good.parents[1] / "config.yaml", folder / "run")
    read_model(step, "autoencoder")
    order = list(load_tensors(good / "mp_rank_00_model_states.pt")["module"])
    order = [name for name in order if "pos_embed" not in name]
    elastic.convert(step, checkpoint.Commit.read(good).zero_stage, order)


def weight_files(material: Material) -> st.SearchStrategy[Files]:
    """Make a strategy of files of weights."""
    from safetensors.torch import save

    state = load_weights(material.step(material.pretrained))
    tensors = save(state)
    size = struct.unpack("<Q", tensors[:8])[0]
    header = json.loads(tensors[8 : 8 + size])

    def with_header(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + tensors[8 + size :]

    index = {"weight_map": dict.fromkeys(header, "model.safetensors")}
    stream = io.BytesIO()
    torch.save({"model": state}, stream)
    return st.one_of(
        spoilt(tensors).map(in_file("w.safetensors")),
        json_files(header).map(with_header).map(in_file("w.safetensors")),
        spoilt(stream.getvalue()).map(in_file("w.pth")),
        changed_state({"model": state}).map(in_file("w.pth")),
        changed_state({"model": state}).map(in_file("w/pytorch_model.bin")),
        json_files(index).map(
            lambda i: {"w/pytorch_model.bin.index.json": i, "w/model.safetensors": tensors}
        ),
        json_files({"norm_pix_loss": True}).map(
            lambda c: {"w/config.json": c, "w/model.safetensors": tensors}
        ),
    )


def read_weight_file(material: Material, folder: Path) -> None:
    """Read weights from elsewhere into a model."""
    path = next(p for p in folder.iterdir())
    norm_pix_loss = None if path.is_dir() else "true"
    read_model(path, "autoencoder", model="mae_vit_tiny_patch16", norm_pix_loss=norm_pix_loss)


TARGETS = [
    Target("tars (index)", tar_files, read_tar),
    Target("tars (indexed)", changed_tars, read_shards),
    Target("tars (sources)", tar_sources, read_source),
    Target("manifest.json", manifests, read_shards),
    Target("npy", arrays, read_shards),
    Target("parquet", parquets, read_source),
    Target("lists", list_files, read_lists),
    Target("COCO JSON", coco_files, read_coco_file),
    Target("COCO records", coco_records, read_coco_record),
    Target("label maps", label_maps, read_label_maps),
    Target("images", images, read_images),
    Target("config.yaml", configs, read_config),
    Target("DeepSpeed JSON", deepspeed_files, read_deepspeed),
    Target("COMMITTED.json", commits, read_commit),
    Target("classes.json", class_files, read_class_file),
    Target("records", rows, read_rows),
    Target("checkpoints", states, read_states),
    Target("weights", weight_files, read_weight_file),
]
