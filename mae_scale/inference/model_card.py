"""The model card of an export, which says what the weights are and how they were trained."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mae_scale import __version__
from mae_scale.config.identity import flatten, plain
from mae_scale.config.sizes import sides
from mae_scale.data.bands import RGB, Bands
from mae_scale.data.shards import MANIFEST, open_shards
from mae_scale.errors import UserError
from mae_scale.models.description import FACTS
from mae_scale.tasks.task import AVERAGED
from mae_scale.tasks.trained import TrainedRun
from mae_scale.train.checkpoint import Commit
from mae_scale.train.records import METRICS, VALIDATION, read_metrics

MARK = "\n- mae-scale\n"  # tag of the front matter, by which an earlier export is recognised


def model_card(
    trained: TrainedRun, ema: bool, to: str, library: str, code: str, facts: dict[str, Any]
) -> str:
    """Write the card as Markdown, with the Hub's front matter.

    Args:
        trained: checkpoint whose weights are exported.
        ema: whether the moving average of the weights is exported.
        to: form of the weights: official, timm or huggingface.
        library: library that loads the weights, as the Hub names it.
        code: lines of Python that load the weights.
        facts: facts about the weights that evaluation needs, from `description.facts_of`.
    """
    config, commit = trained.config, Commit.read(trained.folder)
    name, bands = config.model.name, Bands.of(config)
    front: dict[str, Any] = {"library_name": library, "tags": ["mae-scale", "masked-autoencoder"]}
    front |= {"pipeline_tag": trained.task.hub_tag, FACTS: facts}
    average = ", the moving average of its weights" if ema else ""
    (height, width), classes = sides(config.model.img_size), len(trained.classes)
    table = [
        (
            "Model",
            f"`{name}`, {height} x {width} pixels" + (f", {classes} classes" if classes else ""),
        ),
        ("Form", f"{to}, fp32"),
        *_steps(trained, commit),
        *_data(trained, commit),
        *_scores(trained, commit.step),
        ("Versions", ", ".join([f"mae-scale {__version__}", *_versions()])),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in table)
    flat = flatten(plain(config))
    recipe = {key: value for key, value in flat.items() if key.startswith(RECIPE)}
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}: {trained.task.name}

{trained.task.card}
with mae-scale after He et al., "Masked Autoencoders Are Scalable Vision Learners"
([arXiv 2111.06377](https://arxiv.org/abs/2111.06377)){average}.
{_inputs(bands)}

|  |  |
|---|---|
{rows}

## Load it

```python
{code}
```

## Recipe

```yaml
{yaml.safe_dump(recipe, sort_keys=False).strip()}
```

## Licence

Not stated yet: that of the weights is for whoever publishes them to choose, with regard to the
images and to the weights that training started from. Write it here, and as `license:` above.
"""


def _inputs(bands: Bands) -> str:
    """Say which images the model takes, and how their values are normalised."""
    if bands == RGB:
        return (
            "Inputs are RGB images, scaled to 0 to 1 and normalised with ImageNet's mean and "
            "deviation."
        )
    scaled = "scaled to 0 to 1"
    if bands.value_range is not None:
        scaled = f"scaled so that {np.array(bands.value_range).tolist()} becomes 0 to 1 and clipped"
    kind = "RGB images" if bands.count == 3 else f"images of {bands.count} bands"
    return (
        f"Inputs are {kind}, {scaled}, then normalised\nby the mean {list(bands.mean)} and the "
        f"deviation {list(bands.std)} of the bands."
    )


RECIPE = ("seed", "weights", "model.", "augment.", "train.", "optim.", "deepspeed")


def _steps(trained: TrainedRun, commit: Commit) -> list[tuple[str, str]]:
    facts = [("Steps", f"{commit.step:,}"), ("Images seen", f"{commit.samples:,}")]
    rows = [r for r in read_metrics(trained.run_dir / METRICS) if 0 < r["step"] <= commit.step]
    if rows and rows[-1].get("epoch") is not None:
        last = rows[-1]
        epochs = last["epoch"] / last["step"] * commit.step
        facts.append(("Epochs", f"{epochs:.4g} of {trained.config.train.epochs}"))
        if last.get("loss") is not None:
            facts.append(("Training loss", f"{last['loss']:.4f} at step {last['step']:,}"))
    trained_by = f"{commit.world_size} processes, ZeRO-{commit.zero_stage}, {commit.precision}"
    return [*facts, ("Trained by", trained_by)]


def _data(trained: TrainedRun, commit: Commit) -> list[tuple[str, str]]:
    """Name the shards, and count their images where the shards still exist."""
    path = trained.config.data.train
    facts = [("Data", f"`{path}`"), ("Fingerprint of the data", f"`{commit.data}`")]
    if (Path(path) / MANIFEST).is_file():
        try:
            shards = open_shards(path)
        except UserError:
            return facts
        if shards.fingerprint == commit.data:
            facts.append(("Images", f"{len(shards):,} of {len(shards.classes):,} classes"))
    return facts


def _scores(trained: TrainedRun, step: int) -> list[tuple[str, str]]:
    """Return the best validation up to a step, for the weights and for their moving average."""
    rows = [r for r in read_metrics(trained.run_dir / VALIDATION) if r["step"] <= step]
    facts = []
    for prefix, whose in (("", ""), (AVERAGED, " of the moving average")):
        decides = prefix + trained.task.best_by
        names = [decides, *(prefix + name for name in trained.task.scores)]
        scored = [row for row in rows if all(type(row.get(n)) in (int, float) for n in names)]
        if scored:
            best = max(scored, key=lambda row: row[decides])
            values = ", ".join(
                f"{label.removesuffix(', %')} {best[prefix + name]:.2f} %" if label.endswith("%")
                else f"{label} {best[prefix + name]:.4f}"
                for name, label in trained.task.scores.items()
            )  # fmt: skip
            facts.append((f"Best validation{whose}", f"{values}, at step {best['step']:,}"))
    return facts


def _versions() -> list[str]:
    names = ("torch", "deepspeed", "timm")
    return [*(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}"]
