"""A real Slurm of two nodes on this machine, in a folder of its own."""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SBIN = "/usr/sbin"  # not on every user's PATH
NODES = ("n1", "n2")
CPUS = 4  # CPUs of each node, however many the machine has
CRED_EXPIRE_S = 5  # seconds that a requeued job waits
NODE_TIMEOUT_S = 10  # seconds after which a silent node is down
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

# Partitions with a higher PriorityTier preempt those with a lower one. `low` gives 60 s to save,
# `harsh` none beyond KillWait.
CONFIG = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmdTimeout={node_timeout}
ReturnToService=2
MinJobAge=3600
KillWait=30
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs={cpus} Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs={cpus} Gres=gpu:2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=harsh Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """List the programs of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if _which(name) is None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until a condition is true, or fail after a time limit."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


@dataclass
class Job:
    """A job that was submitted.

    Args:
        cluster: cluster on which the job runs.
        number: number of the job there.
        log: file with what the job prints.
    """

    cluster: Cluster
    number: str
    log: Path

    def record(self) -> dict[str, str]:
        """Give what `scontrol show job` says about the job."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def output(self) -> str:
        """Give what the job has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait until a condition on the job is true."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                told = f"{self.record()}\n{self.output()}\n{self.cluster.logs()}"
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{told}")
            time.sleep(0.1)

    def wait_for_text(self, text: str, times: int = 1, seconds: float = 120) -> None:
        """Wait until the job has printed a text."""
        self.wait_for(lambda: self.output().count(text) >= times, text, seconds)

    def finish(self, state: str = "COMPLETED", code: int = 0, seconds: float = 180) -> str:
        """Wait for the end of the job, check how it ended, and give what it has printed."""
        self.wait_for(lambda: self.record()["JobState"] in ENDS, "the end", seconds)
        record = self.record()
        ended = (record["JobState"], record["ExitCode"])
        assert ended == (state, f"{code}:0"), f"{record}\n{self.output()}"
        return self.output()


class Cluster:
    """A cluster of munged, slurmctld and a slurmd per node; `close` ends them and all they
    started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        other = ("SLURM", "SBATCH_", "MAE_")  # settings of a cluster that runs the tests
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(other)}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()

    def start(self) -> None:
        """Start all daemons; they work when this returns."""
        folder = self.folder
        socket_of_step = len(f"{folder}/spool.n1/n1_1000000.4294967291")
        assert socket_of_step < 108, f"Slurm's sockets need a shorter path than {folder}"
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        config = CONFIG.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            first_job=secrets.randbelow(1_000_000) + 1,  # ports follow from the number of a job
            cpus=CPUS,
            cred_expire=CRED_EXPIRE_S,
            node_timeout=NODE_TIMEOUT_S,
            **dict(zip(("ctld", *NODES), _free_ports(3), strict=True)),
        )
        (folder / "slurm.conf").write_text(config)
        (folder / "gres.conf").write_text(
            "AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
        )
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in names]
        self._keep("munged", ["--foreground", "--force", *files])
        wait_until((folder / "munge.socket").exists, 20, "munged")
        self._keep("slurmctld", ["-D"])
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.idle() == set(NODES), 60, f"two idle nodes\n{self.logs()}")

    def _keep(self, name: str, arguments: list[str], program: str = "") -> None:
        keeper = Path(__file__).with_name("keeper.py")
        with (self.folder / f"{name}.out").open("ab") as out:
            self._keepers[name] = subprocess.Popen(
                [sys.executable, keeper, _which(program or name) or name, *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for pytest
                env=self.env,
            )

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._keep(node, ["-D", "-N", node], "slurmd")

    def kill_node(self, node: str) -> None:
        """Kill the slurmd of a node and all that it started, as pulling the plug does."""
        self._end(node)

    def _end(self, name: str) -> None:
        keeper = self._keepers.pop(name)
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait()

    def close(self) -> None:
        """Kill all daemons; nodes first, so that none reports the end of the others."""
        for name in reversed(list(self._keepers)):
            self._end(name)

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run one of Slurm's commands, and give what it prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, (command, done.stdout, done.stderr)
        return done.stdout

    def idle(self) -> set[str]:
        """List the nodes that wait for work."""
        return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())

    def submit(
        self,
        template: Path,
        *arguments: str | Path,
        cwd: Path,
        options: str = "",
        site: Path | None = None,
    ) -> Job:
        """Call `sbatch OPTIONS TEMPLATE ARGUMENTS` in the folder `cwd`, which gets the log.

        With `site`, that file has been sourced before.
        """
        log = cwd / f"{template.stem} {len(list(cwd.glob('*.log')))}.log"
        command = ["sbatch", "--parsable", f"--output={log}", *options.split(), str(template)]
        if site is not None:
            command = ["bash", "-c", 'source "$0" && exec "$@"', str(site), *command]
        done = subprocess.run(
            [*command, *arguments], env=self.env, cwd=cwd, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), log)

    def logs(self) -> str:
        """Give the ends of the daemons' logs."""
        ends = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted(self.folder.glob("*.log"))
        ]
        return "\n".join(ends)


def _free_ports(number: int) -> list[int]:
    """Choose ports that nobody listens on.

    They lie below those that the kernel gives to connections. Otherwise a connection of another
    test could take one before the daemon listens on it.
    """
    with ExitStack() as stack:
        found: set[int] = set()
        while len(found) < number:
            probe, port = stack.enter_context(socket.socket()), 7000 + secrets.randbelow(3000)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.add(port)
        return sorted(found)
