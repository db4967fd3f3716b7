"""What `kalle doctor` finds: one fact with its verdict and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One fact."""

    section: str
    name: str
    value: str
    status: Status = "ok"
    """"note" is worth knowing, "problem" wants the remedy."""
    remedy: str | None = None
    essential: bool = False
    """Whether nothing can be spoken while this is a problem."""

    @property
    def stops_speaking(self) -> bool:
        """Whether this is why nothing can be spoken."""
        return self.essential and self.status == "problem"


def examined(section: str, check: Callable[[], Iterable[Finding]], essential: bool = False) -> list[Finding]:
    """What ``check`` finds; whatever it raises becomes a finding too, for a broken package may raise anything."""
    try:
        return list(check())
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return [Finding(section, "check failed", problem, "problem", "mend what the message names, or reinstall the package", essential)]


def gigabytes(size: float) -> str:
    """``size`` in bytes as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
