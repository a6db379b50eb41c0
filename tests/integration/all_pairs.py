"""Resume each (processes, ZeRO config) as every other one, and print what does not carry over.

One program for all: it imports everything once and forks the ranks of each world size. First each
(world size, config) takes two steps, saves, and takes two more. Then each reads the checkpoints of
all of them, compares every weight and moment bit by bit, and takes the same two steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from timm.models.vision_transformer import Block
from torch import nn

from mae_scale.config.classification import FinetuneOptimConfig
from mae_scale.config.sections import CheckpointConfig, TrainConfig
from mae_scale.launch.distributed import World, start
from mae_scale.train import checkpoint, elastic
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.ds import deepspeed
from mae_scale.train.engine import build_engine
from mae_scale.train.loading import load_checkpoint
from mae_scale.train.optimizers import EMA, optimizer_order

CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
KEPT = (*elastic.MOMENTS, EMA)
BATCH = 12
State = dict[str, torch.Tensor]


class Odd(nn.Module):
    """A model with parameters of odd sizes, frozen parameters and a buffer, for two AdamW
    groups."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(7, num_heads=1, qkv_bias=True)
        self.last = nn.Linear(7, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 7))
        self.pos = nn.Parameter(torch.randn(1, 3, 7), requires_grad=False)
        self.register_buffer("scale", torch.rand(1) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the loss of x [n, 3, 7]."""
        x = (x.to(self.token.dtype) + self.token + self.pos) * self.scale.to(self.token.dtype)
        return self.last(self.block(x)).float().square().mean()


def in_ranks(size: int, function: Callable[[World], None]) -> None:
    """Call `function` in `size` forked processes that form a process group."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(store.port),
                TORCHELASTIC_USE_AGENT_STORE="True",  # the store is the parent's
            )
            world = World(rank, size, rank, size)
            start(world)
            function(world)
            dist.barrier()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(f"ranks of {size} ended with {codes}")


def make_engine(world: World, config: str, precision: str, seed: int):  # type: ignore[no-untyped-def]
    """Make an engine with initial weights of its own; give its optimiser's order, too."""
    train = TrainConfig(global_batch_size=BATCH, micro_batch_size=BATCH // world.size)
    optim = FinetuneOptimConfig(ema_decay=0.7)  # a state more than AdamW's own
    torch.manual_seed(seed)
    model = Odd()
    order = optimizer_order(model, optim)
    filled = fill_deepspeed_config(config, train, world, precision)
    return build_engine(model, optim, filled), order


def steps(engine, world: World, first: int, count: int) -> list[float]:  # type: ignore[no-untyped-def]
    """Take so many steps, and give the losses of the global batch."""
    losses = []
    for step in range(first, first + count):
        x = torch.randn(BATCH, 3, 7, generator=torch.Generator().manual_seed(step))
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 * (1 + step)
        loss = engine(x[world.rank :: world.size])
        engine.backward(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world.size)
        engine.step()
    return losses


def state_of(engine) -> State:  # type: ignore[no-untyped-def]
    """Give whole master weights, moments, frozen weights and buffers by DeepSpeed's own
    functions."""
    state = {f"buffer {k}": v.clone() for k, v in engine.module.named_buffers()}
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    inner = getattr(wrapper, "optimizer", wrapper)
    masters = {}
    if 0 < stage < 3:
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()
    if hasattr(wrapper, "fp16_groups") and stage == 0:
        low = (p for group in wrapper.fp16_groups for p in group)
        high = (p for group in wrapper.fp32_groups for p in group)
        masters = {id(a): b for a, b in zip(low, high, strict=True)}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
                state[f"frozen {name}"] = p.data.float().clone()
        elif stage == 0:
            master = masters.get(id(p), p)
            state[f"fp32 {name}"] = master.data.clone()
            for key in KEPT:
                state[f"{key} {name}"] = inner.state[master][key].clone()
        else:
            state[f"fp32 {name}"] = safe_get_full_fp32_param(p).clone()
            for key in KEPT:
                state[f"{key} {name}"] = safe_get_full_optimizer_state(p, key).clone()
    counted = {float(s["step"]) for s in inner.state.values() if "step" in s}
    state["adam step"] = torch.tensor(sorted(counted))
    return state


def make(folder: Path, world: World, precision: str) -> None:
    """Save a checkpoint of each config at this world size, with what must be found in it."""
    for config in CONFIGS:
        engine, _ = make_engine(world, config, precision, seed=1)
        losses = steps(engine, world, 0, 2)
        run = folder / f"{world.size}-{config}"
        commit = checkpoint.Commit(
            step=2, samples=2 * BATCH, world_size=world.size, precision=precision,
            zero_stage=engine.zero_optimization_stage(), config_hash="", data="",
            milestone=False, bad_steps=0, files={},
        )  # fmt: skip
        run.mkdir(exist_ok=True)
        saver = checkpoint.Saver(engine, run, world, CheckpointConfig())
        saver.start(commit)
        saver.finish()
        state = state_of(engine)
        losses += steps(engine, world, 2, 2)
        if world.rank == 0:
            torch.save({"state": state, "losses": losses}, run / "truth.pt")
        engine.destroy()


def compare(folder: Path, world: World, precision: str, tolerance: float) -> None:
    """Read all checkpoints in each config at this world size."""
    truths = {run: torch.load(run / "truth.pt") for run in sorted(folder.iterdir())}
    reference = next(iter(truths.values()))["losses"]  # fewest processes, zero0
    for config in CONFIGS:
        for number, (run, truth) in enumerate(truths.items()):
            if number % 5 == 0:  # mostly one that has trained already: loading must overwrite all
                engine, order = make_engine(world, config, precision, seed=2)
            pair = f"{run.name} -> {world.size}-{config}"
            step_folder = run / "checkpoints" / "step-00000002"
            native = checkpoint.Commit.read(step_folder)
            if (native.world_size, native.zero_stage) == (
                world.size,
                engine.zero_optimization_stage(),
            ):
                continue
            load_checkpoint(engine, step_folder, order)
            state = state_of(engine)
            wrong = [k for k, v in truth["state"].items() if not torch.equal(v, state[k])]
            if wrong:
                print(f"{pair}: {wrong} differ", flush=True)
            losses = steps(engine, world, 2, 2)
            worst = max(abs(a / b - 1) for a, b in zip(losses, reference[2:], strict=True))
            if not worst <= tolerance:
                print(f"{pair}: losses {losses}, not {reference[2:]}", flush=True)
            if world.rank == 0:
                print(f"{pair}: compared {len(state)}, loss off by {worst:.1e}", flush=True)


def main(folder: Path, precision: str, sizes: list[int]) -> None:
    """Try all pairs of these numbers of processes in one precision."""
    for size in sizes:
        in_ranks(size, lambda world: make(folder, world, precision))
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for size in sizes:
        in_ranks(size, lambda world: compare(folder, world, precision, tolerance))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(size) for size in sys.argv[3:]])
