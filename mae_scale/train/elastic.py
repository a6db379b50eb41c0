"""Going on at another world size or ZeRO stage.

The state is put into a neutral form, one file per parameter and moment, and read from there into
whatever shards the engine has. DeepSpeed's `ds_to_universal` makes that form out of ZeRO 1 to 3.
Reading it is done here: DeepSpeed 0.19's `load_universal` knows neither stage 0 nor a change to or
from stage 3, and restores no frozen parameters, no buffers and only one group's weight decay.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from mae_scale.files import checksums, sync_folder, sync_tree
from mae_scale.train.ds import DeepSpeedEngine, deepspeed, ds_to_universal

log = logging.getLogger("mae_scale")

CHECKSUMS = "checksums.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of the engine


def convert(folder: Path, stage: int, order: list[str]) -> Path:
    """Make `folder/universal` out of the checkpoint in `folder`, once; one process calls.

    Interrupted, it leaves nothing that counts; one whose files were damaged since is made again.

    Args:
        folder: a committed and intact checkpoint.
        stage: its ZeRO stage.
        order: names of the trained parameters in the order of the optimiser's groups.

    Returns:
        The folder: `zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt`, `common.pt`, and
        `checksums.json` of these.
    """
    universal, unfinished = folder / "universal", folder / "universal.unfinished"
    if universal.exists():
        if _is_intact(universal):
            return universal
        log.warning("%s is damaged; converting again", universal)
        shutil.rmtree(universal)
    shutil.rmtree(unfinished, ignore_errors=True)
    out = unfinished / "out"  # ds_to_universal also writes into the folder above
    out.mkdir(parents=True)
    models = sorted(folder.glob("*model_states.pt"), key=_rank_of)
    state = _read(models[0])
    unsharded = stage == 0
    step = _convert_unsharded(state, order, out) if unsharded else _convert_sharded(folder, out)
    rest = {name: value for name, value in state["module"].items() if name not in set(order)}
    if stage == 3:
        rest |= _gather_frozen(models, state["frozen_param_shapes"] or {})
    common = {"step": step, "rest": {name: value.clone() for name, value in rest.items()}}
    torch.save({**common, **{key: state[key] for key in COUNTERS}}, out / "common.pt")
    (out / CHECKSUMS).write_text(json.dumps(checksums(out)))
    sync_tree(out)
    out.rename(universal)
    sync_folder(folder)
    shutil.rmtree(unfinished)
    return universal


def _is_intact(universal: Path) -> bool:
    try:
        expected = json.loads((universal / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return False
    found = checksums(universal)
    del found[CHECKSUMS]
    return found == expected


def _rank_of(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _read(path: Path) -> dict[str, Any]:
    # DeepSpeed's own Python objects are in it; the file is the run's own and checksummed.
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _convert_unsharded(state: dict[str, Any], order: list[str], out: Path) -> float:
    """Write the parameters of a stage-0 checkpoint; gives AdamW's step."""
    optimizer = state["optimizer"]
    if "fp32_groups" in optimizer:  # bf16: master weights beside the module
        masters = dict(
            zip(order, (p for group in optimizer["fp32_groups"] for p in group), strict=True)
        )
    else:
        masters = state["module"]
    moments = optimizer.get("optimizer_state_dict", optimizer)["state"]
    for number, name in enumerate(order):
        place = out / "zero" / name
        place.mkdir(parents=True)
        torch.save({"param": masters[name].float().clone()}, place / "fp32.pt")
        for key in MOMENTS:
            torch.save({"param": moments[number][key].clone()}, place / f"{key}.pt")
    return float(moments[0]["step"])


