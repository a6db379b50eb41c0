"""The HTML page of `mae-scale report`: one run, or several on common axes."""

from __future__ import annotations

import base64
import io
import os
import time
import zlib
from collections.abc import Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mae_scale.config.identity import flatten
from mae_scale.data.formats import MAX_FILE, open_image
from mae_scale.errors import UserError
from mae_scale.files import read_file, write_atomically
from mae_scale.launch.console import size_text
from mae_scale.watching.charts import spread
from mae_scale.watching.curves import ReportedRun, curves
from mae_scale.watching.health import duration
from mae_scale.watching.run_view import SESSION, RunView

_MOST_PIXELS = 1 << 26  # most pixels of a picture that is read; those of a run have a tenth of it
PICTURES = 6  # largest number of pictures of a run
PICTURE_SIDE = 1400  # largest width of a picture on the page, in pixels
LEGEND = (
    "Each picture: the image, what the model sees of it, what it makes of that, and the same with "
    "the visible patches in their places. The loss counts hidden patches only, so that the model's "
    "own version of visible ones may look wrong. Click to enlarge."
)
ROWS = 40  # number of last rows that a table shows
# Policy by which the browser itself sees to it that nothing is fetched.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Colours that can be told apart on light and dark ground, and by most colour-blind people (after
# Okabe and Ito).
COLOURS = ("#1f83c4", "#e07b12", "#14a06f", "#c9559a", "#8a6be0", "#b8960c", "#d4493b", "#5b8f99")


