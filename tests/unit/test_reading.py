"""Run folders are data: no code runs that their files hold."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_scale.errors import UserError
from mae_scale.files import TRUST_PICKLE
from mae_scale.models.weights import read_weights
from mae_scale.train.checkpoint import Commit, checkpoint_damage
from mae_scale.train.loading import load_weights
from mae_scale.train.reading import load_tensors, refuse_code
from mae_scale.train.records import is_sound, read_metrics, readable_rows


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def committed(folder: Path, content: object, zipped: bool = True) -> Path:
    """Make a checkpoint with a file of this content, and the right checksum."""
    step = folder / "step-00000003"
    step.mkdir(parents=True)
    path = step / "mp_rank_00_model_states.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    facts = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    commit = Commit(3, 24, 1, 0, "fp32", "", "", False, 0, {path.name: facts})
    (step / "COMMITTED.json").write_text(json.dumps(commit.__dict__))
    assert checkpoint_damage(step) is None
    return step


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["module", "optimizer", "client_state", "ds_config"])
def test_no_code_runs(tmp_path: Path, place: str, zipped: bool) -> None:
    mark = tmp_path / "mark"
    content = {"module": {"w": torch.ones(2)}, place: {"x": Bomb(mark)}}
    step = committed(tmp_path, content, zipped)
    for read in (load_weights, refuse_code):
        with pytest.raises(UserError) as refusal:
            read(step)
        assert "\n" not in str(refusal.value) and "system" in str(refusal.value)
    assert not mark.exists()


def test_who_trusts_a_folder_can_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = committed(tmp_path, {"module": {"w": torch.ones(2)}, "x": Bomb(tmp_path / "mark")})
    with pytest.raises(UserError, match=r"posix.system.*--trust-pickle"):
        load_weights(step)
    monkeypatch.setenv(TRUST_PICKLE.variable, "1")
    assert list(load_weights(step)) == ["w"]
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_was_never_saved_by_torch_is_damaged(tmp_path: Path, protocol: int) -> None:
    whole = io.BytesIO()
    torch.save({"w": torch.ones(2)}, whole)
    old = io.BytesIO()
    torch.save({"w": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    contents = [b"hello", b"", bytes(200), b"{}", whole.getvalue()[:-10], old.getvalue()[:50]]
    contents += [pickle.dumps(3, protocol), pickle.dumps({"w": "x"}, protocol)]
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content)
        for read in (load_tensors, read_weights):
            with pytest.raises(
                UserError, match=r"it is damaged, or torch\.save has not written it$"
            ):
                read(path)


def test_what_deepspeed_saves_passes(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    objects = {"a": LossScaler(1.0), "b": ZeroStageEnum.weights, "c": fragment_address(1, 2)}
    torch.save({**objects, "w": torch.ones(2)}, path)
    found = load_tensors(path)
    assert found["b"] == ZeroStageEnum.weights and found["c"] == fragment_address(1, 2)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(st.binary(max_size=200) | plain.map(pickle.dumps))
def test_any_file_is_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    path.write_bytes(content)
    try:
        assert isinstance(load_tensors(path), dict)
    except UserError as error:
        assert "\n" not in str(error)


@few
@given(plain)
def test_any_state_gives_weights_or_a_line(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    for state in (content, {"module": content}):
        step = committed(tmp_path_factory.mktemp("fuzz"), state)
        try:
            assert isinstance(load_weights(step), dict)
        except UserError as error:
            assert "\n" not in str(error)


@few
@given(st.dictionaries(st.sampled_from([*Commit.__annotations__, "more"]), plain), st.booleans())
def test_any_commit_is_read_or_damaged(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object], whole: bool
) -> None:
    step = committed(tmp_path_factory.mktemp("fuzz"), {"module": {}})
    path = step / "COMMITTED.json"
    before = json.loads(path.read_text()) if whole else {}
    path.write_text(json.dumps({**before, **changes}))
    wrong = checkpoint_damage(step)
    assert wrong is None or isinstance(wrong, str)


@few
@given(st.binary(max_size=300) | plain.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_any_record_is_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 2}\n{"step": 3}')
    steps = [row["step"] for row in read_metrics(path)]
    assert steps[0] == 1 and 2 in steps and 3 not in steps
    assert [row["step"] for row in readable_rows(path)][-1] == 3


SOUND = {
    "step": 3, "epoch": 0.1, "samples": 24, "loss": 0.7, "lr": 1e-3, "grad_norm": None,
    "images_per_second": 9.5, "data_wait": 0.0, "mfu": None, "time": 1.8e9, "top1": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("time", "samples", "images_per_second", "data_wait", "loss", "lr")
     for value in ("x", [], {}, True, 10**400, -1e300)]
    + [("event", None), ("event", 3), ("host", []), ("total_steps", "1"), ("step", math.nan)],
)  # fmt: skip
def test_rows_that_no_run_writes_are_left_out(tmp_path: Path, key: str, value: object) -> None:
    assert is_sound(SOUND) and not is_sound({**SOUND, key: value})
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps({**SOUND, key: value})}\n{json.dumps(SOUND)}\n")
    assert len(read_metrics(path)) == 1


def test_a_commit_names_no_files_elsewhere(tmp_path: Path) -> None:
    step = committed(tmp_path, {"module": {}})
    path = step / "COMMITTED.json"
    for name in ("../../x", "/etc/passwd", "", "..", "a/b"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "files": {name: {}}}))
        assert checkpoint_damage(step) is not None