def _convert_sharded(folder: Path, out: Path) -> float:
    """Let DeepSpeed write the parameters of ZeRO 1 to 3; gives AdamW's step."""
    arguments = Namespace(
        input_folder=str(folder),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        ds_to_universal(arguments)
    optimizer = _read(next(folder.glob("*zero_pp_rank_0_*optim_states.pt")))["optimizer_state_dict"]
    inner = optimizer.get("optimizer_state_dict", optimizer)
    inner = optimizer.get("base_optimizer_state", inner)
    return float(next(iter(inner["state"].values()))["step"])


def _gather_frozen(models: list[Path], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Frozen parameters of a stage-3 checkpoint, out of the pieces of all ranks."""
    pieces = [_read(path)["frozen_param_fragments"] or {} for path in models]
    return {
        name: torch.cat([piece[name].flatten() for piece in pieces])[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }


def load(engine: DeepSpeedEngine, universal: Path) -> None:
    """Read what `convert` made into an engine of any world size and stage; all ranks call.

    Learning rate, weight decay and betas stay those of the engine.
    """
    common = torch.load(universal / "common.pt", map_location="cpu", weights_only=True)
    parameters = dict(engine.module.named_parameters())
    stage = engine.zero_optimization_stage()
    if stage == 3:
        _load_stage_3(engine, universal, common, parameters)
    else:
        _load_stages_0_to_2(engine, universal, common, parameters)
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                parameter.data.copy_(common["rest"][name])
    for name, buffer in engine.module.named_buffers():
        if name in common["rest"]:
            buffer.data.copy_(common["rest"][name])
    for key in COUNTERS:
        setattr(engine, key, common[key])


def _value(universal: Path, name: str, key: str, shape: torch.Size) -> torch.Tensor:
    saved = torch.load(
        universal / "zero" / name / f"{key}.pt", map_location="cpu", weights_only=True
    )
    return (saved["param"] if isinstance(saved, dict) else saved).reshape(shape)  # flat by stage 3


def _make_adam_state(optimizer: Any, masters: list[torch.Tensor], step: float) -> None:
    for master in masters:
        optimizer.state[master] = {
            "step": torch.tensor(step, dtype=torch.float32, device=master.device),
            **{key: torch.zeros_like(master) for key in MOMENTS},
        }


def _load_stages_0_to_2(
    engine: DeepSpeedEngine,
    universal: Path,
    common: dict[str, Any],
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    wrapper = engine.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    masters = [p for group in inner.param_groups for p in group["params"]]
    _make_adam_state(inner, masters, common["step"])
    sharded = engine.zero_optimization_stage() > 0
    master_of: dict[int, torch.Tensor] = {}
    if sharded:
        wrapper._hp_optimizer_states_linked = False  # if so, to the state before this one
        wrapper._lazy_init_hp_params_optimizer_state()
    elif hasattr(wrapper, "fp16_groups"):  # bf16: the forward pass uses copies of the masters
        low = (p for group in wrapper.fp16_groups for p in group)
        high = (p for group in wrapper.fp32_groups for p in group)
        master_of = {id(a): b for a, b in zip(low, high, strict=True)}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        value = _value(universal, name, "fp32", parameter.shape)
        parameter.data.copy_(value)
        if sharded:
            parameter.set_full_hp_param(value)  # type: ignore[attr-defined]
        else:
            master = master_of.get(id(parameter), parameter)
            master.data.copy_(value)
        for key in MOMENTS:
            value = _value(universal, name, key, parameter.shape)
            if sharded:
                parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
            else:
                inner.state[master][key].copy_(value)


def _load_stage_3(
    engine: DeepSpeedEngine,
    universal: Path,
    common: dict[str, Any],
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    wrapper, rank = engine.optimizer, engine.global_rank
    _make_adam_state(wrapper.optimizer, wrapper.fp32_partitioned_groups_flat, common["step"])
    for name, parameter in parameters.items():
        shape = parameter.ds_shape  # type: ignore[attr-defined]
        trained = parameter.requires_grad
        value = _value(universal, name, "fp32", shape) if trained else common["rest"][name]
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.data.copy_(value)
        if not trained:
            continue
        for key in (None, *MOMENTS):
            part, _ = wrapper._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            full = _value(universal, name, key or "fp32", shape).flatten()
            mine = full[part.numel() * rank :][: part.numel()]
            part.data.zero_()  # the last rank's may be padded
            part.data[: mine.numel()].copy_(mine)
