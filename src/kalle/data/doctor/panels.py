"""One picture a property, each drawn into axes of matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kalle.data.doctor.audio_checks import heard
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item
from kalle.data.doctor.pace_checks import amount, pace
from kalle.data.doctor.spectrum import BANDS, PRESENT_DB
from kalle.data.doctor.writing import script_counts

Flagged = Mapping[str, frozenset[tuple[str, str]]]
"""Check -> keys of the items it flags."""
Panel = Callable[[Any, Sequence[Item], Flagged, Limits], None]
FINE, FAULT, LIMIT = "#4c72b0", "#c0392b", "#888888"
_MOST_BARS = 12


def _histogram(axis: Any, values: Sequence[float], label: str, limits: Sequence[float] = (), log_x: bool = False, bins: int = 40) -> None:
    """Counts on a logarithmic axis, so that single outliers are seen; thresholds as dashed lines where the data reach that far."""
    values = [value for value in values if np.isfinite(value)]
    if values:
        low, high = min(values), max(values)
        shown = [limit for limit in limits if low - 0.3 * (high - low) <= limit <= high + 0.3 * (high - low)]
        low, high = min([low, *shown]), max([high, *shown])
        high = high if high > low else low + 1e-3
        edges = np.geomspace(max(low, 1e-3), high, bins + 1) if log_x else np.linspace(low, high, bins + 1)
        axis.hist(values, bins=edges, color=FINE)
        for limit in shown:
            axis.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=0)
    if log_x and values:
        axis.set_xscale("log")
        ticks = [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if edges[0] <= tick <= edges[-1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set_xlabel(label)
    axis.set_ylabel("items")


def durations(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Seconds of the items."""
    seconds = [item.sound.seconds for item in heard(items)]
    axis.set_title(f"duration: {sum(seconds) / 3600:.2f} h in {len(seconds)} items")
    _histogram(axis, seconds, "seconds", (limits.min_seconds, limits.max_seconds), log_x=True)


