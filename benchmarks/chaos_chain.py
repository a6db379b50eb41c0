"""A run that is struck by one fault after the other, and the checks after each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from chaos_faults import (
    ALONE,
    CLOCKS,
    DAMAGE,
    DEEPSPEED,
    FAILING,
    LASTING,
    PERHAPS_FAILING,
    SILENT,
    SMALL_SHARED_MEMORY,
    SRUN,
    STOPPING,
    TORCHRUN,
    WITH_PREPARATION,
    Output,
    clock_library,
    expected_codes,
    handles_signals,
    lasting,
)

SETTINGS = {
    "model.name": "mae_vit_tiny_patch16",
    "model.img_size": 32,
    "model.patch_size": 8,
    "model.depth": 2,
    "data.lanes": 4,
    "data.window": 16,
    "train.epochs": 100_000,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.log_every": 1,
    "optim.warmup_epochs": 10,
    "checkpoint.every_minutes": "null",
    "checkpoint.keep": 3,
}
CLOCK = ("images_per_second", "data_wait", "memory_gb", "mfu", "time")
FEW = 30  # most steps of a leg before its fault, so that chains stay short
PATIENCE_S = 600  # a loaded machine is slow; only a run that hangs takes so long

DECODER = {"model.decoder_embed_dim": 64, "model.decoder_depth": 1}


class Broken(AssertionError):
    """A check after a fault that fails; the message holds the run's output."""


@dataclass
class Row:
    """A line of the table."""

    launch: str
    fault: str
    moment: str
    codes: str
    found: str
    """State of the newest step folder after the fault."""
    step: int
    """Number of steps done when the fault struck."""
    redone: int = 0
    """Number of these steps that were done again."""


