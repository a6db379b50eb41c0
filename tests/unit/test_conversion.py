"""Converting a checkpoint of many ranks reads and writes each file once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_scale.train import elastic
from mae_scale.train.deepspeed_state import COUNTERS

RANKS = 64
SHAPES = {"blocks.0.weight": (7, 30), "blocks.0.bias": (7,), "head.weight": (5, 40)}


def make_stage_3_files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Write what 64 ranks save under ZeRO-3, in two groups; return the whole states by name."""
    generator = torch.Generator().manual_seed(0)
    kinds = ("fp32", "exp_avg", "exp_avg_sq")
    whole = {
        name: {kind: torch.randn(shape, generator=generator) for kind in kinds}
        for name, shape in SHAPES.items()
    }
    names = list(SHAPES)
    groups = [names[:2], names[2:]]
    for rank in range(RANKS):

        def share(kind: str, group: list[str], rank: int = rank) -> torch.Tensor:
            pieces = []
            for name in group:
                flat = whole[name][kind].flatten()
                size = -(-flat.numel() // RANKS)
                padded = torch.nn.functional.pad(flat, (0, size * RANKS - flat.numel()))
                pieces.append(padded[rank * size :][:size])
            return torch.cat(pieces)

        states = {
            number: {
                "step": torch.tensor(9.0),
                **{kind: share(kind, group) for kind in kinds[1:]},
            }
            for number, group in enumerate(groups)
        }
        optimizer = {
            "fp32_flat_groups": [share("fp32", group) for group in groups],
            "optimizer_state_dict": {"state": states},
        }
        model = {
            "module": {},
            "param_shapes": [{n: torch.Size(SHAPES[n]) for n in group} for group in groups],
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            **dict.fromkeys(COUNTERS, 9),
        }
        stem = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer}, folder / f"bf16_{stem}_optim_states.pt")
        torch.save(model, folder / f"{stem}_model_states.pt")
    return whole


def test_files_of_64_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes written grow with the parameters, not with ranks times parameters."""
    whole = make_stage_3_files(tmp_path)
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()
    save, load = torch.save, elastic.load_tensors

    def counting_save(value: Any, path: Path) -> None:
        written[str(path)] += 1
        save(value, path)

    def counting_load(path: Path) -> Any:
        read[path.name] += 1
        return load(path)

    monkeypatch.setattr(torch, "save", counting_save)
    monkeypatch.setattr(elastic, "load_tensors", counting_load)
    universal = elastic.convert(tmp_path, 3, list(SHAPES))
    assert len(written) == sum(written.values()) == 3 * len(SHAPES) + 1
    assert {read[name] for name in read if "optim_states" in name} == {1}
    assert sum(read.values()) <= 2 * RANKS + 2
    for name, states in whole.items():
        for kind, expected in states.items():
            found = load(universal / "zero" / name / f"{kind}.pt")["param"]
            assert torch.equal(found, expected.flatten()), (name, kind)
    again = elastic.convert(tmp_path, 3, list(SHAPES))
    assert again == universal and sum(written.values()) == 3 * len(SHAPES) + 1