def text_against_audio(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Spoken seconds over the amount of text, outliers in red."""
    spoken = [item for item in heard(items) if amount(item.text) > 0]
    at_fault = flagged["outlier"] | flagged["rate"]
    for keys, colour, size, label in ((False, FINE, 4, None), (True, FAULT, 16, f"outliers ({len(at_fault)})")):
        group = [item for item in spoken if (item.key in at_fault) is keys]
        if group:
            axis.scatter(
                [amount(i.text) for i in group], [i.sound.spoken_s for i in group], s=size, color=colour, linewidths=0, label=label
            )
    if at_fault:
        axis.legend(fontsize=7, loc="upper left")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title("text against audio")
    axis.set_xlabel("letters (a sign counts 3)")
    axis.set_ylabel("spoken seconds")


def rates(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Letters or signs a second."""
    units: dict[str, list[float]] = {"letters": [], "signs": []}
    for item in heard(items):
        if amount(item.text) > 0:
            value, unit = pace(item)
            units[unit].append(value)
    main = max(units, key=lambda unit: len(units[unit]))
    edges = (limits.min_signs_per_s, limits.max_signs_per_s) if main == "signs" else (limits.min_letters_per_s, limits.max_letters_per_s)
    _histogram(axis, units[main], f"{main} a second, silence at the ends left out", edges)
    median = f": median {np.median(units[main]):.1f}" if units[main] else ""
    axis.set_title(f"speaking rate{median}")


def loudness(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Integrated loudness."""
    levels = [item.sound.loudness_lufs for item in heard(items) if item.sound.loudness_lufs is not None]
    median = float(np.median(levels)) if levels else 0.0
    offset = limits.max_loudness_offset_db
    edges = (limits.min_loudness_lufs, limits.max_loudness_lufs, median - offset, median + offset)
    _histogram(axis, levels, "LUFS", edges)
    axis.set_title(f"loudness: median {median:.1f} LUFS")


def silences(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Leading, trailing and longest inner silence, one line each."""
    kinds = {
        "leading": ([item.sound.leading_s for item in heard(items)], limits.max_leading_s),
        "trailing": ([item.sound.trailing_s for item in heard(items)], limits.max_trailing_s),
        "longest pause": ([item.sound.pause_s for item in heard(items)], limits.max_pause_s),
    }
    top = max([max(values, default=0.0) for values, _ in kinds.values()] + [limits.max_pause_s])
    for (name, (values, limit)), colour in zip(kinds.items(), ("#4c72b0", "#dd8452", "#55a868"), strict=True):
        axis.hist(values, bins=np.linspace(0, top, 41), histtype="step", color=colour, label=f"{name} (limit {limit:g} s)")
        axis.axvline(limit, color=colour, linestyle="--", linewidth=0.8)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
    axis.set_title(f"silence: {len(flagged['silence'])} items flagged")
    axis.set_xlabel("seconds")
    axis.set_ylabel("items")


def clipping(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Share of samples in flat tops; items without any stand at the left edge."""
    floor = 1e-6
    shares = [float(np.log10(max(item.sound.clipped_share, floor))) for item in heard(items)]
    edges = np.linspace(-6, 0, 37)
    axis.hist(shares, bins=edges, color=FINE)
    axis.axvline(np.log10(limits.max_clipped_share), color=LIMIT, linestyle="--", linewidth=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.set_xticks(range(-6, 1, 2), ["none", "0.01%", "1%", "100%"])
    axis.set_title(f"clipping: {len(flagged['clipping'])} items flagged")
    axis.set_xlabel("samples in flat tops")
    axis.set_ylabel("items")


def bandwidths(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """The highest frequency present."""
    nyquist = max([item.sample_rate_hz for item in items], default=16000) / 2000
    axis.hist([item.sound.bandwidth_hz / 1000 for item in heard(items)], bins=np.linspace(0, nyquist * 1.02, 42), color=FINE)
    axis.axvline(limits.min_bandwidth_share * nyquist, color=LIMIT, linestyle="--", linewidth=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.set_title(f"bandwidth present: {len(flagged['bandwidth'])} items flagged")
    axis.set_xlabel("kHz")
    axis.set_ylabel("items")


def spectra(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Median spectrum of the loudest moments with its 5 to 95 % band, and of the narrow items in red."""
    groups = {False: FINE, True: FAULT}
    nyquist = max([item.sample_rate_hz for item in items], default=16000) / 2000
    frequencies = (np.arange(BANDS) + 0.5) * nyquist / BANDS
    for narrow, colour in groups.items():
        levels = np.array([item.sound.bands_db for item in heard(items) if (item.key in flagged["bandwidth"]) is narrow], dtype=float)
        if len(levels):
            low, middle, high = np.percentile(levels, [5, 50, 95], axis=0)
            axis.fill_between(frequencies, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.plot(frequencies, middle, color=colour, label=f"{'flagged' if narrow else 'items'} ({len(levels)})")
    axis.axhline(-PRESENT_DB, color=LIMIT, linestyle="--", linewidth=1)
    axis.set_ylim(-100, 3)
    axis.legend(fontsize=7, loc="lower left")
    axis.set_title("spectrum: median, 5 to 95 %")
    axis.set_xlabel("kHz")
    axis.set_ylabel("dB below the strongest")


def speakers(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Minutes of the speakers who say most."""
    seconds: Counter[str] = Counter()
    for item in heard(items):
        seconds[item.speaker or "(not given)"] += item.sound.seconds  # type: ignore[assignment]
    _bars(axis, {name: value / 60 for name, value in seconds.most_common(_MOST_BARS)})
    axis.set_title(f"speakers: {len(seconds)}" + (f", the first {_MOST_BARS}" if len(seconds) > _MOST_BARS else ""))
    axis.set_xlabel("minutes")


def scripts(axis: Any, items: Sequence[Item], flagged: Flagged, limits: Limits) -> None:
    """Letters of each script."""
    total: Counter[str] = Counter()
    for item in items:
        total.update(script_counts(item.text))
    letters = max(total.total(), 1)
    _bars(axis, {name.title(): 100 * count / letters for name, count in total.most_common(_MOST_BARS)})
    axis.set_title(f"script: {len(flagged['script'])} items flagged")
    axis.set_xlabel("% of the letters")


def _bars(axis: Any, values: Mapping[str, float]) -> None:
    names = [name if len(name) <= 18 else name[:17] + "…" for name in values]
    axis.barh(range(len(names)), list(values.values()), color=FINE, height=0.6)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(max(len(names), 4) - 0.4, -0.6)


PANELS: Mapping[str, Panel] = {
    "duration": durations,
    "rate": rates,
    "outlier": text_against_audio,
    "loudness": loudness,
    "silence": silences,
    "clipping": clipping,
    "bandwidth": bandwidths,
    "spectrum": spectra,
    "speakers": speakers,
    "script": scripts,
}
"""File name without .png -> what is drawn."""
