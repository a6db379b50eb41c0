"""Sources whose images have annotations: objects (COCO) or the class of each pixel (ADE20K)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mae_scale.files import read_file
from mae_scale.sharding.sources import Source

ENDINGS = {"detection": "json", "segmentation": "seg.png"}  # endings of annotation files, by task


@dataclass(kw_only=True)
class AnnotatedSource(Source):
    """Images with annotations. All `labels` are `NO_LABEL`; `classes` are the annotations'."""

    task: str  # detection or segmentation
    keys: list[str]  # [n], unique WebDataset keys
    annotation_sizes: npt.NDArray[np.int64]  # [n], bytes
    objects: npt.NDArray[np.int32]  # [n], see ANNOTATED_DTYPE
    annotations: Sequence[bytes] | Sequence[Path]  # [n], contents, or the files that hold them
    facts: dict[str, Any] = field(default_factory=dict)  # further entries of the manifest

    @property
    def ending(self) -> str:
        """Return the ending of the annotation files' names, without the first dot."""
        return ENDINGS[self.task]

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the entries of the manifest about the annotations."""
        return {"task": self.task, **self.facts}

    def title(self, i: int) -> str:
        """Return the name of an image for messages."""
        return self.names[i]

    def annotation(self, i: int) -> bytes:
        """Read the annotation file of an image.

        Raises:
            OSError: the file cannot be read, or has changed since it was listed.
        """
        found = self.annotations[i]
        if isinstance(found, bytes):
            return found
        data = read_file(found)
        if len(data) != self.annotation_sizes[i]:
            raise OSError(f"{found} changed while it was being sharded")
        return data

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names and sizes, and of the content of COCO's annotations."""
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(repr(sorted(self.manifest.items())).encode())
        for i, key in enumerate(self.keys):
            digest.update(f"{key} {self.annotation_sizes[i]}\n".encode("utf-8", "surrogatepass"))
            if isinstance(content := self.annotations[i], bytes):
                digest.update(content)
        return digest.hexdigest()