@dataclass
class Chain:
    """One run and its faults.

    Args:
        folder: folder for the run and its logs.
        shards: folder of shards to train on; the run reads a copy of them.
        processes: number of processes of the run, 1 or 2.
        seed: seed of the moments at which faults strike.
        task: pretrain, finetune or linprobe.
        elastic: whether each start has another number of processes (1 or 2) and ZeRO stage.
    """

    folder: Path
    shards: Path
    processes: int
    seed: int = 0
    task: str = "pretrain"
    elastic: bool = False
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.run_dir = self.folder / "run"
        self.checkpoints = self.run_dir / "checkpoints"
        self.random = random.Random(self.seed)
        self.mark = uuid.uuid4().hex
        self.shared_memory = set(Path("/dev/shm").iterdir())
        self.data = self.folder / "shards"
        shutil.copytree(self.shards, self.data)
        self.output_of_leg: Output | None = None
        self.damaged: set[str] = set()
        self.every, self.background = 1, False
        self.clock = self.folder / "clock"

    # Starting, and looking at what runs

    def launches(self) -> tuple[str, ...]:
        """Return the ways in which the run can be started."""
        if self.elastic:
            return (ALONE, SRUN)
        return (ALONE,) if self.processes == 1 else (SRUN, TORCHRUN, DEEPSPEED)

    def start(
        self, launch: str, run_dir: Path, fault: str = "", **settings: Any
    ) -> list[subprocess.Popen[bytes]]:
        """Start the command: all ranks by hand, as srun does, or by a launcher."""
        given = {**SETTINGS, **(DECODER if self.task == "pretrain" else {})}
        settings = {**given, "run_dir": run_dir, "data.train": self.data, **settings}
        arguments = [self.task, *(f"--{key}={value}" for key, value in settings.items())]
        port = free_port()
        n = self.processes
        modules = {
            ALONE: "mae_scale",
            SRUN: "mae_scale",
            TORCHRUN: f"torch.distributed.run --standalone --nproc_per_node {n} -m mae_scale",
            DEEPSPEED: f"deepspeed.launcher.runner --num_gpus {n} --master_port {port} "
            "--module mae_scale",
        }
        command = [sys.executable, "-m", *modules[launch].split(), *arguments]
        if fault == "/dev/shm full":
            command = [*SMALL_SHARED_MEMORY, *command]
        environment = dict(os.environ)
        if fault in CLOCKS:
            environment["LD_PRELOAD"] = str(clock_library(self.folder))
            environment["CHAOS_CLOCK"] = str(self.clock)
        self.output_of_leg = output = Output(fault, self.folder / "log")
        ranks = range(n) if launch == SRUN else [None]
        return [
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output.descriptor,
                stderr=output.descriptor,
                process_group=0,
                preexec_fn=output.prepare if fault in WITH_PREPARATION else None,
                env=environment
                | {"OMP_NUM_THREADS": "1", "CHAOS": self.mark}
                | ({} if rank is None else rank_environment(rank, n, port)),
            )
            for rank in ranks
        ]

    def family(self) -> list[psutil.Process]:
        """Return all living processes of the run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get("CHAOS") == self.mark:
                    found.append(process)
        return found

    def ranks(self, launch: str, started: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
        """Return the processes that train, in order; a launcher may not have started them yet."""
        if launch in (ALONE, SRUN):
            return [psutil.Process(process.pid) for process in started]
        training: dict[int, tuple[str, psutil.Process]] = {}
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and self.task in process.cmdline():
                    training[process.pid] = rank, process
        found = {}
        for rank, process in training.values():
            with contextlib.suppress(psutil.Error):
                if process.ppid() not in training:  # other processes are data workers
                    found[rank] = process
        return [found[rank] for rank in sorted(found)]

    # What the run folder says

    def metrics(self) -> list[dict[str, Any]]:
        """Return the whole rows, without what depends on the clock."""
        return read_metrics(self.run_dir)

    def folders(self) -> list[Path]:
        """Return the step folders, newest first."""
        return sorted(self.checkpoints.glob("step-*"), reverse=True)

    def newest(self) -> Path | None:
        """Return the newest committed step folder, once all of these are found to be whole."""
        newest = None
        for folder in self.folders():
            if (folder / "COMMITTED.json").exists() and folder.name not in self.damaged:
                commit = json.loads((folder / "COMMITTED.json").read_text())
                for name, facts in commit["files"].items():
                    content = (folder / name).read_bytes()
                    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
                        raise Broken(f"{folder / name} does not match its checksum")
                newest = newest or folder
        return newest

    def starts(self) -> list[int]:
        """Return the steps at which the run was started or resumed."""
        path = self.run_dir / "history.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines]
        return [e["step"] for e in events if e["event"] in ("started", "resumed")]

    # A fault

    def leg(self, launch: str, fault: str, moment: str) -> Row:
        """Start the run, let a fault strike, and look at what is left."""
        before, starts = self.newest(), self.starts()
        done = len(self.metrics())
        self.every = self.random.choice((1, 2, 3))
        self.background = self.random.choice((True, False))
        if fault == "no room for records":  # a save in the meantime would end the run
            self.every = 1000
        settings = {
            "checkpoint.every_steps": self.every,
            "checkpoint.background_gb": 0 if self.background else "null",
            "data.workers": 2 if fault == "worker killed" else self.random.choice((0, 2)),
        }
        if self.elastic:
            self.processes = 1 if launch == ALONE else 2
            settings["deepspeed"] = self.random.choice(("zero0", "zero1", "zero2", "zero3"))
        started = self.start(launch, self.run_dir, fault, **settings)
        try:
            self.wait_for(launch, started, moment, done)
            undo = self.strike(launch, started, fault)
            if fault in LASTING:
                self.live_on(launch, started, fault, undo)
            codes = self.wait_for_the_end(started)
            undo()
        except (subprocess.TimeoutExpired, Broken) as error:
            for process in self.family():
                process.kill()
            raise Broken(f"{launch}, {fault}, {moment}: {error}\n{self.output()}") from error
        finally:
            self.output_of_leg.close()
        step = len(self.metrics())
        row = Row(launch, fault, moment, " ".join(map(str, codes)), self.what_is_left(), step)
        self.check(row, codes, before, starts)
        if self.rows and len(self.starts()) > len(starts):
            self.rows[-1].redone = max(0, self.rows[-1].step - self.starts()[-1])
        if fault in DAMAGE:
            self.damage(fault)
        self.rows.append(row)
        return row

    def wait_for(
        self, launch: str, started: list[subprocess.Popen[bytes]], moment: str, done: int
    ) -> None:
        """Wait until the moment has come; a run that ends before it is wrong."""
        self.wait(started, lambda: len(self.ranks(launch, started)) == self.processes)
        ranks = self.ranks(launch, started)
        if moment == "start-up":
            self.wait(started, lambda: all(map(handles_signals, ranks)))
            time.sleep(self.random.uniform(0, 6))
            return
        base = self.starts()
        self.wait(started, lambda: len(self.starts()) > len(base) or len(self.metrics()) > done)
        first = len(self.metrics()) + self.random.randint(1, FEW // 3)
        self.wait(started, lambda: len(self.metrics()) >= first)
        if moment == "any":
            time.sleep(self.random.uniform(0, 1))
            return
        known = set(self.folders())
        files = max((len(list(folder.iterdir())) for folder in known), default=3)
        phases: dict[str, Callable[[Path], bool]] = {
            "save: begun": lambda folder: True,
            "save: files": lambda folder: len(list(folder.iterdir())) >= files - 1,
            "save: committed": lambda folder: (folder / "COMMITTED.json").exists(),
            "save: pruning": lambda folder: (
                (folder / "COMMITTED.json").exists()
                and any(not (old / "COMMITTED.json").exists() for old in self.folders())
            ),
        }

        def has_come() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return any(phases[moment](new) for new in self.folders() if new not in known)
            return False

        # Pruning is short; a fault that misses it strikes a little later.
        self.wait(started, has_come, seconds=5 if moment == "save: pruning" else PATIENCE_S)

    def wait(
        self,
        started: list[subprocess.Popen[bytes]],
        condition: Callable[[], bool],
        seconds: float = PATIENCE_S,
    ) -> None:
        """Wait until a condition holds; a run that ends by itself before it is wrong."""
        end = time.monotonic() + seconds
        while not condition():
            if any(process.poll() is not None for process in started):
                raise Broken("it ended by itself")
            if time.monotonic() > end:
                if seconds < PATIENCE_S:
                    return
                raise Broken("it does not get so far")
            time.sleep(0.001)

    def strike(
        self, launch: str, started: list[subprocess.Popen[bytes]], fault: str
    ) -> Callable[[], None]:
        """Let a fault strike, and return a function that undoes it."""
        ranks = self.ranks(launch, started)
        victim = self.random.choice(ranks)
        if fault == "SIGKILL a rank":
            victim.kill()
        elif fault == "SIGKILL all ranks" or fault in DAMAGE:
            for rank in ranks:
                rank.kill()
        elif fault == "SIGTERM twice":
            for rank in ranks * 2:
                rank.terminate()
        elif fault in ("SIGTERM", "SIGUSR1"):
            victim.send_signal(getattr(signal, fault))
        elif fault == "worker killed":
            self.wait(started, lambda: len(victim.children()) >= 2)
            self.random.choice(victim.children()).kill()
        elif fault in LASTING:
            return lasting(self, victim, ranks, fault)
        elif fault in ("SIGKILL launcher", "SIGTERM launcher"):
            started[0].send_signal(getattr(signal, fault.split()[0]))
        elif fault == "read-only folder":
            self.checkpoints.mkdir(exist_ok=True)
            self.checkpoints.chmod(0o555)
            return lambda: self.checkpoints.chmod(0o755)
        elif fault == "disk full":
            free = shutil.disk_usage(self.run_dir).free
            if free < 4e9:
                filler = self.folder / "filler"
                with filler.open("wb") as file, contextlib.suppress(OSError):
                    while file.write(bytes(1 << 20)):
                        pass
                return filler.unlink
            for rank in ranks:
                # Larger than logs, smaller than the parts of a checkpoint
                resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
        return lambda: None

    def live_on(
        self,
        launch: str,
        started: list[subprocess.Popen[bytes]],
        fault: str,
        undo: Callable[[], None],
    ) -> None:
        """Check that the run does some more steps in spite of a fault, and stop it."""
        done = len(self.metrics())
        if fault == "no room for records":
            time.sleep(3)  # the rows of the record wait
            undo()

        def goes_on() -> bool:
            ended = any(process.poll() is not None for process in started)
            return len(self.metrics()) >= done + 2 or (ended and fault in PERHAPS_FAILING)

        end = time.monotonic() + PATIENCE_S
        while not goes_on():
            if time.monotonic() > end or (
                fault not in PERHAPS_FAILING and any(p.poll() is not None for p in started)
            ):
                raise Broken("it does not go on")
            time.sleep(0.05)
        undo()
        for rank in self.ranks(launch, started)[:1]:
            with contextlib.suppress(psutil.Error):
                rank.terminate()

    def wait_for_the_end(self, started: list[subprocess.Popen[bytes]]) -> list[int]:
        """Wait until everything has ended, and return the exit codes."""
        codes = [process.wait(PATIENCE_S) for process in started]
        end = time.monotonic() + PATIENCE_S
        while left := self.family():
            if time.monotonic() > end:
                raise Broken(f"left behind: {left}")
            time.sleep(0.05)
        return codes

    def what_is_left(self) -> str:
        """Return how far the newest save came."""
        folders = self.folders()
        if not folders:
            return "no save"
        if (folders[0] / "COMMITTED.json").exists():
            whole = {f.name for f in folders if (f / "COMMITTED.json").exists()}
            half = {f.name for f in folders} - whole - self.damaged
            return "half-pruned" if half else "committed"
        return f"uncommitted, {len(list(folders[0].iterdir()))} files"

    def output(self) -> str:
        """Return the output of the run."""
        return (self.folder / "log").read_text(errors="replace")

    # The checks after a fault

    def check(self, row: Row, codes: list[int], before: Path | None, starts: list[int]) -> None:
        """Check exit codes, output, and where the run went on; raise `Broken` where one is
        wrong."""

        def must(holds: object, what: str) -> None:
            if not holds:
                raise Broken(f"{row}: {what}\n{self.output()}")

        for code in codes:
            must(code in expected_codes(row.launch, row.fault), f"exit codes {codes}")
        if row.launch == SRUN and row.fault == "SIGKILL a rank":
            must(sorted(codes) == [-9, 1], f"exit codes {codes}")
        must("/mae_scale/" not in tracebacks(self.output()), "a traceback")
        if row.fault in FAILING and row.fault not in SILENT:
            must("mae-scale: error: " in self.output(), "no line that says what is wrong")
        now = self.starts()
        if len(now) > len(starts):
            expected = 0 if before is None else int(before.name[5:])
            must(now[-1] == expected, f"went on from {now[-1]} instead of {expected}")
            for name in self.damaged:
                loud = row.fault not in SILENT
                if loud and ((self.checkpoints / name).exists() or before):
                    must("passed over" in self.output(), f"no word about {name}")
            self.damaged.clear()
        steps = [r["step"] for r in self.metrics()]
        must(steps == list(range(1, len(steps) + 1)), f"a gap or a repeat: {steps}")
        newest = self.newest()
        saved = 0 if newest is None else int(newest.name[5:])
        if row.fault in STOPPING and "stopped by" in self.output():
            must(saved == row.step, f"stopped at {row.step}, saved {saved}")
        # The save of this moment, and perhaps one that is being written in the background.
        most = 2 * self.every if self.background else self.every
        must(row.step - saved <= most, f"{row.step} done, {saved} saved")
        must(len(self.folders()) <= 3 + 2, f"not pruned: {self.folders()}")

    def damage(self, fault: str) -> None:
        """Spoil the newest checkpoint."""
        folder = self.newest()
        assert folder is not None
        commit = folder / "COMMITTED.json"
        files = sorted(p for p in folder.iterdir() if p.is_file() and p != commit)
        path = self.random.choice(files)
        if fault == "truncated file":
            os.truncate(path, self.random.randrange(path.stat().st_size))
        elif fault == "flipped bit":
            content = bytearray(path.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.write_bytes(content)
        elif fault == "missing file":
            path.unlink()
        elif fault == "empty file":
            path.write_bytes(b"")
        else:
            other = json.loads(commit.read_text())
            commit.write_text(json.dumps(other | {"config_hash": hashlib.sha256().hexdigest()}))
        self.damaged.add(folder.name)

    # The end

    def finish(self) -> int:
        """Go on to the end, compare with an undisturbed run, and give the number of steps."""
        total = len(self.metrics()) + 3
        ends = {"train.max_steps": total, "checkpoint.every_steps": 1000}
        whole = self.folder / "undisturbed"
        launch = self.launches()[0]
        if self.elastic:
            self.processes = 1
        for run_dir in (self.run_dir, whole):
            started = self.start(launch, run_dir, **ends, **{"data.workers": 2})
            codes = [process.wait(30 * PATIENCE_S) for process in started]
            if self.output_of_leg is not None:
                self.output_of_leg.close()
            if any(codes):
                raise Broken(f"exit codes {codes}\n{self.output()}")
        if self.rows:
            self.rows[-1].redone = max(0, self.rows[-1].step - self.starts()[-1])
        pairs = list(zip(self.metrics(), read_metrics(whole), strict=True))
        equal = nearly_equal if self.elastic else dict.__eq__
        if wrong := [a["step"] for a, b in pairs if not equal(a, b)]:
            raise Broken(f"metrics differ from those of the undisturbed run at {wrong[:10]}")
        if left := [p.name for p in self.run_dir.rglob("*.tmp")]:
            raise Broken(f"left behind: {left}")
        if left := [path for path in self.new_shared_memory() if not _maker_lives(path)]:
            raise Broken(f"left behind in /dev/shm: {left}")
        return total

    def new_shared_memory(self) -> set[Path]:
        """Return the files in /dev/shm that were not there at the beginning."""
        return set(Path("/dev/shm").iterdir()) - self.shared_memory


def _maker_lives(path: Path) -> bool:
    """Return whether a number in the file's name, such as torch_123_456_0, is a living process.

    Such a file belongs to another program on the machine: nothing of the run is alive.
    """
    return any(psutil.pid_exists(int(number)) for number in re.findall(r"\d+", path.name)[:1])


def tracebacks(output: str) -> str:
    """Return the lines of tracebacks that name files; launchers have tracebacks of their own."""
    return "".join(line for line in output.splitlines() if line.startswith('  File "'))


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that a Slurm script sets for a rank."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **where}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the whole rows of a run's metrics.jsonl, without what depends on the clock."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nearly_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether rows agree up to the rounding of sums over other numbers of processes."""
    return one.keys() == other.keys() and all(
        one[key] == other[key]
        or (key in ("loss", "grad_norm") and math.isclose(one[key], other[key], rel_tol=1e-3))
        for key in one
    )
