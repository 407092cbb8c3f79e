"""Small marks drawn into the tables as SVG: an interval on a shared axis, and a line over the steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


Z = 1.959964
"""Half the width of a 95 % interval, in standard errors."""

AXIS = (150.0, 16.0)  # width and height of an interval's drawing
SPARK = (120.0, 26.0)
SPARK_POINTS = 120  # a point for each pixel of the width


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, and where its mark lies.

    Attributes:
        value: `None` where it is unknown.
        low: The interval's lower end; `None` where the standard error is unknown.
        high: Its upper end.
        x: Horizontal places of low end, value and high end; empty without an axis.
    """

    value: float | None
    low: float | None
    high: float | None
    x: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """`amplified` or `suppressed` where the interval leaves out zero, `unclear` where not, `none` without a value."""
        if self.value is None:
            return "none"
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "unclear"
        return "amplified" if self.value > 0 else "suppressed"


def interval(estimate: tuple[float | None, ...], axis: float | None) -> Interval:
    """The 95 % interval of an estimate, `(value, standard error)`, placed on an axis from `-axis` to `axis`."""
    value, error = estimate
    low = high = None
    if value is not None and error is not None:
        low, high = value - Z * error, value + Z * error
    if value is None or axis is None:
        return Interval(value, low, high)
    middle, room = AXIS[0] / 2, AXIS[0] / 2 - 5
    ends = (value if low is None else low, value, value if high is None else high)
    return Interval(value, low, high, tuple(round(middle + room * max(-1.0, min(1.0, end / axis)), 1) for end in ends))


def scale(values: Iterable[tuple[float | None, ...]]) -> float:
    """The axis' end that all of these values with standard errors fit on."""
    reach = [abs(value) + Z * (error or 0.0) for value, error in values if value is not None]
    return max(reach, default=1.0) or 1.0


@dataclass(frozen=True)
class Spark:
    """A line over the steps.

    Attributes:
        line: SVG path of the values.
        band: SVG path of their 95 % intervals; empty where the standard errors are unknown.
        zero: Height of the zero line.
        end: Place of the last value.
    """

    line: str
    band: str
    zero: float
    end: tuple[float, float]


def spark(steps: Sequence[int], values: Sequence[tuple[float | None, ...]]) -> Spark | None:
    """A sparkline of values with standard errors; `None` with fewer than two known values."""
    known = [
        (step, value, error or 0.0) for step, (value, error) in zip(steps, values, strict=True) if value is not None
    ]
    if len(known) < 2:
        return None
    stride = -(-len(known) // SPARK_POINTS)
    points = known[:-1:stride] + known[-1:]
    low = min(0.0, *(value - Z * error for _, value, error in points))
    high = max(0.0, *(value + Z * error for _, value, error in points))
    (width, height), span, length = SPARK, (high - low) or 1.0, (points[-1][0] - points[0][0]) or 1

    def at(step: int, value: float) -> tuple[float, float]:
        x, y = (step - points[0][0]) / length, (high - value) / span
        return round(2 + x * (width - 5), 1), round(2 + y * (height - 4), 1)

    def path(places: Iterable[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)

    upper = [at(step, value + Z * error) for step, value, error in points]
    lower = [at(step, value - Z * error) for step, value, error in reversed(points)]
    has_errors = any(error for _, _, error in points)
    return Spark(
        line=path(at(step, value) for step, value, _ in points),
        band=path([*upper, *lower]) + "Z" if has_errors else "",
        zero=at(0, 0.0)[1],
        end=at(points[-1][0], points[-1][1]),
    )
