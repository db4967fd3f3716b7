"""The words of a diagnosis: what a check flags, its verdict, the threshold it used and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item

GOOD, LOOK, BAD = "good", "look", "bad"
VERDICTS = (GOOD, LOOK, BAD)
"""From best to worst."""


@dataclass(frozen=True)
class Flag:
    """One item that a check objects to, and why."""

    check: str
    split: str
    id: str
    reason: str

    @property
    def key(self) -> tuple[str, str]:
        """Split and id of the item."""
        return self.split, self.id


@dataclass(frozen=True)
class Finding:
    """What one check says of the whole corpus."""

    check: str
    verdict: str
    summary: str
    threshold: str
    remedy: str
    flags: list[Flag] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the flags, which are listed by item elsewhere."""
        values = asdict(self)
        values["flagged"] = len(values.pop("flags"))
        return values


Check = Callable[[Sequence[Item], Limits], Finding]


def share_verdict(flagged: int, total: int, limits: Limits) -> str:
    """The verdict for ``flagged`` of ``total`` items."""
    share = flagged / max(total, 1)
    if share <= limits.look_share:
        return GOOD
    return LOOK if share <= limits.bad_share else BAD


def worst(verdicts: Sequence[str]) -> str:
    """The worst of the verdicts; good for none."""
    return max(verdicts, key=VERDICTS.index, default=GOOD)


def flagged_finding(
    check: str, items: Sequence[Item], flags: list[Flag], limits: Limits, threshold: str, remedy: str, numbers: dict[str, Any]
) -> Finding:
    """A finding whose verdict follows from the share of flagged items."""
    verdict = share_verdict(len({flag.key for flag in flags}), len(items), limits)
    summary = f"{len({flag.key for flag in flags})} of {len(items)} items"
    return Finding(check, verdict, summary, threshold, remedy if flags else "", flags, numbers)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Minimum, 5, 50 and 95 % points, and maximum; empty for no values."""
    import numpy as np

    if not len(values):
        return {}
    points = np.percentile(np.asarray(values, dtype=np.float64), [0, 5, 50, 95, 100])
    return {name: round(float(point), digits) for name, point in zip(("min", "p5", "median", "p95", "max"), points, strict=True)}
