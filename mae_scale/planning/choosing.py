"""Choice of a setting for a run on a cluster, and its reason in words."""

from __future__ import annotations

from mae_scale.planning.choice import BUSY_TOKENS, CHECKPOINTING, Row

# Of equally fast settings the first in this order is chosen. zero0 is only for comparison.
PREFERENCE = ("zero1", "zero2", "zero3", "zero3_offload")
FIRST = ("zero1", "zero2")  # preferred, since ZeRO-3 waits for weights before each block
AS_FAST = 0.98  # share of the best rate that counts as equal: estimates are no better than that


def choose(found: list[Row]) -> Row | None:
    """Choose the fastest setting that fits; of equally fast ones, the first in `PREFERENCE`.

    ZeRO-3 is for models that do not fit otherwise. Settings that use host memory are the last
    resort, since their speed is not known; before them come micro-batches that do not keep a GPU
    busy. The result is None if nothing fits.
    """
    some = _candidates(found)
    if not some:
        return None
    best = max(map(_rate, some))
    return min((row for row in some if _rate(row) >= AS_FAST * best), key=_order)


def _candidates(found: list[Row]) -> list[Row]:
    """List the settings from which `choose` takes the fastest."""
    fitting = [row for row in found if row.fits]
    if len({row.deepspeed for row in found}) > 1:
        fitting = [row for row in fitting if row.deepspeed in PREFERENCE]
    on_device = [row for row in fitting if row.host == 0]
    busy = [row for row in on_device if row.busy]
    first = [row for row in busy if row.deepspeed in FIRST]
    return first or busy or on_device or fitting


def reason(found: list[Row], chosen: Row) -> str:
    """Explain why `choose` chose a setting, above all if another one looks faster."""
    some = _candidates(found)
    if len(some) < 2:
        return "It is the only one that fits." if len(found) > 1 else "It was asked for."
    order = "zero1, zero2, zero3, then the fewest recomputed blocks, then the largest micro-batch"
    best = max(map(_rate, some))
    if chosen.images_per_second is None:
        words = [f"Times are not known here; it is the first that fits, in the order {order}"]
    elif _rate(chosen) == best:
        words = ["It is the fastest of those that come into question"]
        if sum(_rate(row) == best for row in some) > 1:
            words.append(f"of equals the first is taken: {order}")
    else:
        words = [
            f"It is within {1 - AS_FAST:.0%} of the fastest ({best:,.0f} images/s), which is no "
            f"difference for an estimate; of such the first is taken: {order}"
        ]
    faster = [r for r in found if r.fits and r not in some and _rate(r) > _rate(chosen)]
    if any(row.deepspeed == "zero0" for row in faster):
        words.append("zero0 is shown to compare with only")
    if any(row.deepspeed == "zero3" and row.busy for row in faster):
        words.append("zero3 is for what does not fit otherwise: it waits for weights at each block")
    if any(row.host for row in faster):
        words.append("where host memory takes part (<), the time of the copies is not known")
    if any(not row.busy and row.deepspeed in FIRST for row in faster):
        words.append(f"a micro-batch of fewer than {BUSY_TOKENS} tokens does not keep a GPU busy")
    return "; ".join(words) + "."


def _rate(row: Row) -> float:
    return row.images_per_second or 0.0


def _order(row: Row) -> tuple[int, int, int]:
    stage = PREFERENCE.index(row.deepspeed) if row.deepspeed in PREFERENCE else 0
    option = (row.checkpointing, row.offload)
    place = CHECKPOINTING.index(option) if option in CHECKPOINTING else 0
    return stage, place, -row.micro_batch
