"""`mae-scale status` and `mae-scale report` on folders of real runs, whole and damaged."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from runs import Run

from mae_scale.cli import main
from mae_scale.commands.status import status
from mae_scale.train.run_dir import add_history
from mae_scale.watching.run_view import RunView

STRANGE = 'a <script>alert(1) & "ünï" $x_1$ \'b'
VOID = {"meta", "img", "br", "input", "link"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Pre-train six steps, with a stop after the third and with two pictures."""
    run = Run(tmp_path_factory.mktemp("runs") / STRANGE, shards)
    for steps in (3, 6):
        run.settings = {"train.max_steps": steps, "train.reconstruct_every": 1000,
                        "model.depth": 2}  # fmt: skip
        run.finish()
    return run.run_dir


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, shards: Path, val_shards: Path) -> Path:
    """Fine-tune one epoch, with a validation of the weights and of the moving average."""
    settings = {"data.val": val_shards, "optim.ema_decay": 0.9, "train.epochs": 1,
                "optim.warmup_epochs": 0, "model.depth": 2}  # fmt: skip
    run = Run(tmp_path_factory.mktemp("runs") / "tuned", shards, settings, task="finetune")
    run.finish()
    return run.run_dir


@pytest.fixture
def copy(pretrained: Path, tmp_path: Path) -> Path:
    """Copy the pre-training run, so that a test may change it."""
    return Path(shutil.copytree(pretrained, tmp_path / "copy"))


