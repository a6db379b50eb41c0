"""Bytes of a rank's model states, of its traffic, and of a checkpoint, by formula.

Model states are those of ZeRO (arXiv 1910.02054, section 5): weights, gradients, and the
optimiser's fp32 master weights and moments. Parameters that are not trained have only weights. The
buffers are those of DeepSpeed 0.19; `benchmarks/plan_error.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mae_scale.config.sections import OptimizerConfig

FP32 = 4  # bytes of a value
ITEMSIZE = {"bf16": 2, "fp32": FP32}
MOMENTS = {"adamw": 2, "lars": 1}  # number of an optimiser's fp32 states of each parameter
ALL_REDUCE_AT_ONCE = 500_000_000  # number of values that stage 0 sends at once


@dataclass(frozen=True)
class ParameterStates:
    """Numbers of parameters of a run, and what it keeps for each of them."""

    parameters: int  # number of the model's parameters, including those that are not trained
    trained: int  # number of trained parameters
    precision: str  # precision of weights and activations, "bf16" or "fp32"
    moments: int = 2  # fp32 states of the optimiser for each trained parameter; 1 for LARS
    ema: bool = False  # whether there is a moving average of the weights
    grad_reduce: str = "fp32"  # precision in which gradients are summed over the ranks
    by_layer: bool = False  # whether the optimiser has groups for each layer (layer-wise decay)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or activation."""
        return ITEMSIZE[self.precision]

    def optimizer_bytes(self, stage: int) -> int:
        """Return the bytes of master weights, moments and moving average, all ranks together.

        At stage 0 in fp32 the weights are their own masters.
        """
        has_masters = self.precision == "bf16" or stage > 0
        return FP32 * self.trained * (has_masters + self.moments + self.ema)

    def checkpoint_bytes(self, stage: int) -> int:
        """Return the bytes of a checkpoint, all ranks together.

        Frozen weights are saved in fp32. Stage 3 saves only the masters of the others.
        """
        weights = FP32 * (self.parameters - self.trained)
        weights += self.itemsize * self.trained if stage < 3 else 0
        return weights + self.optimizer_bytes(stage)


def trained_by(
    optim: OptimizerConfig, model: nn.Module, precision: str, grad_reduce: str = "fp32"
) -> ParameterStates:
    """Return what a run with this optimiser keeps for a model, which may be on the meta device."""
    # ZeRO-3 empties a parameter that it has sharded, and keeps its size in ds_numel.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return ParameterStates(
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, is_trained in sizes if is_trained),
        precision=precision,
        moments=MOMENTS[optim.optimizer],
        ema=optim.average_decay is not None,
        grad_reduce=grad_reduce,
        by_layer=optim.rate_per_layer != 1,
    )


@dataclass(frozen=True)
class ModelStates:
    """Bytes of a rank's model states and buffers, on its device unless stated otherwise."""

    weights: float  # bytes of the weights
    gradients: float  # bytes of the gradients
    optimizer: float  # bytes of the master weights and the optimiser's states
    bucket: float  # bytes of a bucket for gradients that exists all the time
    backward: float  # bytes of further buffers during the backward pass
    sending: float  # bytes of copies of the gradients that are being sent
    # Whether gradients are sent during the backward pass, when activations exist, too.
    sends_early: bool
    step: float  # bytes of copies that the optimiser's step makes, after the backward pass
    host: float  # bytes in host memory

    @property
    def held(self) -> float:
        """Bytes that are held between two micro-batches of a step."""
        return self.weights + self.gradients + self.optimizer + self.bucket

    def peak(self, activations: float) -> float:
        """Compute the bytes at the worst moment of a step, with those of a micro-batch."""
        during = self.backward + activations + (self.sending if self.sends_early else 0)
        after = max(self.backward + self.sending, self.step)
        return self.held + max(during, after)


def overlaps(zero: dict[str, Any]) -> bool:
    """Return whether DeepSpeed sends during the backward pass; by default only stage 3 does."""
    return bool(zero.get("overlap_comm", zero.get("stage", 0) == 3))


def bucket_size(zero: dict[str, Any]) -> int:
    """Return the number of gradients that are sent at once; the default is DeepSpeed's."""
    return int(zero.get("reduce_bucket_size", 500_000_000))