def write_report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write the page about some runs; to show it, no other file and no network is needed.

    Args:
        folders: run folders.
        out: HTML file to write or replace.

    Raises:
        UserError: a folder is no run folder, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out} must end in .html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the file to write")
    views = [RunView(folder) for folder in folders]
    names = [view.name for view in views]
    runs = [
        ReportedRun(view, view.name if names.count(view.name) == 1 else str(view.folder), colour)
        for view, colour in zip(views, cycle(COLOURS), strict=False)
    ]
    content = page(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None


def page(runs: list[ReportedRun]) -> str:
    """Compose the whole page as HTML."""
    title = " · ".join(run.label for run in runs)
    css = Path(__file__).with_name("report.css").read_text()
    sections = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="soft">mae-scale, {time.strftime("%Y-%m-%d %H:%M")}</p></header>',
        f"<h2>{'Runs' if len(runs) > 1 else 'Run'}</h2>",
        f'<div class="grid">{"".join(map(_card, runs))}</div>',
        *curves(runs),
        *(part for run in runs for part in _pictures(run, len(runs) > 1)),
        *_differences(runs),
        *(part for run in runs for part in _details(run)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
{chr(10).join(sections)}
</body>
</html>
"""


def _card(run: ReportedRun) -> str:
    view, facts, metrics = run.view, run.view.facts, run.metrics
    numbers: dict[str, str] = {}
    total = facts.get("total_steps")
    numbers["step"] = f"{view.step:,} of {total:,}" if total else f"{view.step:,}"
    if len(metrics["step"]):
        numbers["epoch"] = f"{metrics['epoch'][-1]:.4g}"
        finite = metrics["loss"][np.isfinite(metrics["loss"])]
        numbers["loss"] = f"{finite[-1]:.4f}" if len(finite) else "not finite"
        numbers["images/s"] = _value(np.nanmedian(metrics["images_per_second"]), ",.0f")
        numbers["data wait"] = _value(100 * np.nanmedian(metrics["data_wait"]), ".2g", " %")
        numbers["memory"] = _value(np.nanmax(metrics["memory_gb"]), ".3g", " GB")
        if np.isfinite(metrics["mfu"]).any():
            numbers["MFU"] = _value(100 * np.nanmedian(metrics["mfu"]), ".3g", " %")
        numbers["trained for"] = duration(run.seconds)
        if np.nanmax(metrics["bad_steps"], initial=0) > 0:
            numbers["steps not applied"] = f"{np.nanmax(metrics['bad_steps']):.0f}"
    best = view.best_validation()
    if best:
        score, row = best
        numbers[f"best {score}"] = f"{row[score]:.2f} % at step {row['step']:,}"
    numbers["restarts"] = str(len(view.resumes))
    items = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in numbers.items()
    )
    task = facts.get("task", "training")
    return (
        f'<article class="card run" style="--colour:{run.colour}"><h3>{escape(run.label)}</h3>'
        f'<p class="soft"><span class="state {view.state.split()[0]}">{view.state}</span> · '
        f"{escape(str(task))} · {escape(view.model)}</p><dl>{items}</dl></article>"
    )


def _value(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if np.isfinite(value) else "not finite"


def _pictures(run: ReportedRun, several: bool) -> list[str]:
    """Compose the section of reconstructions: those of training, and `reconstructions.png`.

    The latter is what `mae-scale reconstruct` writes; it may be missing.
    """
    folder = run.view.folder
    steps = {
        int(path.stem.removeprefix("step-")): path
        for path in folder.glob("reconstructions/step-*.png")
        if path.stem.removeprefix("step-").isdecimal()
    }
    files = {f"step {step:,}": steps[step] for step in spread(sorted(steps), PICTURES)}
    files |= {path.name: path for path in [folder / "reconstructions.png"] if path.is_file()}
    if not files:
        return []
    figures = "".join(
        _figure(caption, path, f"picture-{zlib.crc32(os.fsencode(folder)):x}-{number}")
        for number, (caption, path) in enumerate(files.items())
    )
    of = f" of {escape(run.label)}" if several else ""
    return [
        f"<h2>Reconstructions{of}</h2>",
        f'<p class="soft">{LEGEND}</p>',
        f'<div class="pictures">{figures}</div>',
    ]


def _figure(caption: str, path: Path, anchor: str) -> str:
    """Compose a figure whose picture fills the window when it is clicked, by CSS alone."""
    stream = io.BytesIO()
    try:
        with open_image(read_file(path, MAX_FILE), _MOST_PIXELS) as image:
            picture = image.convert("RGB")
    except Exception:  # PIL passes on all errors of its decoders
        return f"<figure><figcaption>{escape(path.name)} cannot be read</figcaption></figure>"
    picture.thumbnail((PICTURE_SIDE, 4 * PICTURE_SIDE))
    picture.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure class="card" id="{anchor}"><a href="#{anchor}" title="enlarge">'
        f'<img alt="{escape(caption)}" src="data:image/jpeg;base64,{data}"></a>'
        f'<a class="close" href="#close">close</a>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _differences(runs: list[ReportedRun]) -> list[str]:
    """Compose a table of the config keys in which the runs differ."""
    if len(runs) < 2:
        return []
    configs = [flatten(run.view.config) for run in runs]
    rows = [
        [key, *(str(config.get(key, "")) for config in configs)]
        for key in {key: None for config in configs for key in config}
        if any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    table = _table(["key", *(run.label for run in runs)], rows)
    return ["<h2>What differs in their configs</h2>", f'<div class="card">{table}</div>']


def _details(run: ReportedRun) -> list[str]:
    """Compose the details of a run: starts and stops with versions, checkpoints, config."""
    view = run.view
    facts = {"host": "host", "world_size": "processes", "zero_stage": "ZeRO",
             "precision": "precision", "device": "device"}  # fmt: skip
    events = [
        [row["event"], _date(row.get("time")), f"{row['step']:,}", *map(row.get, facts),
         _versions(row)]
        for row in view.history[-ROWS:]
    ]  # fmt: skip
    history = _table(["event", "time", "step", *facts.values(), "versions"], events)
    saved = [
        [f"{row.commit['step']:,}", _date(row.time), size_text(row.bytes),
         *(row.commit.get(key) for key in ("world_size", "zero_stage", "precision", "score")),
         row.visible_damage() or ("kept for good" if row.commit.get("milestone") else "")]
        for row in view.checkpoints[-ROWS:]
    ]  # fmt: skip
    heads = ["step", "time", "size", "processes", "ZeRO", "precision", "top-1", ""]
    starts = sum(row["event"] in SESSION for row in view.history)
    config = yaml.safe_dump(view.config, sort_keys=False, allow_unicode=True)

    def shown(rows: list[Any]) -> str:
        return f"; the last {ROWS} rows" if len(rows) > ROWS else ""

    return [
        f"<h2>{escape(run.label)}</h2>",
        _folded(f"Starts and stops ({starts}{shown(view.history)})", history),
        _folded(
            f"Checkpoints ({len(view.checkpoints)}{shown(view.checkpoints)})", _table(heads, saved)
        ),
        _folded("Config", f"<pre>{escape(config)}</pre>"),
    ]


def _folded(summary: str, content: str) -> str:
    return f'<details class="card"><summary>{summary}</summary>{content}</details>'


def _versions(row: dict[str, Any]) -> str:
    names = {"version": "mae-scale", "torch": "torch", "deepspeed": "DeepSpeed"}
    return ", ".join(f"{name} {row[key]}" for key, name in names.items() if key in row)


def _date(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    if not rows:
        return '<p class="soft">none</p>'
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{'' if v is None else escape(str(v))}</td>" for v in row) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'
