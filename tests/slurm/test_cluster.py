"""The cluster of these tests itself, which must leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster import missing_programs, wait_until

pytestmark = pytest.mark.alone

SCRIPT = """
import sys, time
from pathlib import Path
from cluster import Cluster

cluster = Cluster(Path(sys.argv[1]))
cluster.start()
cluster.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000")
time.sleep(1000)
"""


@pytest.mark.skipif(bool(missing_programs()), reason="Slurm is not installed")
def test_it_ends_with_whoever_started_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("slurm")
    said = folder / "said.txt"
    with said.open("w") as out:
        starter = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, folder], cwd=Path(__file__).parent, stderr=out
        )
    try:
        wait_until(lambda: "sleep" in _names(folder) or starter.poll() is not None, 90, "a job")
        logs = [file.read_text() for file in folder.glob("*.log")]
        assert starter.poll() is None, "\n".join([said.read_text(), *logs])
    finally:
        starter.kill()
        starter.wait()
    wait_until(lambda: not _names(folder), 20, f"the end of {_names(folder)}")


def _names(folder: Path) -> set[str]:
    """Name the processes that belong to the cluster in this folder."""
    config = str(folder / "slurm.conf")
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == config:
                found.add(process.name())
        except psutil.Error:
            continue
    return found
