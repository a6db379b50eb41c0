"""Loading a checkpoint of another world size, ZeRO stage, precision or layout of groups.

The state is put into a neutral form, one file for each parameter and each state of it, and read
from there into whatever shards the engine has. All ranks convert: each maps the files of all saved
ranks into memory, and converts its own share of the parameters. So every byte is read once and
written once, and the number of files does not depend on the number of ranks that saved. DeepSpeed's
`ds_to_universal` writes a file for each saved rank, parameter and state, in one process; its
`load_universal` knows neither stage 0 nor a change to or from stage 3, and restores no frozen
parameters, no buffers and only one group's weight decay.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mae_scale.files import read_file, remove_tree, sha256_of, sync_folder, sync_tree
from mae_scale.launch.distributed import gather_to_all, on_rank0
from mae_scale.train.deepspeed_state import COUNTERS, EngineState
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.optimizers import EMA
from mae_scale.train.reading import load_tensors, state_of

log = logging.getLogger("mae_scale")

CHECKSUMS = "checksums.json"
MOMENTS = ["exp_avg", "exp_avg_sq"]  # states that AdamW keeps
WEIGHTS = "fp32"  # name of the master weights among the states of a parameter
Doing = Callable[[str], None]


def _nobody(what: str) -> None:
    """Ignore what is being done."""


def convert(folder: Path, stage: int, order: list[str], doing: Doing = _nobody) -> Path:
    """Convert a checkpoint into the neutral form in `folder/universal`; all ranks call.

    A folder `universal` that exists and is intact is returned as it is; a damaged one is made
    again. An interrupted conversion leaves only `universal.unfinished`, which nothing reads.

    Args:
        folder: folder of a committed and intact checkpoint.
        stage: ZeRO stage under which it was saved.
        order: names of the trained parameters in the order of the optimiser's groups.
        doing: called with a description of what this rank does, as `Watchdog.doing` is.

    Returns:
        The folder `universal`. It holds `zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt`, or the
        states of another optimiser, each a flat tensor; `common.pt`; and `checksums.json`, the
        SHA-256 of these files.
    """
    rank, size = _rank_and_size()
    universal, unfinished = folder / "universal", folder / "universal.unfinished"
    doing(f"checking {universal}")
    if on_rank0(universal.exists):
        if all(_everywhere(_is_intact(universal, rank, size))):
            return universal
        if rank == 0:
            log.warning("%s is damaged; converting again", universal)

    def prepare() -> None:
        remove_tree(universal)
        remove_tree(unfinished)
        for name in order:
            (unfinished / "zero" / name).mkdir(parents=True)

    on_rank0(prepare)
    with state_of(folder):
        shares = _read_shares(folder, stage, order, doing)
        kept = [key for key in shares[0].groups if key != WEIGHTS]
        common = _common(folder, stage, order, shares[0].step, kept)
    sums: dict[str, str] = {}
    for number, name in enumerate(order):
        doing(f"converting {folder.name}, parameter {number + 1} of {len(order)}")
        if number % size == rank:
            for key in (WEIGHTS, *kept):
                path = unfinished / "zero" / name / f"{key}.pt"
                with state_of(folder):
                    value = _whole(shares, name, key)
                torch.save({"param": value}, path)
                sums[str(path.relative_to(unfinished))] = sha256_of(path)

    def finish() -> None:
        path = unfinished / "common.pt"
        torch.save(common, path)
        merged = {name: each[name] for each in parts for name in each}
        merged[path.name] = sha256_of(path)
        (unfinished / CHECKSUMS).write_text(json.dumps(dict(sorted(merged.items()))))
        sync_tree(unfinished)
        unfinished.rename(universal)
        sync_folder(folder)

    parts = _everywhere(sums)
    on_rank0(finish)
    return universal


def _rank_and_size() -> tuple[int, int]:
    """Return rank and world size of this process: 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _everywhere(value: Any) -> list[Any]:
    return gather_to_all(value) if dist.is_initialized() else [value]


