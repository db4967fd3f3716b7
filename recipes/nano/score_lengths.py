"""How texts of all lengths end: runs that do not end, that stop too early, and that repeat themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kalle.evaluation.intelligibility import last_word_heard, repeated_words
from kalle.evaluation.metrics import Aggregate
from kalle.evaluation.scoring import aggregate
from kalle.evaluation.test_list import TestItem
from kalle.evaluation.word_errors import corpus_style

BINS = ((1, 1), (2, 5), (6, 15), (16, 30), (31, 60))
"""First and last number of words of each line of the table."""
SHORT_SHARE = 0.5
"""Speech of less than this share of the expected time is short."""
REPEATED_WORDS = 3
"""So many words more than the text repeats itself make a repetition."""
RATES = ("no_end", "early_stop", "last_word_missing", "short", "repetition")


def seconds_per_character(items: Sequence[TestItem]) -> float:
    """Pace of a voice: seconds of all recordings over the characters of their texts."""
    timed = [item for item in items if item.duration_s]
    return sum(item.duration_s or 0.0 for item in timed) / sum(len(item.text) for item in timed)


def judged(row: Mapping[str, Any], pace: float) -> dict[str, Any]:
    """Verdicts on one row of items.jsonl, each 0.0 or 1.0; ``pace`` in seconds per character.

    An early stop ended by itself, and is short or lacks its last word; what lacks it for want of an end counts under ``no_end`` alone.
    A repetition was stopped as one, or is heard as one.
    """
    text, heard = corpus_style(row["text"], "en"), corpus_style(row.get("transcript", ""), "en")
    ended = row["stop_reason"] == "end"
    missing = "transcript" in row and not last_word_heard(text, heard)
    short = row["audio_s"] < SHORT_SHARE * pace * len(row["text"])
    repeats = row["stop_reason"] == "repetition" or repeated_words(heard) >= repeated_words(text) + REPEATED_WORDS
    verdicts = {
        "no_end": not ended,
        "early_stop": ended and (missing or short),
        "last_word_missing": missing,
        "short": short,
        "repetition": repeats,
    }
    return {"id": row["id"], "words": len(row["text"].split()), **{name: float(value) for name, value in verdicts.items()}}


def summarised(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates with 95% intervals, over all items of ``rows``, their seeds averaged, and for each of `BINS` that has some."""
    groups = {"all": list(rows)} | {f"{low}-{high}": [row for row in rows if low <= row["words"] <= high] for low, high in BINS}
    return {
        name: {"items": rates[RATES[0]].count, **{rate: asdict(found) for rate, found in rates.items()}}
        for name, own in groups.items()
        if (rates := {rate: found for rate in RATES if (found := aggregate(own, Aggregate(rate, rate))) is not None})
    }


def lengths_table(found: Mapping[str, Any]) -> list[str]:
    """What `summarised` found, as Markdown."""
    head = ["| words | items | " + " | ".join(name.replace("_", " ") for name in RATES) + " |", "|---" * (len(RATES) + 2) + "|"]
    return head + [
        f"| {name} | {own['items']} | " + " | ".join(f"{own[rate]['value']:.1%}" for rate in RATES) + " |" for name, own in found.items()
    ]
