"""Who speaks how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from kalle.data.doctor.audio_checks import heard
from kalle.data.doctor.findings import GOOD, LOOK, Finding
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item

LISTED_SPEAKERS = 30


def speakers(items: Sequence[Item], limits: Limits) -> Finding:
    """Minutes of each speaker; no item is flagged, for no item is at fault."""
    seconds: Counter[str] = Counter()
    for item in heard(items):
        seconds[item.speaker] += item.sound.seconds  # type: ignore[assignment]
    total = max(sum(seconds.values()), 1e-9)
    largest, most = seconds.most_common(1)[0] if seconds else ("", 0)
    few = [name for name, value in seconds.items() if value < 60 * limits.min_speaker_minutes]
    shares = np.array([value / total for value in seconds.values() if value > 0])
    problems = []
    if len(seconds) > 1 and most / total > limits.max_speaker_share:
        problems.append(f"'{largest}' speaks {most / total:.0%}")
    if few:
        problems.append(f"{len(few)} of {len(seconds)} with less than {limits.min_speaker_minutes:g} min")
    if "" in seconds:
        problems.append(f"{seconds[''] / 60:.1f} min without a speaker's name")
    numbers = {
        "count": len(seconds),
        "effective_count": round(float(np.exp(-(shares * np.log(shares)).sum())), 2) if shares.size else 0,
        "minutes": {name or "(not given)": round(value / 60, 2) for name, value in seconds.most_common(LISTED_SPEAKERS)},
        "below_min_minutes": len(few),
    }
    threshold = f"{limits.min_speaker_minutes:g} min each; one of several at most {limits.max_speaker_share:.0%}"
    summary = f"{len(seconds)} speakers" + "".join(f"; {problem}" for problem in problems)
    remedy = "weight the rare speakers up, or name the speakers; a voice of less than a minute is hardly learnt" if problems else ""
    return Finding("speakers", LOOK if problems else GOOD, summary, threshold, remedy, [], numbers)