class Page(HTMLParser):
    """Parser of a page that collects its content and checks that it is well-formed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.content = path.read_text()
        self.feed(self.content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def check_nothing_is_fetched(self) -> None:
        """Check that no tag, attribute or style makes a browser fetch anything."""
        assert not {tag for tag, _ in self.tags} & {"script", "link", "iframe", "object", "base"}
        for _, attributes in self.tags:
            for name, value in attributes.items():
                assert not name.startswith("on")
                if name in ("src", "href", "xlink:href", "srcset", "data"):
                    assert value and value.startswith(("data:", "#"))
        assert not re.search(r"url\((?!#)|@import", self.content)


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def test_a_report_of_two_runs_holds_everything_in_one_file(
    pretrained: Path, tuned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new folder" / "seen.html"
    assert report(pretrained, tuned, "--out", out) == 0
    page = Page(out)
    page.check_nothing_is_fetched()
    assert page.texts.count(STRANGE) == 4  # card, legend, table of differences, details
    common = [
        "Learning rate", "Gradient norm", "Images per second",
        "Share of the time spent waiting for data", "Memory of a rank, GB",
    ]  # fmt: skip
    scores = ["Validation: top-1, %", "Validation: top-5, %", "Validation: loss"]
    headings = page.texts[page.texts.index("Curves of pretrain") :]
    own = headings[: headings.index("Curves of finetune")]
    other = headings[len(own) : headings.index(f"Reconstructions of {STRANGE}")]
    for task, expected in ((own, ["Loss", *common]), (other, ["Loss", *scores, *common])):
        assert [text for text in task if text in {*expected, *scores}] == expected
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 15
    images = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert images == ["step-00000003.png", "step-00000006.png"]
    facts = dict(zip(page.texts, page.texts[1:], strict=False))
    best = max(json.loads(line)["ema_top1"] for line in (tuned / "validation.jsonl").open())
    assert facts["best ema_top1"] == f"{best:.2f} % at step 10"
    assert facts["step"] and "10 of 10" in page.texts and "6 of 6" in page.texts
    assert "optim.ema_decay" in page.texts and "optim.betas" in page.texts
    assert "resumed" in page.texts and "Dashed curves" in out.read_text()
    assert len(out.read_bytes()) < 1_500_000


def test_a_report_of_what_is_there(copy: Path, tmp_path: Path) -> None:
    """The folder has a name that is not UTF-8, half a row, no history, no checkpoints, a broken
    picture, and then no rows at all."""
    copy = copy.rename(tmp_path / "copy\udcff")
    out = tmp_path / "report.html"
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    (copy / "history.jsonl").unlink()
    shutil.rmtree(copy / "checkpoints")
    (copy / "reconstructions" / "step-00000003.png").write_bytes(b"no picture")
    shutil.copy(copy / "reconstructions" / "step-00000006.png", copy / "reconstructions.png")
    assert report(copy, "--out", out) == 0
    page = Page(out)
    assert "6" in page.texts and "step-00000003.png cannot be read" in page.texts
    assert "reconstructions.png" in page.texts
    for path in [copy / "metrics.jsonl", *copy.glob("reconstructions*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert report(copy, "--out", out) == 0
    page = Page(out)
    assert "No step has been logged yet." in page.texts and "not started" in page.texts


def test_a_report_of_many_rows_and_restarts_stays_small(copy: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").open()]
    with (copy / "metrics.jsonl").open("w") as file:
        for step in range(1, 30_001):
            row = {**rows[step % 6], "step": step, "epoch": step / 10, "samples": 24 * step}
            loss = None if step % 1000 == 0 else 2 / step**0.1
            file.write(json.dumps({**row, "loss": loss, "bad_steps": step // 1000}) + "\n")
    for step in range(0, 30_000, 500):
        add_history(copy, "resumed", step, total_steps=40_000)
    out = tmp_path / "report.html"
    assert report(copy, "--out", out) == 0
    page = Page(out)
    assert "30,000 of 40,000" in page.texts and "30" in page.texts
    assert len(out.read_bytes()) < 1_500_000
    assert "Steps not applied so far" in page.texts


def test_runs_of_one_name_are_told_apart_by_their_folders(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other" / "copy"))
    out = tmp_path / "report.html"
    assert report(copy, other, "--out", out) == 0
    texts = Page(out).texts
    assert str(copy) in texts and str(other) in texts


def test_rows_that_are_torn_repeated_or_unreadable_are_named(copy: Path, tmp_path: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    strange = json.dumps({**json.loads(lines[5]), "step": 7, "lr": "<b>"}) + "\n"
    (copy / "metrics.jsonl").write_text(
        "".join([*lines[:4], lines[4][:30] + "\n", *lines[2:], strange])
    )
    (copy / "validation.jsonl").mkdir()
    flaws = [
        "metrics.jsonl: lines that are no rows of a run, left out: 2",
        "metrics.jsonl: rows that repeat a step, left out: 2",
        "validation.jsonl: cannot be read: it is a folder, not a file",
    ]
    text = status(RunView(copy))
    assert all(f"  ! {flaw}\n" in f"{text}\n" for flaw in flaws)
    assert report(copy, "--out", tmp_path / "report.html") == 0
    page = Page(tmp_path / "report.html")
    assert {f"! {flaw}" for flaw in flaws} <= set(page.texts) and "6 of 6" in page.texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{nothing}"], "is no folder"),
        (["{shards}"], "is no run folder: it has no config.yaml"),
        (["{copy}", "--out", "report.txt"], "--out report.txt must end in .html"),
        (["{copy}", "--out", "{folder}"], "is a folder; name the file"),
        (["{copy}", "--out", "{copy}/config.yaml/report.html"], "cannot be written"),
        (["{copy}", "--ou", "x.html"], "unrecognized arguments: --ou"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_bad_input_of_a_report_gets_one_line(
    copy: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder.html"
    folder.mkdir()
    before = sorted(tmp_path.iterdir())
    places = {"nothing": tmp_path / "nothing", "shards": shards, "copy": copy, "folder": folder}
    assert report(*(text.format(**places) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_status_needs_no_torch_and_changes_nothing(pretrained: Path, tuned: Path) -> None:
    code = "import sys; from mae_scale.cli import main; code = main(sys.argv[1:])\n"
    code += "sys.exit(code or 'torch' in sys.modules)"
    before = {p: p.stat().st_mtime_ns for p in pretrained.rglob("*")}
    command = [sys.executable, "-c", code, "status", str(pretrained), str(tuned)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in pretrained.rglob("*")} == before
    first, second = done.stdout.split("\n\n" + str(tuned))
    assert "pretrain of mae_vit_tiny_patch16\nfinished, on" in first and "\033" not in first
    assert "step           6 of 6   epoch 0.60 of 0.6" in first and "100.0 %" in first
    assert "restarts       1, the last from step 3" in first
    assert re.search(r"checkpoint     step 6, .* ago   2 kept, \d+", first)
    assert "finetune of" in second and re.search(r"best +ema_top1 \d+\.\d\d % at step 10", second)
    assert done.stdout.count("nothing unusual") == 2
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(tuned) not in line
               and str(pretrained) not in line)  # fmt: skip


def rewrite(run: Path, count: int, now: float, **changes: Any) -> None:
    """Write rows as of a running run: one every ten seconds, the last one ten seconds old."""
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    rows = []
    for step in range(1, count + 1):
        same = {"step": step, "samples": 24 * step, "loss": 2.0 - 0.01 * step, "data_wait": 0.01,
                "images_per_second": 48.0, "time": now - 10 * (count - step + 1)}  # fmt: skip
        rows.append({**row, **same, **(changes if step > count - 20 else {})})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def begin(run: Path, now: float, **facts: Any) -> None:
    """Make the history end with a start."""
    row = {"event": "resumed", "step": 3, "time": now - 5000, "host": RunView(run).facts["host"]}
    length = {"total_steps": 200, "steps_per_epoch": 10, "task": "pretrain"}
    with (run / "history.jsonl").open("a") as file:
        file.write(json.dumps({**row, **length, **facts}) + "\n")


def test_the_states_of_a_run(copy: Path) -> None:
    now = time.time()
    assert RunView(copy).state == "finished"
    begin(copy, now)
    assert RunView(copy).state == "failed"
    assert "it ended without saying why" in status(RunView(copy))
    rewrite(copy, 100, now)
    assert RunView(copy).state == "failed"  # the run is this host's, and its lock is free
    lock = (copy / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert RunView(copy).state == "starting"
    os.utime(copy / ".lock", (now - 4000, now - 4000))
    assert RunView(copy).state == "running"
    lock.close()
    assert RunView(copy).state == "failed"
    begin(copy, now, host="elsewhere")
    assert RunView(copy).state == "running"  # locks of other hosts may not be seen
    add_history(copy, "stopped", 100)
    assert RunView(copy).state == "stopped"
    for name in ("history.jsonl", "metrics.jsonl", ".lock"):
        (copy / name).unlink()
    assert RunView(copy).state == "not started"
    assert "step           6\n" in status(RunView(copy))  # the checkpoint says so


def test_a_probe_leaves_the_lock_free(copy: Path) -> None:
    RunView(copy)
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_progress_of_a_running_run(copy: Path) -> None:
    now = time.time()
    begin(copy, now, host="elsewhere")
    rewrite(copy, 100, now)
    text = status(RunView(copy), now=now)
    assert "[" + "#" * 20 + "-" * 20 + "] 50.0 %" in text
    assert "ETA            50 s (" in text  # 100 steps of half a second
    assert "loss           1.0000   mean of the last 50 steps -0.5000 against those before" in text
    assert "speed          48 images/s   0.5 s a step" in text
    assert "last row       10 s ago   one every 10 s" in text
    assert text.endswith("  nothing unusual")
    assert "\033[32mrunning\033[0m" in status(RunView(copy), colours=True, now=now)


@pytest.mark.parametrize(
    ("changes", "later", "line"),
    [
        ({"data_wait": 0.4}, 0, "it waits for data 40% of the time"),
        ({"images_per_second": 20.0}, 0, "slower than before: 48 images/s was usual"),
        ({"bad_steps": 7}, 0, "7 steps were not applied (not finite), the last by step 81"),
        ({"loss": None}, 0, "loss or gradient of step 100 is not finite"),
    ],
)
def test_what_is_unusual_is_said(
    copy: Path, changes: dict[str, Any], later: float, line: str
) -> None:
    now = time.time()
    begin(copy, now, host="elsewhere")
    rewrite(copy, 100, now, **changes)
    text = status(RunView(copy), now=now + later)
    assert f"  ! {line}" in text and text.count("!") == 1


def test_silence_a_late_checkpoint_and_damage_are_said(copy: Path) -> None:
    now = time.time()
    begin(copy, now)
    rewrite(copy, 100, now)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("every_minutes: null", "every_minutes: 30"))
    (copy / "checkpoints" / "step-00000003" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    (copy / "checkpoints" / "step-00000009").mkdir()
    os.utime(copy / "checkpoints" / "step-00000006" / "COMMITTED.json", (now, now))
    lock = (copy / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.utime(copy / ".lock", (now - 4000, now - 4000))
    text = status(RunView(copy), now=now + 3000)
    assert "! no row for 50 min 10 s, one every 10 s before" in text
    assert "! a checkpoint should have been written 20 min ago" in text
    assert "! checkpoint step-00000003 is damaged: mp_rank_00_model_states.pt has 4 bytes" in text
    lock.close()
    assert "! not committed, and not counted: step-00000009" in status(RunView(copy))


def test_status_again_and_again_until_it_is_interrupted(pretrained: Path) -> None:
    command = [sys.executable, "-m", "mae_scale", "status", str(pretrained), "--watch", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        heads = 0
        while heads < 2:
            heads += "pretrain of" in p.stdout.readline()
        p.send_signal(2)
        _, errors = p.communicate(timeout=20)
    assert p.returncode == 0 and errors == ""


# This script puts the page's width, overlapping texts of charts and visible parts into the title.
MEASURE = """<script>
const overlaps = [];
for (const svg of document.querySelectorAll('svg')) {
  const texts = [...svg.querySelectorAll('text')]
    .map(text => ({text: text.textContent, box: text.getBoundingClientRect()}))
    .filter(({box}) => box.width);
  texts.forEach(({text: a, box: p}, i) => texts.slice(i + 1).forEach(({text: b, box: q}) => {
    if (p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom)
      overlaps.push(`${svg.textContent}: ${a} over ${b}`);
  }));
}
const charts = [...document.querySelectorAll('svg')];
document.title = JSON.stringify({
  page: document.documentElement.scrollWidth, window: innerWidth, overlaps,
  charts: charts.filter(svg => svg.getBoundingClientRect().height > 100).length,
  pictures: [...document.images].filter(image => image.naturalWidth > 100).length,
});
</script></body>"""


@pytest.mark.parametrize("width", [500, 1280])  # chromium has no smaller window
def test_a_browser_shows_it_whole(
    pretrained: Path, tuned: Path, tmp_path: Path, width: int
) -> None:
    """Nothing is cut off or overlaps, no picture is missing, and the browser reports no error."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (apt: chromium)")
    out = tmp_path / "report.html"
    assert report(pretrained, tuned, "--out", out) == 0

    def browse(page: Path) -> tuple[str, str]:
        options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync"
        options += " --disable-background-networking --disable-component-update --dump-dom"
        options += f" --enable-logging=stderr --window-size={width},900"
        place = [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
        done = subprocess.run(
            [chromium, *options.split(), *place], capture_output=True, text=True, timeout=120
        )
        return done.stdout, done.stderr

    _, messages = browse(out)
    assert "CONSOLE" not in messages, messages
    measured = tmp_path / "measured.html"
    open_to_scripts = re.sub(
        '<meta http-equiv="Content-Security-Policy"[^>]*>', "", out.read_text()
    )
    measured.write_text(open_to_scripts.replace("</body>", MEASURE))
    dom, _ = browse(measured)
    found = json.loads(title_of(dom))
    assert found["page"] <= found["window"] == width
    assert found["overlaps"] == []
    assert (found["charts"], found["pictures"]) == (15, 2)


def title_of(dom: str) -> str:
    """Give the title of a page."""
    match = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert match is not None
    return unescape(match[1])
