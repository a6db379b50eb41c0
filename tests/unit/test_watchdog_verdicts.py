"""Finding the rank that is to blame by the records of all ranks."""

from __future__ import annotations

from mae_scale.launch.watchdog import SLOW_S, Peer, find_lost, find_stuck

LIMIT = 30


def peers(size: int) -> list[Peer]:
    return [Peer(rank) for rank in range(size)]


def second(group: list[Peer], beat: int, silent: tuple[int, ...] = (), **what: list) -> None:
    """Let one second pass; `what` gives a value for each rank."""
    for peer in group:
        record = {"beat": beat, "host": f"n{peer.rank // 2}", "moves": beat, "doing": "a step",
                  "waits": False, "quick": True}  # fmt: skip
        record |= {key: values[peer.rank] for key, values in what.items()}
        peer.update(peer.record if peer.rank in silent else record)


def test_all_is_well() -> None:
    group = peers(4)
    for beat in range(100):
        second(group, beat)
    assert find_lost(group, 1) is None and find_stuck(group, 1) is None


def test_silent_ranks_are_lost() -> None:
    group = peers(4)
    for beat in range(1 + LIMIT):
        assert find_lost(group, LIMIT) is None
        second(group, beat, silent=(2,) if beat else ())
    assert find_lost(group, LIMIT) == "lost rank 2 (n1): no sign of life for 30 s"


def test_a_rank_that_never_came_is_lost() -> None:
    group = peers(2)
    for beat in range(LIMIT):
        second(group, beat, silent=(1,))
    assert find_lost(group, LIMIT) == "lost rank 1: no sign of life for 30 s"


def test_those_that_are_behind_hang() -> None:
    group = peers(4)
    for beat in range(1 + LIMIT):
        assert find_stuck(group, LIMIT) is None
        second(group, beat, moves=[8, 7, 8, 8], doing=["x", "waiting for data", "x", "x"])
    assert find_stuck(group, LIMIT) == "rank 1 (n0) hangs: waiting for data for 30 s"


def test_of_those_that_are_as_far_it_is_who_is_not_in_a_collective() -> None:
    group = peers(6)
    for beat in range(1 + LIMIT):
        second(group, beat, moves=[8] * 6, waits=[True] * 5 + [False])
    assert find_stuck(group, LIMIT) == "rank 5 (n2) hangs: a step for 30 s"
    for peer in group:
        peer.record["waits"] = True  # then no rank can be blamed
    expected = "rank 0 (n0), rank 1 (n0), rank 2 (n1) and 3 more hangs: a step for 30 s"
    assert find_stuck(group, LIMIT) == expected


def test_as_long_as_one_goes_on_nobody_hangs() -> None:
    group = peers(2)
    for beat in range(200):
        second(group, beat, moves=[1, beat // 20])
    assert find_stuck(group, LIMIT) is None


def test_what_is_no_usual_step_may_take_longer() -> None:
    group = peers(2)
    for beat in range(1 + SLOW_S):
        assert find_stuck(group, LIMIT) is None
        second(group, beat, moves=[8, 8], doing=["saving step 8"] * 2, quick=[False, True])
    assert find_stuck(group, LIMIT) == "rank 0 (n0), rank 1 (n0) hangs: saving step 8 for 1800 s"
