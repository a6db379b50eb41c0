"""Other programs read the same shards and find the same samples and labels."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from timm.data import create_dataset

from mae_scale.data.shards import open_shards
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard


@pytest.fixture(scope="module")
def source(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make six classes of four shrunk photographs, one of them a PNG that is named .JPEG."""
    src = tmp_path_factory.mktemp("peers")
    for i, path in enumerate(sorted(imagenet_tree.glob("*/*"))[:24]):
        target = src / f"class {i % 6}" / f"{path.stem}.JPEG"
        target.parent.mkdir(exist_ok=True)
        small = Image.open(path).convert("RGB").resize((40 + i, 60))
        small.save(target, "PNG" if i == 7 else "JPEG")
    return src


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peers-out") / "train"
    assert shard(source, out, Options("train", samples_per_shard=10)) == 0
    return out


def digest(pixels: Image.Image | np.ndarray) -> bytes:
    return hashlib.sha256(np.asarray(pixels).tobytes()).digest()


@pytest.fixture(scope="module")
def expected(source: Path) -> list[tuple[bytes, int]]:
    """Give (digest of RGB pixels, label) of each image, sorted."""
    return sorted(
        (digest(Image.open(path).convert("RGB")), int(path.parent.name[-1]))
        for path in source.glob("*/*")
    )


def test_webdataset(folder: Path, expected: list[tuple[bytes, int]]) -> None:
    dataset = webdataset.WebDataset(
        f"{folder}/train-{{000000..000002}}.tar", shardshuffle=False, empty_check=False
    )
    found = [(digest(i), c) for i, c in dataset.decode("pilrgb").to_tuple("jpg", "cls")]
    assert sorted(found) == expected

    shards = open_shards(folder)
    raw = list(webdataset.WebDataset(list(shards.files), shardshuffle=False))
    assert [int(sample["cls"]) for sample in raw] == list(shards.index["label"])
    assert [len(sample["jpg"]) for sample in raw] == list(shards.index["size"])
    assert len({sample["__key__"] for sample in raw}) == 24


def test_timm(folder: Path, expected: list[tuple[bytes, int]]) -> None:
    dataset = create_dataset("wds/here", root=str(folder), split="train", is_training=False)
    found = [(digest(image.convert("RGB")), target) for image, target in dataset]
    assert sorted(found) == expected
    assert len(dataset) == 24


def test_open_clip_conventions(folder: Path, expected: list[tuple[bytes, int]]) -> None:
    """The files are read as open_clip's get_dataset_size and its pipeline read them."""
    files = webdataset.shardlists.expand_urls(f"{folder}/train-{{000000..000002}}.tar")
    sizes = json.loads((folder / "sizes.json").read_text())
    assert sum(int(sizes[Path(file).name]) for file in files) == len(expected)
    dataset = webdataset.DataPipeline(
        webdataset.SimpleShardList(files),
        webdataset.tarfile_to_samples(),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="cls"),
        webdataset.to_tuple("image", "text"),
    )
    assert sorted((digest(image), text) for image, text in dataset) == expected


def test_plain_tar_and_pil(folder: Path, expected: list[tuple[bytes, int]]) -> None:
    shards = open_shards(folder)
    found = []
    for number, file in enumerate(shards.files):
        tar = Path(file).read_bytes()
        for offset, size, label in shards.index[
            shards.starts[number] : shards.starts[number + 1]
        ].tolist():
            image = Image.open(io.BytesIO(tar[offset : offset + size])).convert("RGB")
            found.append((digest(image), label))
    assert sorted(found) == expected
