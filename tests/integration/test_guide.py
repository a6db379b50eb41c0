"""Commands of the guide, as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from mae_scale.data.shards import open_shards

REPOSITORY = Path(__file__).parents[2]


def bash_block(page: str, containing: str) -> str:
    """The block of shell commands of a page in docs/ that contains a text."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs" / page).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


def test_pets_become_shards(imagenet_tree: Path, tmp_path: Path) -> None:
    """From images and lists laid out as those of Oxford-IIIT Pets."""
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "data_prep").symlink_to(REPOSITORY / "data_prep")
    photographs = iter(sorted(imagenet_tree.rglob("*.JPEG")))
    for split, numbers in (("trainval", (1, 20)), ("test", (3, 100))):
        names = [f"{breed}_{n}" for breed in ("Abyssinian", "great_pyrenees") for n in numbers]
        for name in names:
            shutil.copyfile(next(photographs), tmp_path / "images" / f"{name}.jpg")
        lines = [f"{name} 1 1 1\n" for name in names]
        (tmp_path / "annotations" / f"{split}.txt").write_text("".join(lines))
    sharding = bash_block("finetuning.md", "annotations/").split("done\nmae-scale")[0] + "done"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-euc", sharding], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True
    )
    for split in ("train", "val"):
        shards = open_shards(tmp_path / "SHARDS" / split)
        assert len(shards) == 4 and len(shards.classes) == 2
