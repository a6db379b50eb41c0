"""Bytes of model states on a rank, what ranks send, and the size of a checkpoint, by formula.

Model states are those of ZeRO (arXiv 1910.02054, section 5): weights, gradients, and the
optimiser's fp32 master weights and moments. Parameters that are not trained have weights only. The
buffers are those of DeepSpeed 0.19: `benchmarks/plan_error.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mae_scale.config.sections import OptimizerConfig

FP32 = 4  # bytes
ITEMSIZE = {"bf16": 2, "fp32": FP32}
MOMENTS = {"adamw": 2, "lars": 1}  # fp32 values of an optimiser's state for each parameter
ALL_REDUCE_AT_ONCE = 500_000_000  # values that stage 0 sends at once


@dataclass(frozen=True)
class ParameterStates:
    """What a run keeps for each of its parameters.

    Args:
        parameters: of the model, those that are not trained included.
        trained: of these.
        precision: bf16 or fp32, of weights and activations.
        moments: fp32 values of the optimiser's state: 2 of AdamW, 1 of LARS.
        ema: whether there is a moving average of the weights.
        grad_reduce: bf16 or fp32, in which gradients are summed over the ranks.
    """

    parameters: int
    trained: int
    precision: str
    moments: int = 2
    ema: bool = False
    grad_reduce: str = "fp32"

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or activation."""
        return ITEMSIZE[self.precision]

    def optimizer_bytes(self, stage: int) -> int:
        """Master weights (in stage 0 fp32 weights are their own), moments, moving average."""
        has_masters = self.precision == "bf16" or stage > 0
        return FP32 * self.trained * (has_masters + self.moments + self.ema)

    def checkpoint_bytes(self, stage: int) -> int:
        """Size of a checkpoint of all ranks; stage 3 saves the master weights only."""
        weights = self.itemsize * self.parameters if stage < 3 else 0
        return weights + self.optimizer_bytes(stage)


def trained_by(
    optim: OptimizerConfig, model: nn.Module, precision: str, grad_reduce: str = "fp32"
) -> ParameterStates:
    """Say what a run with this optimiser keeps; the model may be on the meta device."""
    # Of a parameter that ZeRO-3 has sharded, the own size is in ds_numel.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return ParameterStates(
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, is_trained in sizes if is_trained),
        precision=precision,
        moments=MOMENTS[optim.optimizer],
        ema=optim.average_decay is not None,
        grad_reduce=grad_reduce,
    )


@dataclass(frozen=True)
class ModelStates:
    """Bytes of a rank on its device, and of its share of host memory."""

    weights: float
    gradients: float
    optimizer: float
    bucket: float
    """Bytes of the bucket in which gradients are sent; it is there all the time."""
    backward: float
    """Bytes of further buffers during the backward pass."""
    sending: float
    """Copies of the gradients that are being sent."""
    sends_early: bool
    """Whether gradients are sent during the backward pass, when activations are there."""
    step: float
    """Copies that the optimiser's step makes, after the backward pass."""
    host: float

    @property
    def held(self) -> float:
        """Bytes that are there between two micro-batches of a step."""
        return self.weights + self.gradients + self.optimizer + self.bucket

    def peak(self, activations: float) -> float:
        """Compute the bytes that are there at the worst moment of a step.

        Args:
            activations: bytes that a micro-batch takes at the most.
        """
        during = self.backward + activations + (self.sending if self.sends_early else 0)
        after = max(self.backward + self.sending, self.step)
        return self.held + max(during, after)


def overlaps(zero: dict[str, Any]) -> bool:
    """Whether DeepSpeed sends while the backward pass computes; by default stage 3 only."""
    return bool(zero.get("overlap_comm", zero.get("stage", 0) == 3))


def bucket_size(zero: dict[str, Any]) -> int:
    """Gradients that are sent at once; the default is DeepSpeed's."""
    return int(zero.get("reduce_bucket_size", 500_000_000))


