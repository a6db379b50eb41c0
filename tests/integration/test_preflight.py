"""Two ranks that cannot work together say why once, before the first step, and leave nothing."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from runs import REPOSITORY, Run, free_port, send

from mae_scale.config.sections import CheckpointConfig
from mae_scale.errors import CommonError
from mae_scale.train import preflight
from mae_scale.train.run_dir import note_restart


def start_two(run: Run, second: Run, **environment: str) -> list[str]:
    """Start rank 0 of `run` and rank 1 of `second`; give their outputs when both have ended with
    2."""
    port = str(free_port())
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first = run.start(RANK="0", LOCAL_RANK="0", SLURMD_NODENAME="n1", **where)
    other = second.start(RANK="1", LOCAL_RANK="1", SLURMD_NODENAME="n2", **{**where, **environment})
    outputs = [process.communicate(timeout=120)[0] for process in (first, other)]
    assert [first.returncode, other.returncode] == [2, 2], outputs
    return outputs


@pytest.mark.parametrize("what", ["code", "config", "data", "no data", "folder"])
def test_ranks_that_differ(run: Run, tmp_path: Path, what: str) -> None:
    second, environment = replace(run), {}
    if what == "code":
        copy = tmp_path / "older" / "mae_scale"
        shutil.copytree(REPOSITORY / "mae_scale", copy)
        with (copy / "models" / "mae.py").open("a") as file:
            file.write("# another version\n")
        environment = {"PYTHONPATH": str(copy.parent)}
        message = "rank 1 (n2) has another code than rank 0: mae-scale 0.1.0 (sources "
    elif what == "config":
        second = replace(run, settings={"train.epochs": 3})
        message = "rank 1 (n2) has another config than rank 0: train.epochs: 2 -> 3"
    elif what in ("data", "no data"):
        # The same path, relative to a folder that the nodes do not share.
        run.settings = {"data.train": "train"}
        node = tmp_path / "n2"
        node.mkdir()
        message = "rank 1 (n2): "
        if what == "data":
            shutil.copytree(run.shards, node / "train")
            manifest = node / "train" / "manifest.json"
            manifest.write_text(manifest.read_text() + " ")
            message = "rank 1 (n2) has another data (manifest.json) than rank 0"
        second = replace(run, shards=node / "train")
    else:
        run = replace(run, run_dir=Path("run"))
        node = tmp_path / "n2" / "train"
        node.mkdir(parents=True)
        run.settings = {"data.train": run.shards}
        second = replace(run, shards=node)
        message = "run_dir run: rank 1 (n2) does not see the file that rank 0 has made there"
    outputs = start_two(run, second, **environment)
    errors = [line for output in outputs for line in output.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0] in outputs[0].splitlines(), outputs
    assert errors[0].startswith("mae-scale: error: ") and message in errors[0]
    assert not list(tmp_path.rglob("*run*/.*")) and not run.run_dir.exists()
    assert not (run.shards.parent / "run").exists()


def test_wrong_sums_name_the_hosts() -> None:
    preflight._check_sums([("n1", 2.0), ("n2", 2.0)])
    with pytest.raises(CommonError, match=r"on n2 \(2\): rank 1 has 3 instead of 4; leave"):
        preflight._check_sums([("n1", 4.0), ("n2", 3.0), ("n2", 3.0), ("n1", 4.0)])


def test_no_room(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=3)
    preflight._check_room(tmp_path, config, 100_000)
    with pytest.raises(CommonError, match=r"4 more checkpoints of about 16\.0 TB"):
        preflight._check_room(tmp_path, config, 16 * 10**12)


def test_a_restart_too_many_ends_the_job(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three restarts got to no checkpoint, so the fourth ends with an error."""
    run.settings = {"train.epochs": 1000}
    run.stop(1, send(signal.SIGKILL), -signal.SIGKILL)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    for _ in range(3):
        note_restart(run.run_dir, 0)
    output = run.finish(1)
    assert output.count("mae-scale: error:") == 1
    assert "Slurm has restarted job 12 3 times without getting beyond step 0" in output
