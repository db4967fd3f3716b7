"""All checks by name, and what they say of a corpus together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kalle.data.doctor import audio_checks, copies, pace_checks, speakers, text_checks
from kalle.data.doctor.findings import Check, Finding
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item
from kalle.errors import UserError

CHECKS: Mapping[str, Check] = {
    "unreadable": audio_checks.readable,
    "duration": audio_checks.duration,
    "loudness": audio_checks.loudness,
    "silence": audio_checks.silences,
    "clipping": audio_checks.clipping,
    "bandwidth": audio_checks.bandwidth,
    "rate": pace_checks.rate,
    "outlier": pace_checks.outliers,
    "script": text_checks.script,
    "characters": text_checks.characters,
    "duplicate_audio": copies.same_audio,
    "duplicate_text": copies.same_text,
    "leakage": copies.leakage,
    "speakers": speakers.speakers,
}
"""Name -> check, in the order of the report; a flag carries the name of its check."""

REMOVABLE = tuple(name for name in CHECKS if name != "speakers")
REMOVED_BY_DEFAULT = (
    "unreadable",
    "silence",
    "clipping",
    "bandwidth",
    "rate",
    "outlier",
    "script",
    "characters",
    "duplicate_audio",
    "leakage",
)
"""What makes an item wrong. Length, loudness and a repeated text make it unusual, or can be mended."""


def examine(items: Sequence[Item], limits: Limits) -> list[Finding]:
    """One finding a check."""
    return [check(items, limits) for check in CHECKS.values()]


def removal_list(text: str) -> tuple[str, ...]:
    """The names in "a,b,c", in the order of the checks; a UserError for a name that flags nothing."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in REMOVABLE:
            raise UserError(f"no check flags '{name}': expected some of {','.join(REMOVABLE)}; correct --remove")
    return tuple(name for name in REMOVABLE if name in names)
