"""Checks of text against audio: a rate nobody speaks at, and items far from others of their length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kalle.data.doctor.audio_checks import heard
from kalle.data.doctor.findings import Finding, Flag, flagged_finding, spread
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item
from kalle.data.doctor.writing import letters_and_signs
from kalle.text.languages import SYLLABLE_LETTERS

_MAD_TO_SIGMA = 1.4826
_LEAST_SIGMA = 0.05
_ITEMS_PER_BIN = 50
_MOST_BINS = 12


def amount(text: str) -> float:
    """How much there is to speak, in letters: a sign of a syllabic script counts as `SYLLABLE_LETTERS`."""
    letters, signs = letters_and_signs(text)
    return letters + SYLLABLE_LETTERS * signs


def pace(item: Item) -> tuple[float, str]:
    """Letters, or signs where the text is mostly signs, in a second from the first to the last sound; and what was counted."""
    letters, signs = letters_and_signs(item.text)
    if signs > letters:
        return (signs + letters / SYLLABLE_LETTERS) / item.sound.spoken_s, "signs"
    return (letters + SYLLABLE_LETTERS * signs) / item.sound.spoken_s, "letters"


def rate(items: Sequence[Item], limits: Limits) -> Finding:
    """A speaking rate that no speaker reaches, or that means text is missing."""
    flags, rates = [], {"letters": list[float](), "signs": list[float]()}
    for item in _spoken(items):
        value, unit = pace(item)
        rates[unit].append(value)
        least, most = _rate_limits(unit, limits)
        if not least <= value <= most:
            flags.append(Flag("rate", *item.key, f"{value:.1f} {unit} a second"))
    numbers = {f"{unit}_per_s": spread(values, 2) for unit, values in rates.items() if values}
    bounds = {unit: _rate_limits(unit, limits) for unit in rates if rates[unit]}
    threshold = " and ".join(f"{least:g} to {most:g} {unit} a second" for unit, (least, most) in bounds.items())
    remedy = "the text is not what is spoken: correct it, or leave the items out"
    return flagged_finding("rate", items, flags, limits, threshold or "no text", remedy, numbers)


def _rate_limits(unit: str, limits: Limits) -> tuple[float, float]:
    if unit == "signs":
        return limits.min_signs_per_s, limits.max_signs_per_s
    return limits.min_letters_per_s, limits.max_letters_per_s


def outliers(items: Sequence[Item], limits: Limits) -> Finding:
    """Items much faster or slower than others of their language and length: swapped, cut or wrong texts."""
    flags, judged = [], 0
    by_language: dict[str, list[Item]] = {}
    for item in _spoken(items):
        by_language.setdefault(item.language, []).append(item)
    for group in by_language.values():
        if len(group) < limits.min_like_items:
            continue
        judged += len(group)
        score, ratio = scores(group)
        for item, z, times in zip(group, score, ratio, strict=True):
            if abs(z) > limits.outlier_z and max(times, 1 / times) > limits.min_outlier_ratio:
                words = f"{times:.1f} times as fast" if times > 1 else f"{1 / times:.1f} times as slow"
                flags.append(Flag("outlier", *item.key, f"{words} as others of its length (z {z:+.1f})"))
    threshold = f"|z| {limits.outlier_z:g} and {limits.min_outlier_ratio:g} times; at least {limits.min_like_items} items of a language"
    remedy = "listen to them: the text is not what is spoken, or half of it is missing; `kalle data retranscribe` finds out which"
    return flagged_finding("outlier", items, flags, limits, threshold, remedy, {"items_judged": judged})


def scores(items: Sequence[Item]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Robust z of each item's log rate (N,), and its rate over the usual one (N,).

    Usual rate and its spread (median and MAD) are found in bins of like amounts of text and interpolated between: a short text is
    spoken slower and less evenly than a long one.
    """
    amounts = np.log([max(amount(item.text), 1.0) for item in items])
    rates = amounts - np.log([item.sound.spoken_s for item in items])
    bins = np.array_split(np.argsort(amounts, kind="stable"), min(max(len(items) // _ITEMS_PER_BIN, 1), _MOST_BINS))
    centres = [float(np.median(amounts[members])) for members in bins]
    usual = np.interp(amounts, centres, [float(np.median(rates[members])) for members in bins])
    off = rates - usual
    sigmas = [max(_MAD_TO_SIGMA * float(np.median(np.abs(off[members]))), _LEAST_SIGMA) for members in bins]
    return off / np.interp(amounts, centres, sigmas), np.exp(off)


def _spoken(items: Sequence[Item]) -> list[Item]:
    return [item for item in heard(items) if amount(item.text) > 0]
