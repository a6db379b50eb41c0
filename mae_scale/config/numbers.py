"""Types of numbers with a range: jsonargparse checks them and shows their names in `--help`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    From0 = int
    From1 = int
    Workers = int
    Size = int
    Finite = float
    Above0 = float
    AtLeast0 = float
    AtLeast10 = float
    Share = float
    ShareAbove0 = float
    ShareBelow1 = float
    Between0And1 = float
else:
    from jsonargparse.typing import restricted_number_type

    # Each float must be below infinity, so that "inf" and "nan" are refused.
    FINITE = ("<", float("inf"))
    From0 = restricted_number_type("whole number from 0 on", int, [(">=", 0), ("<", 2**62)])
    From1 = restricted_number_type("whole number from 1 on", int, [(">=", 1), ("<", 2**62)])
    # Larger sizes would fill any memory before anything could say so.
    Size = restricted_number_type("whole number from 1 to 16384", int, [(">=", 1), ("<=", 16384)])
    Workers = restricted_number_type("whole number from 0 to 256", int, [(">=", 0), ("<=", 256)])
    Finite = restricted_number_type("number", float, [(">", -float("inf")), FINITE])
    Above0 = restricted_number_type("number above 0", float, [(">", 0), FINITE])
    AtLeast0 = restricted_number_type("number from 0 on", float, [(">=", 0), FINITE])
    AtLeast10 = restricted_number_type("number from 10 on", float, [(">=", 10), FINITE])
    Share = restricted_number_type("number from 0 to 1", float, [(">=", 0), ("<=", 1), FINITE])
    ShareAbove0 = restricted_number_type(
        "number above 0 and up to 1", float, [(">", 0), ("<=", 1), FINITE]
    )
    ShareBelow1 = restricted_number_type(
        "number from 0 to below 1", float, [(">=", 0), ("<", 1), FINITE]
    )
    Between0And1 = restricted_number_type(
        "number between 0 and 1", float, [(">", 0), ("<", 1), FINITE]
    )
