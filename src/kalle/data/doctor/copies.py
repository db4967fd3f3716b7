"""Checks for copies: the same audio or text twice, and either of them in two splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from kalle.data.doctor.audio_checks import heard
from kalle.data.doctor.findings import BAD, GOOD, LOOK, Finding, Flag, flagged_finding
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item
from kalle.data.prepare_split import normalised

_HELD_OUT_FIRST = {"test": 0, "valid": 1, "train": 3}


def _groups(items: Sequence[Item], key: Callable[[Item], object]) -> list[list[Item]]:
    """Items with an equal key that is not empty, two or more together; in each group those to keep come first."""
    groups: dict[object, list[Item]] = defaultdict(list)
    for item in items:
        if key(item):
            groups[key(item)].append(item)
    return [sorted(group, key=_rank) for group in groups.values() if len(group) > 1]


def _rank(item: Item) -> int:
    """Held-out splits come before training: what a test set holds decides what training may not."""
    return _HELD_OUT_FIRST.get(item.split, 2)


def same_audio(items: Sequence[Item], limits: Limits) -> Finding:
    """Items whose decoded samples are equal; every one but the first of a group is flagged."""
    flags = []
    for first, *rest in _groups(heard(items), lambda item: item.sound.digest):
        for item in rest:
            also = "" if normalised(item.text) == normalised(first.text) else ", with another text"
            flags.append(Flag("duplicate_audio", *item.key, f"the audio of {first.split} '{first.id}'{also}"))
    remedy = "leave the copies out; where the texts differ, listen which one is right"
    return flagged_finding("duplicate_audio", items, flags, limits, "equal samples, to 16 bits", remedy, {})


def same_text(items: Sequence[Item], limits: Limits) -> Finding:
    """Texts that one speaker says more than once: no fault, but little is learnt from many of them."""
    flags = []
    for first, *rest in _groups(items, lambda item: normalised(item.text) and (item.speaker, normalised(item.text))):
        flags += [Flag("duplicate_text", *item.key, f"the text of {first.split} '{first.id}', same speaker") for item in rest]
    share = len(flags) / max(len(items), 1)
    numbers = {"distinct_texts": len({normalised(item.text) for item in items}), "repeated_share": round(share, 4)}
    verdict = LOOK if share > limits.look_repeated_share else GOOD
    remedy = "keep a few takes of each text" if verdict == LOOK else ""
    threshold = f"{limits.look_repeated_share:.0%} of the items"
    return Finding("duplicate_text", verdict, f"{len(flags)} of {len(items)} items", threshold, remedy, flags, numbers)


def leakage(items: Sequence[Item], limits: Limits) -> Finding:
    """A text or an audio in two splits; the copy outside the held-out split is flagged, test before valid before train."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    keys: dict[str, Callable[[Item], object]] = {"text": lambda item: normalised(item.text), "audio": lambda item: item.sound.digest}
    for what, key in keys.items():
        for group in _groups(items, key):
            first = group[0]
            for item in group:
                if _rank(item) != _rank(first) or item.split != first.split:
                    reasons[item.key].append(f"its {what} is also {first.split} '{first.id}'")
    flags = [Flag("leakage", *key, "; ".join(said)) for key, said in reasons.items()]
    summary = f"{len(flags)} of {len(items)} items"
    remedy = "leave the flagged copies out: a score on a held-out split means nothing otherwise" if flags else ""
    return Finding("leakage", BAD if flags else GOOD, summary, "none may be", remedy, flags, {})