def model_states(
    run: ParameterStates, zero: dict[str, Any], ranks: int, *, accumulates: bool = True
) -> ModelStates:
    """Bytes of a rank.

    Args:
        run: what is trained.
        zero: the section `zero_optimization` of a DeepSpeed config.
        ranks: N, among which ZeRO divides.
        accumulates: whether a step has several micro-batches.
    """
    stage, value, trained = zero.get("stage", 0), run.itemsize, run.trained
    optimizer = run.optimizer_bytes(stage) / (ranks if stage > 0 else 1)
    gradients = FP32 * trained / (ranks if stage > 1 else 1)
    weights = value * run.parameters / (ranks if stage > 2 else 1)
    bucket, backward, sending, host = 0.0, 0.0, 0.0, 0.0
    size = bucket_size(zero)
    buffers = 2 if overlaps(zero) else 1
    step = FP32 * trained / ranks  # the gradients of a rank in one piece
    cast = ITEMSIZE[run.grad_reduce] if run.grad_reduce != run.precision else 0
    copies = (value + cast) * min(size, trained)
    if stage == 0:
        if run.precision == "bf16" and not accumulates:
            gradients = value * trained
        copies = (value + cast) * min(ALL_REDUCE_AT_ONCE, trained)
        sending = copies - (gradients - value * trained)  # the sums are rounded to bf16 before
        step = FP32 * trained if run.precision == "bf16" else 0
    elif stage == 1:
        bucket = FP32 * size * buffers
        sending = FP32 * trained / ranks
    elif stage == 2:
        backward = value * size * buffers
        sending = copies
    else:
        bucket = ITEMSIZE[run.grad_reduce] * size
        live = value * min(run.parameters, zero.get("stage3_max_live_parameters", 1_000_000_000))
        backward = live  # weights that are gathered
        sending = max(live, copies)  # again, as they come; or gradients
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        host = optimizer + 2 * FP32 * trained / ranks  # gradients as they come, and for the step
        optimizer = gradients = step = 0
    early = stage == 3 or (trained > size and (stage == 2 or (stage == 1 and overlaps(zero))))
    return ModelStates(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        bucket=bucket,
        backward=backward,
        sending=max(0.0, sending),
        sends_early=early,
        step=step,
        host=host,
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends for one optimiser step, by ring algorithms."""

    gradients: float
    weights: float
    overlapped: float
    """Bytes of both that are sent while the backward pass computes, if they get done there."""
    window: float
    """Share of a step's backward passes in which they are sent: stage 1 waits for the last one."""


def traffic(run: ParameterStates, zero: dict[str, Any], ranks: int, accumulation: int) -> Traffic:
    """Compute what is sent: under stages 0 and 1 once a step, under 2 and 3 per micro-batch.

    A ring passes on (N - 1) / N of a tensor to gather or to reduce-scatter it, twice that to
    all-reduce it. Stages 1 and 2 all-reduce the gradients, too (DeepSpeed's
    `use_multi_rank_bucket_allreduce`), and gather the new weights. Stage 3 gathers the weights for
    the forward pass, and for the backward pass those that `stage3_max_live_parameters` let go.
    """
    stage, share = zero.get("stage", 0), (ranks - 1) / ranks
    times = accumulation if stage > 1 else 1
    gradients = times * share * ITEMSIZE[run.grad_reduce] * run.trained * (1 if stage == 3 else 2)
    if stage == 3:
        live = zero.get("stage3_max_live_parameters", 1_000_000_000)
        gathers = accumulation * (1 + max(0.0, 1 - live / run.parameters))
        weights = gathers * share * run.itemsize * run.parameters
    else:
        weights = share * run.itemsize * run.trained if stage > 0 else 0.0
    overlapped = 0.0
    if stage > 0 and overlaps(zero) and run.trained:
        # The last bucket is sent when the backward pass has ended.
        full = (run.trained - 1) // bucket_size(zero) * bucket_size(zero)
        overlapped = gradients * full / run.trained + (weights if stage == 3 else 0)
    return Traffic(gradients, weights, overlapped, 1 / accumulation if stage == 1 else 1)
