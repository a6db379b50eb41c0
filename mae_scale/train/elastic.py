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
from mae_scale.train.optimizers import EMA
from mae_scale.train.reading import load_tensors, refuse_code

log = logging.getLogger("mae_scale")

CHECKSUMS = "checksums.json"
MOMENTS = ["exp_avg", "exp_avg_sq"]  # of AdamW
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of the engine


def convert(folder: Path, stage: int, order: list[str]) -> Path:
    """Make `folder/universal` out of the checkpoint in `folder`, once; one process calls.

    Interrupted, it leaves nothing that counts; one whose files were damaged since is made again.

    Args:
        folder: a committed and intact checkpoint.
        stage: its ZeRO stage.
        order: names of the trained parameters in the order of the optimiser's groups.

    Returns:
        The folder: `zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt`, or what else the optimiser
        keeps, `common.pt`, and `checksums.json` of these.
    """
    refuse_code(folder)  # DeepSpeed's converter would run it
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
    state = load_tensors(models[0])
    unsharded = stage == 0
    if unsharded:
        step, kept = _convert_unsharded(state, order, out)
    else:
        step, kept = _convert_sharded(folder, out, unfinished / "average")
    rest = {name: value for name, value in state["module"].items() if name not in set(order)}
    if stage == 3:
        rest |= _gather_frozen(models, state["frozen_param_shapes"] or {})
    common: dict[str, Any] = {"step": step, "kept": kept}
    common["rest"] = {name: value.clone() for name, value in rest.items()}
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


def _convert_unsharded(
    state: dict[str, Any], order: list[str], out: Path
) -> tuple[float | None, list[str]]:
    """Write the parameters of a stage-0 checkpoint.

    Gives AdamW's step, None of another optimiser, and the names of what it keeps beside it.
    """
    optimizer = state["optimizer"]
    if "fp32_groups" in optimizer:  # bf16: master weights beside the module
        masters = dict(
            zip(order, (p for group in optimizer["fp32_groups"] for p in group), strict=True)
        )
    else:
        masters = state["module"]
    moments = optimizer.get("optimizer_state_dict", optimizer)["state"]
    kept = [key for key in moments[0] if key != "step"]
    for number, name in enumerate(order):
        place = out / "zero" / name
        place.mkdir(parents=True)
        torch.save({"param": masters[name].float().clone()}, place / "fp32.pt")
        for key in kept:
            torch.save({"param": moments[number][key].clone()}, place / f"{key}.pt")
    return float(moments[0]["step"]) if "step" in moments[0] else None, kept


def _convert_sharded(folder: Path, out: Path, scratch: Path) -> tuple[float, list[str]]:
    """Let DeepSpeed write the parameters of ZeRO 1 to 3; gives as `_convert_unsharded`.

    DeepSpeed knows AdamW's two moments only. A moving average of the weights goes through it in
    the place of the first one, in `scratch`.
    """
    _let_deepspeed_convert(folder, out)
    optimizer = load_tensors(next(folder.glob("*zero_pp_rank_0_*optim_states.pt")))[
        "optimizer_state_dict"
    ]
    state = next(iter(_inner_state(optimizer).values()))
    if EMA not in state:
        return float(state["step"]), MOMENTS
    scratch.mkdir()
    for path in folder.glob("*_states.pt"):
        if not path.name.endswith("optim_states.pt"):
            (scratch / path.name).symlink_to(path.resolve())
            continue
        content = load_tensors(path)
        for piece in _inner_state(content["optimizer_state_dict"]).values():
            piece[MOMENTS[0]] = piece[EMA]
        torch.save(content, scratch / path.name)
    averages = scratch / "out"
    averages.mkdir()
    _let_deepspeed_convert(scratch, averages)
    for path in averages.glob(f"zero/*/{MOMENTS[0]}.pt"):
        path.rename(out / "zero" / path.parent.name / f"{EMA}.pt")
    return float(state["step"]), [*MOMENTS, EMA]


def _inner_state(optimizer: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """The state of PyTorch's optimiser, by its parameters, in a file of ZeRO 1 to 3."""
    inner = optimizer.get("optimizer_state_dict", optimizer)
    return optimizer.get("base_optimizer_state", inner)["state"]


def _let_deepspeed_convert(folder: Path, out: Path) -> None:
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


def _gather_frozen(models: list[Path], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Frozen parameters of a stage-3 checkpoint, out of the pieces of all ranks."""
    pieces = [load_tensors(path)["frozen_param_fragments"] or {} for path in models]
    return {
        name: torch.cat([piece[name].flatten() for piece in pieces])[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }


def weights_of_stage_3(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of the module in fp32 out of a stage-3 checkpoint, by its master weights.

    Of the ranks' files, one is mapped at a time, and only its master weights are read: memory for
    the weights, and for one rank's share of them. DeepSpeed's own function holds all shares.
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


def load(engine: DeepSpeedEngine, universal: Path) -> None:
    """Read what `convert` made into an engine of any world size and stage; all ranks call.

    Learning rate, weight decay and betas stay those of the engine.
    """
    common = load_tensors(universal / "common.pt")
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


def averages(universal: Path) -> dict[str, torch.Tensor]:
    """The moving averages of the parameters in what `convert` made: flat, by name, in fp32."""
    return {
        path.parent.name: _value(universal, path.parent.name, EMA, torch.Size([-1]))
        for path in sorted(universal.glob(f"zero/*/{EMA}.pt"))
    }


def _value(universal: Path, name: str, key: str, shape: torch.Size) -> torch.Tensor:
    saved = torch.load(  # a bare tensor where DeepSpeed has written it
        universal / "zero" / name / f"{key}.pt", map_location="cpu", weights_only=True
    )
    return (saved["param"] if isinstance(saved, dict) else saved).reshape(shape)  # flat by stage 3


def _make_state(optimizer: Any, masters: list[torch.Tensor], common: dict[str, Any]) -> None:
    for master in masters:
        optimizer.state[master] = {key: torch.zeros_like(master) for key in _kept(common)}
        if common["step"] is not None:
            step = torch.tensor(common["step"], dtype=torch.float32, device=master.device)
            optimizer.state[master]["step"] = step


def _kept(common: dict[str, Any]) -> list[str]:
    return common.get("kept", MOMENTS)  # which was not written down before there were others


def _load_stages_0_to_2(
    engine: DeepSpeedEngine,
    universal: Path,
    common: dict[str, Any],
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    wrapper = engine.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    masters = [p for group in inner.param_groups for p in group["params"]]
    _make_state(inner, masters, common)
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
        for key in _kept(common):
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
    _make_state(wrapper.optimizer, wrapper.fp32_partitioned_groups_flat, common)
    for name, parameter in parameters.items():
        shape = parameter.ds_shape  # type: ignore[attr-defined]
        trained = parameter.requires_grad
        value = _value(universal, name, "fp32", shape) if trained else common["rest"][name]
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.data.copy_(value)
        if not trained:
            continue
        for key in (None, *_kept(common)):
            part, _ = wrapper._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            full = _value(universal, name, key or "fp32", shape).flatten()
            mine = full[part.numel() * rank :][: part.numel()]
            part.data.zero_()  # the last rank's may be padded
            part.data[: mine.numel()].copy_(mine)