def _is_intact(universal: Path, rank: int, size: int) -> bool:
    """Return whether all files are there and this rank's part of them matches its checksums."""
    try:
        expected = dict(json.loads(read_file(universal / CHECKSUMS, 1 << 26)))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    there = {str(p.relative_to(universal)) for p in universal.rglob("*") if p.is_file()}
    if there != expected.keys() | {CHECKSUMS}:
        return False
    own = sorted(expected)[rank::size]
    return all(sha256_of(universal / name) == expected[name] for name in own)


def _rank_of(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


@dataclass
class _Share:
    """Share of the optimiser's state that one rank has saved, mapped into memory."""

    groups: dict[str, list[torch.Tensor]]
    """Flat tensors of each group, by the name of the state."""
    places: dict[str, tuple[int, int, int]]
    """Group, start and length, in values, of each parameter's piece, by the parameter's name."""
    step: float | None
    """AdamW's count of steps; None for an optimiser that keeps none."""


def _whole(shares: list[_Share], name: str, key: str) -> torch.Tensor:
    """Put the pieces of a parameter's state together, flat and in fp32."""
    pieces = []
    for share in shares:
        if name in share.places:
            group, start, length = share.places[name]
            pieces.append(share.groups[key][group].view(-1)[start : start + length].float())
    return torch.cat(pieces)


def _read_shares(folder: Path, stage: int, order: list[str], doing: Doing) -> list[_Share]:
    models = sorted(folder.glob("*model_states.pt"), key=_rank_of)
    first = load_tensors(models[0])
    if stage == 0:
        return [_unsharded(first, order)]
    paths = sorted(folder.glob("*optim_states.pt"), key=_rank_of)
    shares = []
    for rank, path in enumerate(paths):
        doing(f"reading {folder.name}, the share of rank {rank + 1} of {len(paths)}")
        optimizer = load_tensors(path)["optimizer_state_dict"]
        if stage == 3:
            places = _places_of_stage_3(first["param_shapes"], optimizer, rank, len(paths))
            weights = optimizer["fp32_flat_groups"]
        else:
            weights = optimizer["single_partition_of_fp32_groups"]
            places = {
                name: (group, fragment.start, fragment.numel)
                for group, mapping in enumerate(optimizer["param_slice_mappings"])
                for name, fragment in mapping.items()
            }
        shares.append(_share(weights, _inner_state(optimizer), places))
    return shares


def _unsharded(state: dict[str, Any], order: list[str]) -> _Share:
    """Make one share of a checkpoint of stage 0, with a group for each parameter."""
    optimizer = state["optimizer"]
    if "fp32_groups" in optimizer:  # bf16: master weights beside the module
        weights = [p.detach() for group in optimizer["fp32_groups"] for p in group]
    else:
        weights = [state["module"][name] for name in order]
    places = {name: (n, 0, weights[n].numel()) for n, name in enumerate(order)}
    return _share(weights, optimizer.get("optimizer_state_dict", optimizer)["state"], places)


def _share(
    weights: list[torch.Tensor],
    states: dict[int, dict[str, Any]],
    places: dict[str, tuple[int, int, int]],
) -> _Share:
    ordered = [states[number] for number in sorted(states)]
    kept = [key for key in ordered[0] if key != "step"]
    groups = {key: [state[key] for state in ordered] for key in kept}
    step = float(ordered[0]["step"]) if "step" in ordered[0] else None
    return _Share({WEIGHTS: list(weights), **groups}, places, step)


def _places_of_stage_3(
    shapes: list[dict[str, torch.Size]], optimizer: dict[str, Any], rank: int, size: int
) -> dict[str, tuple[int, int, int]]:
    """Find the pieces of a rank: an equal part of each parameter, padded on the last ranks."""
    lengths = [len(flat) for flat in optimizer["fp32_flat_groups"]]
    places, group, start = {}, 0, 0
    for name, shape in ((n, s) for each in shapes for n, s in each.items()):
        part = -(-shape.numel() // size)
        while start == lengths[group]:  # a group holds whole parts
            group, start = group + 1, 0
        places[name] = (group, start, max(0, min(part, shape.numel() - rank * part)))
        start += part
    return places


def _inner_state(optimizer: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Find the states of PyTorch's optimiser, by parameter, in a file of ZeRO 1 to 3."""
    inner = optimizer.get("optimizer_state_dict", optimizer)
    return inner.get("base_optimizer_state", inner)["state"]


def _common(
    folder: Path, stage: int, order: list[str], step: float | None, kept: list[str]
) -> dict[str, Any]:
    """Collect what belongs to no trained parameter: counts, frozen parameters and buffers."""
    models = sorted(folder.glob("*model_states.pt"), key=_rank_of)
    state, trained = load_tensors(models[0]), set(order)
    rest = {name: value for name, value in state["module"].items() if name not in trained}
    if stage == 3:
        rest |= _gather_frozen(models, state["frozen_param_shapes"] or {})
    common: dict[str, Any] = {"step": step, "kept": kept}
    common["rest"] = {name: value.clone() for name, value in rest.items()}
    return {**common, **{key: state[key] for key in COUNTERS}}


def _gather_frozen(models: list[Path], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Put the frozen parameters of a stage-3 checkpoint together from the pieces of all ranks."""
    pieces = [load_tensors(path)["frozen_param_fragments"] or {} for path in models]
    return {
        name: torch.cat([piece[name].flatten() for piece in pieces])[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }


def weights_of_stage_3(folder: Path) -> dict[str, torch.Tensor]:
    """Read the module's state dict, in fp32, from the master weights of a stage-3 checkpoint.

    One rank's file is mapped at a time, and only its master weights are read. So memory is needed
    for the weights and for one rank's share of them; DeepSpeed's own function holds all shares.
    """
    models = sorted(folder.glob("*model_states.pt"), key=_rank_of)
    first = load_tensors(models[0])
    shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    for rank, path in enumerate(sorted(folder.glob("*optim_states.pt"), key=_rank_of)):
        groups = iter(load_tensors(path)["optimizer_state_dict"]["fp32_flat_groups"])
        share = next(groups)
        for tensor in state.values():
            size = -(-tensor.numel() // len(models))  # the last share of a parameter is padded
            if not len(share):  # a group holds whole shares
                share = next(groups)
            piece, share = share[:size], share[size:]
            own = tensor.view(-1)[rank * size : (rank + 1) * size]
            own.copy_(piece[: len(own)])
    frozen = _gather_frozen(models, first["frozen_param_shapes"] or {})
    buffers = {name: first["module"][name] for name in first["buffer_names"]}
    return state | {name: value.float() for name, value in [*frozen.items(), *buffers.items()]}


def load(engine: DeepSpeedEngine, universal: Path, doing: Doing = _nobody) -> None:
    """Load what `convert` made into an engine of any world size and stage; all ranks call.

    Learning rate, weight decay and betas stay those of the engine.

    Args:
        engine: engine to load into, between two steps.
        universal: folder that `convert` returned.
        doing: called with a description of what this rank does, as `Watchdog.doing` is.
    """
    common = load_tensors(universal / "common.pt")
    kept = common.get("kept", MOMENTS)  # older ones do not name it: AdamW was the only optimiser
    state = EngineState(engine)
    state.make_states(kept, common["step"])
    parameters = dict(engine.module.named_parameters())
    for number, (name, parameter) in enumerate(parameters.items()):
        doing(f"loading {universal.parent.name}, parameter {number + 1} of {len(parameters)}")
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if not parameter.requires_grad:
            state.set_frozen(name, parameter, common["rest"][name])
            continue
        value = _value(universal, name, WEIGHTS, shape)
        state.set_weight(parameter, value)
        state.set_master(parameter, value)
        for key in kept:
            state.set_state(parameter, key, _value(universal, name, key, shape))
    for name, buffer in engine.module.named_buffers():
        if name in common["rest"]:
            buffer.data.copy_(common["rest"][name])
    for key in COUNTERS:
        setattr(engine, key, common[key])


def averages(universal: Path) -> dict[str, torch.Tensor]:
    """Read the parameters' moving averages from what `convert` made: flat fp32 tensors by name."""
    return {
        path.parent.name: _value(universal, path.parent.name, EMA, torch.Size([-1]))
        for path in sorted(universal.glob(f"zero/*/{EMA}.pt"))
    }


def _value(universal: Path, name: str, key: str, shape: torch.Size) -> torch.Tensor:
    """Map the tensor of a file in `universal`; only the part that is used is read."""
    path = universal / "zero" / name / f"{key}.pt"
    return load_tensors(path)["param"].reshape(shape)
