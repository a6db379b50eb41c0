"""Shards with annotations are written, verified and read back; bad sources are refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from mae_scale.data.annotated import (
    AnnotatedTrainLoader,
    DetectionEvalLoader,
    SegmentationEvalLoader,
)
from mae_scale.data.annotated_transforms import (
    DetectionTransform,
    SegmentationTransform,
    unpack_masks,
)
from mae_scale.data.annotations import IGNORE, box_within, coco_file
from mae_scale.data.order import SampleOrder
from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError
from mae_scale.sharding.ade import find_ade
from mae_scale.sharding.coco import read_coco
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard
from mae_scale.sharding.verify import verify


@pytest.fixture(scope="session")
def coco(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make COCO's layout of 12 photographs with polygons, run lengths, a crowd and an empty
    image."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "train2017").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, path in enumerate(sorted(imagenet_tree.rglob("*.JPEG"))[:12]):
        number = 1000 - 7 * i  # not in the order of the ids
        name = f"{number:012d}.jpg"
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((96 + 4 * i, 80))
        image.save(root / "train2017" / name)
        width, height = image.size
        images.append(
            {"id": number, "file_name": name, "height": height, "width": width, "license": 4}
        )
        for j in range(i % 4):
            x, y, w, h = 10.25 + 3 * j, 8.5 + j, 30.0, 40.0
            shape: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            crowd = int(i == 7 and j == 0)
            if crowd or (i == 6 and j == 1):
                mask = np.zeros((height, width), int)
                mask[10:50, 20:60] = 1
                runs = np.diff(np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=-1)))
                first = int(np.flatnonzero(mask.ravel("F"))[0])
                shape = {"size": [height, width], "counts": [first, *runs.tolist()]}
            annotations.append(
                {"id": 50 - len(annotations), "image_id": number, "category_id": 3 + 4 * (j % 2),
                 "iscrowd": crowd, "area": w * h, "bbox": [x, y, w, h], "segmentation": shape}
            )  # fmt: skip
    content = {
        "info": {"year": 2017}, "images": images, "annotations": annotations,
        "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "cat"}],
    }  # fmt: skip
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def ade(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder in ADE20K's layout: 6 photographs, masks with the values 0 to 5."""
    root = tmp_path_factory.mktemp("ade")
    for kind in ("images", "annotations"):
        (root / kind / "training").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i, path in enumerate(sorted(imagenet_tree.rglob("*.JPEG"))[:6]):
        with Image.open(path) as opened:
            opened.convert("RGB").resize((100 + i, 80)).save(root / "images/training" / f"p{i}.jpg")
        values = generator.integers(0, 6, (8, 10)).astype(np.uint8)
        labels = Image.fromarray(values).resize((100 + i, 80), Image.Resampling.NEAREST)
        labels.save(root / "annotations/training" / f"p{i}.png")
    names = "\n".join(f"{i}\t0.1\t1\t1\tclass {i}" for i in range(1, 6))
    (root / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{names}\n")
    return root


@pytest.fixture(scope="session")
def coco_shards(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coco shards") / "train"
    assert shard(coco, out, Options("train", samples_per_shard=5), workers=2) == 0
    return out


@pytest.fixture(scope="session")
def ade_shards(ade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ade shards") / "train"
    assert shard(ade, out, Options("train", samples_per_shard=4), workers=1) == 0
    return out


def test_coco_file_is_made_again(coco: Path, coco_shards: Path) -> None:
    file = coco / "annotations/instances_train2017.json"
    made = coco_file(open_shards(coco_shards))
    assert json.dumps(made) == file.read_text()


@pytest.mark.parametrize("kind", ["coco", "ade"])
def test_same_bytes_for_any_workers(
    kind: str, coco: Path, ade: Path, coco_shards: Path, ade_shards: Path, tmp_path: Path
) -> None:
    src, before = (coco, coco_shards) if kind == "coco" else (ade, ade_shards)
    samples = 5 if kind == "coco" else 4
    shard(src, tmp_path / "again", Options("train", samples_per_shard=samples), workers=3)
    names = sorted(path.name for path in before.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (before / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert verify(before).problems == []


def test_webdataset_reads_the_original_files(
    coco: Path, ade: Path, coco_shards: Path, ade_shards: Path
) -> None:
    found = {}
    for path in sorted(ade_shards.glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            found[sample["__key__"]] = sample
    assert len(found) == 6
    for key, sample in found.items():
        assert sample["jpg"] == (ade / "images/training" / f"{key}.jpg").read_bytes()
        assert sample["seg.png"] == (ade / "annotations/training" / f"{key}.png").read_bytes()
    path = sorted(coco_shards.glob("*.tar"))[0]
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        name = f"{sample['__key__']}.jpg"
        assert sample["jpg"] == (coco / "train2017" / name).read_bytes()
        assert json.loads(sample["json"])["image_id"] == int(sample["__key__"])


@pytest.mark.parametrize("ending", [".json", ".seg.png"])
def test_verify_names_a_damaged_annotation(
    ending: str, coco_shards: Path, ade_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(coco_shards if ending == ".json" else ade_shards, folder)
    path = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(path) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(ending))
    data = bytearray(path.read_bytes())
    data[member.offset_data + member.size // 2] ^= 1
    path.write_bytes(data)
    problems = verify(folder).problems
    assert any(f"{member.name} has other bytes" in problem for problem in problems), problems


def test_training_replaces_a_damaged_annotation(coco_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(coco_shards, folder)
    shards = open_shards(folder)
    sample = int(np.flatnonzero(shards.index["objects"])[0])
    path, entry = Path(shards.files[0]), shards.index[sample]
    data = bytearray(path.read_bytes())
    data[int(entry["extra_offset"]) + 3] ^= 1
    path.write_bytes(data)
    loader = AnnotatedTrainLoader(
        open_shards(folder), img_size=32, global_batch_size=1, max_bad_fraction=1.0,
        augment=DetectionTransform(shards.categories),
    )  # fmt: skip
    seen = [int(next_["sample"]) for _, next_ in zip(range(9), loader, strict=False)]
    assert sample not in seen and loader.bad_samples == 1


def _streams(shards: Any, world_size: int, workers: int, size: int, **kwargs: Any) -> list[Any]:
    """Give the batches of the first three steps, with those of the ranks joined by sample."""
    found: list[Any] = []
    for rank in range(world_size):
        loader = AnnotatedTrainLoader(
            shards, img_size=size, global_batch_size=2, rank=rank, world_size=world_size,
            workers=workers, seed=3, **kwargs,
        )  # fmt: skip
        found.append([batch for _, batch in zip(range(3), loader, strict=False)])
        loader.close()
    return found


def test_stream_does_not_depend_on_ranks_and_workers(coco_shards: Path) -> None:
    shards = open_shards(coco_shards)
    transform = DetectionTransform(shards.categories, "li2021")
    (alone,) = _streams(shards, 1, 0, 64, augment=transform)
    several = _streams(shards, 2, 2, 64, augment=transform)
    for step, batch in enumerate(alone):
        ranks = [rank[step] for rank in several]
        for key in ("image", "sample", "objects", "boxes", "classes", "masks", "size"):
            joined = np.concatenate([rank[key].numpy() for rank in ranks])
            assert np.array_equal(batch[key].numpy(), joined), key


def test_an_epoch_has_each_image_with_objects_once(coco_shards: Path) -> None:
    shards = open_shards(coco_shards)
    loader = AnnotatedTrainLoader(
        shards, img_size=32, global_batch_size=1, augment=DetectionTransform(shards.categories)
    )
    usable = set(np.flatnonzero(shards.index["objects"]).tolist())
    assert 0 < len(usable) < len(shards) and loader.steps_per_epoch == len(usable)
    seen = [int(b["sample"]) for _, b in zip(range(len(usable)), loader, strict=False)]
    assert set(seen) == usable
    # Old shards have the order that they always had.
    order = SampleOrder(shards.samples, 0, 256, 2048)
    assert sorted(order.samples(0, np.arange(len(shards))).tolist()) == list(range(len(shards)))


@pytest.mark.parametrize("recipe", ["li2021", "vitdet"])
def test_boxes_and_masks_agree(coco_shards: Path, recipe: Any) -> None:
    shards = open_shards(coco_shards)
    (batches,) = _streams(
        shards, 1, 0, 96, augment=DetectionTransform(shards.categories, recipe, (0.6, 1.6))
    )
    compared = 0
    for batch in batches:
        masks = unpack_masks(batch["masks"], 96).numpy()
        assert int(batch["objects"].sum()) == len(batch["boxes"]) == len(masks)
        for box, mask in zip(batch["boxes"].numpy(), masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if not len(rows):
                continue
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(box - extent).max() <= 1.0
            compared += 1
    assert compared >= 3


def test_box_of_a_concave_polygon_around_a_corner() -> None:
    # An L around the corner (0, 0) of the rectangle: only its two arms lie within.
    corner = [[-5, -5], [8, -5], [8, 2], [6, 2], [6, -1], [-1, -1], [-1, 7], [-5, 7]]
    assert box_within([np.array(corner, float)], 0, 0, 10, 10) == (6.0, 0.0, 8.0, 2.0)
    around = np.array([[-9, -9], [30, -9], [30, 30], [-9, 30]], float)
    assert box_within([around], 0, 0, 10, 5) == (0.0, 0.0, 10.0, 5.0)
    assert box_within([around + 100], 0, 0, 10, 5) is None


def test_evaluation_reads_each_image_once(coco_shards: Path, ade_shards: Path) -> None:
    for shards, kind in ((coco_shards, DetectionEvalLoader), (ade_shards, SegmentationEvalLoader)):
        opened = open_shards(shards)
        for world_size in (1, 3):
            seen: list[int] = []
            for rank in range(world_size):
                loader = kind(
                    opened, img_size=64, batch_size=1, rank=rank, world_size=world_size, workers=1
                )
                seen += [int(batch["sample"]) for batch in loader]
            assert seen == list(range(len(opened)))


def test_segmentation_crop(ade_shards: Path) -> None:
    shards = open_shards(ade_shards)
    assert shards.classes == [f"class {i}" for i in range(1, 6)]
    (batches,) = _streams(shards, 1, 0, 48, augment=SegmentationTransform(colors=False))
    for batch in batches:
        for labels, (h, w) in zip(batch["segmentation"], batch["size"].tolist(), strict=True):
            assert set(labels.unique().tolist()) <= {*range(5), IGNORE}
            assert (labels[h:] == IGNORE).all() and (labels[:, w:] == IGNORE).all()


def _first(**values: Any) -> Callable[[Any], None]:
    """Change the first annotation of a file of COCO."""
    return lambda content: content["annotations"][0].update(values)


def _mask(**values: Any) -> Callable[[Any], None]:
    """Give the first annotation run lengths; its image has 80 x 100 pixels."""
    return _first(segmentation={"size": [80, 100], **values})


NOT_COCO: dict[str, tuple[Callable[[Any], Any], str]] = {
    "missing image": (
        lambda c: c["images"][3].update(file_name="nowhere.jpg"),
        "names 1 of 12 images that are not in",
    ),
    "image size": (lambda c: c["images"][0].update(width=97), r"\(height x width\), but"),
    "no name": (lambda c: c["categories"][0].pop("name"), "category 7 has the name None"),
    "category": (_first(category_id=90), "annotation 50 has the category 90; the list has 2"),
    "list of categories": (_first(category_id=[3]), r"annotation 50 with category_id \[3\]"),
    "mask size": (_mask(size=[5, 5], counts=[25]), r"has a mask of \[5, 5\] pixels"),
    "short runs": (_mask(counts=[25]), "run lengths do not add up"),
    "negative runs": (_mask(counts=[8001, -1]), "run lengths do not add up"),
    "runs of text": (_mask(counts="no runs"), "run lengths do not add up"),
    "two points": (_first(segmentation=[[1, 2, 3, 4]]), "a polygon of 2 points; it needs 3"),
    "nested points": (_first(segmentation=[[[1, 2], [3, 4]]]), "is no list of x, y, x, y"),
    "endless point": (_first(segmentation=[[1, 2, 3, 4, 5, 1e400]]), "is no list of x, y, x, y"),
    "no mask": (_first(segmentation=[]), "has no segmentation"),
    "outside": (_first(bbox=[500, 10, 4, 4]), "outside of its image"),
    "box of text": (_first(bbox=["1", 2, 3, 4]), "has the box"),
    "crowd": (_first(iscrowd="0"), "has iscrowd '0'; expected 0 or 1"),
    "area": (_first(area=None), "has the area None"),
    "twice": (lambda c: c["annotations"][1].update(id=50), "stands there twice"),
    "no such image": (_first(image_id=5), "is of image 5, not in the list"),
    "list of images": (_first(image_id=[5]), r"annotation 50 with image_id \[5\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_COCO)
def test_coco_that_cannot_be_is_refused(coco: Path, tmp_path: Path, what: str) -> None:
    content = json.loads((coco / "annotations/instances_train2017.json").read_text())
    change, message = NOT_COCO[what]
    change(content)
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message) as caught:
        shard(
            coco / "train2017", out, Options("train"),
            find=lambda *_: read_coco(file, coco / "train2017"),
        )  # fmt: skip
    assert not out.exists() and "\n" not in str(caught.value)


def test_without_names_both_splits_have_the_same_classes(ade: Path, tmp_path: Path) -> None:
    """Each split lacks some classes, but both must have the same numbering."""
    for folder, largest in (("training", 2), ("validation", 4)):
        for kind in ("images", "annotations"):
            (tmp_path / kind / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "a.jpg").write_bytes(
            (ade / "images/training/p0.jpg").read_bytes()
        )
        values = np.full((80, 100), largest, np.uint8)
        (tmp_path / "annotations" / folder / "a.png").write_bytes(_png(values))
    for split in ("train", "val"):
        source = find_ade(tmp_path, split)
        assert source is not None and source.classes == ["1", "2", "3", "4"]
        assert len(source.annotations) == 1


def _png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: f.write_bytes(_png(np.ones((4, 4), np.uint8))), "is 4 x 4 pixels"),
        (lambda f: f.write_bytes(_png(np.full((80, 100), 9, np.uint8))), "holds the value 9"),
        (lambda f: f.write_bytes(_png(np.ones((80, 100, 3), np.uint8))), "pixels of mode RGB"),
        (lambda f: f.unlink(), "is in .* but not in"),
    ],
)
def test_masks_that_cannot_be_are_refused(
    ade: Path, tmp_path: Path, break_it: Callable[[Path], Any], message: str
) -> None:
    src = tmp_path / "ade"
    shutil.copytree(ade, src)
    break_it(src / "annotations/training/p0.png")
    with pytest.raises(UserError, match=message):
        shard(src, tmp_path / "out", Options("train"))
    assert not (tmp_path / "out").exists()
