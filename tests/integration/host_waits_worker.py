"""Count how often the host waits for the device in one optimiser step; print a line per case.

DeepSpeed's accelerator is the CPU that says it is asynchronous, as a GPU is: DeepSpeed then makes
streams and events and waits where it would wait on a GPU. Each wait is counted. A read by the host
is an operator `_local_scalar_dense`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mae_scale.config.classification import FinetuneOptimConfig, LarsConfig
from mae_scale.config.sections import OptimConfig, TrainConfig
from mae_scale.launch.distributed import process_group
from mae_scale.launch.stopping import StopRequest
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models import build_classifier, build_mae
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.ds import deepspeed
from mae_scale.train.engine import build_engine
from mae_scale.train.step import Stepper, Wishes
from mae_scale.world import World

waits: Counter[str] = Counter()


class FakeStream:
    """A stream of a device that has computed everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None:
        waits["stream"] += 1

    def wait_stream(self, stream: Any) -> None:
        assert isinstance(stream, FakeStream)

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, FakeEvent)


class FakeEvent:
    """An event on a `FakeStream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waits["event"] += 1


def act_like_a_gpu() -> None:
    """Make DeepSpeed's CPU accelerator asynchronous, with streams that count waits."""
    accelerator, stream = deepspeed.accelerator.get_accelerator(), FakeStream()
    kind = type(accelerator)
    kind.is_synchronized_device = lambda self: False
    kind.Stream, kind.Event = property(lambda self: FakeStream), property(lambda self: FakeEvent)
    kind.current_stream = kind.default_stream = lambda self, device_index=None: stream
    kind.synchronize = lambda self, device_index=None: waits.update(device=1)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]


class Operators(TorchDispatchMode):
    """Counter of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


Loss = Callable[..., torch.Tensor]
SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 3}


def pretraining() -> tuple[nn.Module, Any, Loss]:
    model = build_mae("mae_vit_tiny_patch16", **SIZES, decoder_depth=1)
    noise = torch.rand(2, model.num_patches)
    return model, OptimConfig(), lambda engine, batch, *_: engine(batch["image"], noise)[0]


def classify(engine: Any, batch: dict[str, torch.Tensor], *_: int) -> torch.Tensor:
    return F.cross_entropy(engine(batch["image"]).float(), batch["sample"])


def finetuning() -> tuple[nn.Module, Any, Loss]:
    model = build_classifier("mae_vit_tiny_patch16", num_classes=5, **SIZES, drop_path=0.1)
    return model, FinetuneOptimConfig(layer_decay=0.75, ema_decay=0.99, clip_grad=0.1), classify


def probing() -> tuple[nn.Module, Any, Loss]:
    model = build_classifier("mae_vit_tiny_patch16", num_classes=5, head="probe", **SIZES)
    model.tune_last(0)
    return model, LarsConfig(), classify


def cases() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any, Loss]]]]:
    for stage in range(3):
        yield f"zero{stage}", pretraining
        yield f"zero{stage}", finetuning
    yield "zero0", probing  # LARS is refused under ZeRO


def count(world: World, watchdog: Watchdog, name: str, task: Callable[..., Any]) -> dict[str, Any]:
    """Count the waits and reads of the third step, which has two micro-batches in bf16."""
    train = TrainConfig(global_batch_size=4, micro_batch_size=2)
    model, optim, loss_of = task()
    engine = build_engine(model, optim, fill_deepspeed_config(name, train, world, "bf16"))
    batch = {"image": torch.rand(2, 3, 32, 32).bfloat16(), "sample": torch.arange(2)}
    stepper = Stepper(
        engine=engine, loss_of=loss_of, world=world, watchdog=watchdog, stop=StopRequest(), seed=0,
        train=train, optim=optim, steps_per_epoch=10, accumulation=2,
    )  # fmt: skip
    batches = itertools.repeat(batch)
    for step in range(2):
        stepper.hand_over(batches, step, Wishes()).numbers()
    waits.clear()
    with Operators() as operators:
        result = stepper.hand_over(batches, 2, Wishes())
    return {
        "task": task.__name__, "config": name, "waits": dict(waits),
        "reads": operators.counts["aten::_local_scalar_dense"], "grad_norm": result.grad_norm,
    }  # fmt: skip


def main() -> None:
    act_like_a_gpu()
    world = World()
    with process_group(world, 600) as watchdog:
        for name, task in cases():
            print(json.dumps(count(world, watchdog, name, task)), flush=True)


if __name__ == "__main__":
    main()