def model_states(
    run: ParameterStates, zero: dict[str, Any], ranks: int, *, accumulates: bool = True
) -> ModelStates:
    """Compute the bytes of a rank's model states and buffers.

    Args:
        run: parameters of the run.
        zero: section `zero_optimization` of a DeepSpeed config.
        ranks: number of ranks among which ZeRO divides the states.
        accumulates: whether a step has several micro-batches.
    """
    stage, value, trained = zero.get("stage", 0), run.itemsize, run.trained
    optimizer = run.optimizer_bytes(stage) / (ranks if stage > 0 else 1)
    gradients = FP32 * trained / (ranks if stage > 1 else 1)
    weights = value * run.parameters / (ranks if stage > 2 else 1)
    bucket, backward, sending, host = 0.0, 0.0, 0.0, 0.0
    size = bucket_size(zero)
    buffers = 2 if overlaps(zero) else 1
    step = FP32 * trained / ranks  # the gradients of a rank as one tensor
    cast = ITEMSIZE[run.grad_reduce] if run.grad_reduce != run.precision else 0
    copies = (value + cast) * min(size, trained)
    if stage == 0:
        if run.precision == "bf16" and not accumulates:
            gradients = value * trained
        rounded = gradients - value * trained  # the fp32 sums have been rounded to bf16
        if ranks > 1:
            sending = (value + cast) * min(ALL_REDUCE_AT_ONCE, trained) - rounded
        step = FP32 * trained - rounded if run.precision == "bf16" else 0
    elif stage == 1 and run.precision == "fp32":
        bucket, step = FP32 * size * buffers, 0
    elif stage == 1:
        # The sums of earlier micro-batches are fp32; the gradients of the last one are bf16 until
        # they are in a bucket or, in one process alone, in the tensor with which AdamW steps.
        last, gradients = value * trained, FP32 * trained if accumulates else 0
        backward = last
        left = value * max(0, trained - size)
        sending = max(0, FP32 * trained / ranks + left - last)
        if overlaps(zero):
            backward += FP32 * size * buffers
        elif ranks > 1:
            sending += FP32 * size
        else:
            sending = FP32 * trained
    elif stage == 2:
        backward = value * size * buffers
        sending = FP32 * min(size, trained)
    else:
        # Gradients are copied into a bucket at once, or wait as they are until they are sent.
        backward = value * min(size, trained)
        if zero.get("contiguous_gradients", True):
            bucket, backward = ITEMSIZE[run.grad_reduce] * size, 0
        if ranks > 1:
            # Gathered weights, and again as many while they are copied out of their message.
            live = value * min(run.parameters, zero.get("stage3_max_live_parameters", 10**9))
            backward += live
            sending = max(live, copies)
        else:  # one process alone computes with its own weights
            sending = ITEMSIZE[run.grad_reduce] * min(size, trained)
    if stage in (1, 2) and run.precision == "bf16":
        step = 0  # AdamW steps with the gradients themselves
        if run.by_layer and ranks > 1:
            # They are gone when the weights of many groups are copied out of their message.
            step = max(0, value * trained * (1 + 1 / ranks) - gradients)
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        host = optimizer + 2 * FP32 * trained / ranks  # gradients as they arrive, and for the step
        optimizer = gradients = step = 0
    early = stage == 3 or (trained > size and (stage == 2 or (stage == 1 and overlaps(zero))))
    sending = max(0.0, sending)
    return ModelStates(weights, gradients, optimizer, bucket, backward, sending, early, step, host)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends for one optimiser step, by ring algorithms."""

    gradients: float  # bytes of gradients
    weights: float  # bytes of weights
    overlapped: float  # bytes of both that can be sent while the backward pass computes
    # Share of a step's backward passes during which they can be sent; at stage 1, the last one.
    window: float

    @property
    def sent(self) -> float:
        """Bytes of both."""
        return self.gradients + self.weights


def traffic(run: ParameterStates, zero: dict[str, Any], ranks: int, accumulation: int) -> Traffic:
    """Compute what each of `ranks` ranks sends in a step of `accumulation` micro-batches.

    Gradients are sent once a step at stages 0 and 1, and for each micro-batch at stages 2 and 3. In
    a ring of N ranks each sends (N - 1) / N of a tensor to gather or reduce-scatter it, and twice
    that to all-reduce it. Stages 1 and 2 all-reduce the gradients, as stage 0 does (DeepSpeed's
    `use_multi_rank_bucket_allreduce`), and gather the new weights. Stage 3 gathers the weights for
    the forward pass; for the backward pass it gathers again those beyond
    `stage3_max_live_parameters`. `zero` is section `zero_optimization` of a DeepSpeed config.
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
