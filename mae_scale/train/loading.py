"""Loading a committed checkpoint: into an engine of any layout, or its weights alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from mae_scale.launch.distributed import on_rank0
from mae_scale.train import elastic
from mae_scale.train.checkpoint import Commit
from mae_scale.train.checkpoint_writer import BackgroundWriter
from mae_scale.train.deepspeed_state import layout
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.reading import load_tensors, refuse_code, state_of

log = logging.getLogger("mae_scale")


def load_checkpoint(
    engine: DeepSpeedEngine,
    folder: Path,
    order: list[str],
    doing: Callable[[str], None] = lambda what: None,
) -> None:
    """Load a checkpoint into the engine, on all ranks.

    If world size, ZeRO stage, precision and layout of the optimiser's groups are the same, the run
    goes on bit for bit. Otherwise the checkpoint is read through a neutral form, which all ranks
    make first.

    Args:
        engine: engine to load into.
        folder: folder of a committed and intact checkpoint.
        order: names of the trained parameters in the order of the optimiser's groups.
        doing: called with a description of what this rank does, as `Watchdog.doing` is.
    """
    commit = Commit.read(folder)
    stage = engine.zero_optimization_stage()
    computes_in_bf16 = engine.bfloat16_enabled() or engine.torch_autocast_enabled()
    precision = "bf16" if computes_in_bf16 else "fp32"
    saved = (commit.world_size, commit.zero_stage, commit.precision)
    if saved != (engine.world_size, stage, precision):
        log.info(
            "%s was saved by %d processes under ZeRO-%d; converting it for %d under ZeRO-%d",
            *(folder.name, commit.world_size, commit.zero_stage, engine.world_size, stage),
        )
    elif commit.layout not in (None, layout(engine)):
        log.info(
            "%s was saved with other groups of the optimiser (sub_group_size or "
            "round_robin_gradients of the DeepSpeed config); converting it",
            folder.name,
        )
    else:
        _load_as_it_is(engine, folder)
        return
    elastic.load(engine, elastic.convert(folder, commit.zero_stage, order, doing), doing)


def _load_as_it_is(engine: DeepSpeedEngine, folder: Path) -> None:
    on_rank0(lambda: refuse_code(folder))
    engine.checkpoint_engine = BackgroundWriter(
        None, engine.frozen
    )  # reads without running pickled code
    loaded, _ = engine.load_checkpoint(
        str(folder.parent), tag=folder.name, load_lr_scheduler_states=False
    )
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load {folder}")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the module's state dict, in fp32, from a checkpoint of any world size and ZeRO stage.

    Under ZeRO 0 to 2 in bf16 these are the bf16 weights that the forward pass used. Files are
    mapped, so that neither moments nor the states of all ranks come into memory.

    Raises:
        UserError: the files hold no state of a run, or code besides tensors.
    """
    with state_of(folder):
        if Commit.read(folder).zero_stage == 3:
            return elastic.weights_of_stage_3(folder)
        state = load_tensors(folder / "mp_rank_00_model_states.pt")["module"]
        return {key: value.float() for key, value in state.items()}


def load_averages(folder: Path, order: list[str]) -> dict[str, torch.Tensor]:
    """Read the moving averages of a checkpoint's trained parameters: flat fp32 tensors by name.

    All ranks call; they first convert the checkpoint unless that was done before.

    Args:
        folder: folder of a committed and intact checkpoint.
        order: names of the trained parameters in the order of the optimiser's groups.
    """
    stage = Commit.read(folder).zero_stage
    return elastic.averages(elastic.convert(folder, stage, order))
