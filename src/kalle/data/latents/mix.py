"""Corpora mixed by weight.

An epoch takes weight * items of each source: a weight below 1 draws a fresh random part of it every epoch, a weight above 1
repeats it, its fraction drawn afresh. Draws are stratified by the length groups of a sampler, so that every epoch has the same number
of batches.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kalle.errors import UserError

logger = logging.getLogger(__name__)
EQUAL = "equal"
Draw = Callable[[np.random.Generator], np.ndarray]
"""The samples of one group in one epoch."""
SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class MixPart:
    """One corpus of a mix."""

    path: str
    weight: float | None = None
    """Samples an epoch for each of its items; 1 by default."""
    share: float | None = None
    """Part of the epoch's samples, instead of a weight."""


def mix_parts(value: Any, key: str, mix: str | None = None) -> tuple[MixPart, ...]:
    """The sources that a configuration value names: a path, a list of paths, or of ``{path, weight}`` or ``{path, share}``.

    ``key`` is what the user wrote it for. UserError for anything else, and for weights and shares that make no epoch.
    """
    entries = [value] if isinstance(value, str | Path | Mapping) else list(value or [])
    sources = tuple(_mix_part(entry, key) for entry in entries)
    if not sources:
        raise UserError(f"{key}: got an empty list, expected at least one folder; name one")
    paths = [source.path for source in sources]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{key}: got '{twice}' twice, expected every folder once; give it a weight of 2 to take it twice")
    shares = [source.share for source in sources if source.share is not None]
    if shares and (len(shares) < len(sources) or abs(sum(shares) - 1) > SHARE_TOLERANCE):
        raise UserError(f"{key}: got shares {shares} for {len(sources)} folders, expected one each, 1 in sum; correct them")
    if mix not in (None, EQUAL):
        raise UserError(f"data.mix: got {mix!r}, expected null or '{EQUAL}'; correct it")
    if mix == EQUAL and any(source.weight is not None or source.share is not None for source in sources):
        raise UserError(f"data.mix={EQUAL}: got weights or shares in {key} too, expected only paths; leave one of them out")
    return sources


def _mix_part(entry: Any, key: str) -> MixPart:
    if isinstance(entry, str | Path):
        return MixPart(str(entry))
    if not isinstance(entry, Mapping) or "path" not in entry or not set(entry) <= {"path", "weight", "share"}:
        raise UserError(f"{key}: got {entry!r}, expected a folder, {{path, weight}} or {{path, share}}; correct it")
    values = {name: entry[name] for name in ("weight", "share") if entry.get(name) is not None}
    for name, number in values.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise UserError(f"{key}: got {name}={number!r} for '{entry['path']}', expected a number above 0; correct it")
    if len(values) > 1:
        raise UserError(f"{key}: got a weight and a share for '{entry['path']}', expected one of them; leave one out")
    return MixPart(str(entry["path"]), **values)


def weights_of(sources: Sequence[MixPart], items: Sequence[int], mix: str | None = None) -> tuple[float, ...]:
    """The weight of each source, which has so many ``items``.

    Shares, and ``mix`` "equal", make the longest epoch in which no item comes twice: "equal" takes as many items of each source as the
    smallest has.
    """
    empty = [source.path for source, count in zip(sources, items, strict=True) if not count]
    if empty:
        raise UserError(f"a mix with nothing of '{empty[0]}': got no items, expected at least one; raise the limits or leave it out")
    shares = [1 / len(sources)] * len(sources) if mix == EQUAL else [source.share for source in sources]
    if all(share is None for share in shares):
        return tuple(1.0 if source.weight is None else float(source.weight) for source in sources)
    parts = [float(share or 0) for share in shares]
    epoch = min(count / part for count, part in zip(items, parts, strict=True))
    return tuple(part * epoch / count for part, count in zip(parts, items, strict=True))


def mix_of(sources: Sequence[MixPart], source: np.ndarray, mix: str | None, unit: str) -> Mix | None:
    """The mix of the items whose numbers of source are ``source`` (N,); None when each one comes once. Says what it holds."""
    counts = np.bincount(source, minlength=len(sources)).tolist()
    mixed = Mix(source, weights_of(sources, counts, mix))
    if len(sources) > 1:
        parts = zip(mixed.samples(), counts, sources, strict=True)
        logger.info("an epoch takes %s", "; ".join(f"{samples} of the {count} {unit} of '{one.path}'" for samples, count, one in parts))
    return None if all(weight == 1 for weight in mixed.weights) else mixed


class Mix:
    """How often an epoch takes which item.

    ``source`` (N,) is the source of each item, ``weights`` (S,) the samples an epoch for each item of a source.
    """

    def __init__(self, source: np.ndarray, weights: Sequence[float]) -> None:
        self.source, self.weights = source, tuple(weights)

    def samples(self) -> list[int]:
        """Samples an epoch of each source: its weight times its items, rounded, and at least one."""
        counts = np.bincount(self.source, minlength=len(self.weights))
        return [max(1, round(weight * int(count))) if count else 0 for weight, count in zip(self.weights, counts, strict=True)]

    def draws(self, groups: Sequence[np.ndarray]) -> list[Draw]:
        """For each group of item indices the draw of its samples, of a length that does not depend on the epoch."""
        parts: list[list[tuple[np.ndarray, int]]] = [[] for _ in groups]
        for number, samples in enumerate(self.samples()):
            members = [group[self.source[group] == number] for group in groups]
            for place, count in enumerate(apportioned(samples, [len(part) for part in members])):
                if count:
                    parts[place].append((members[place], count))
        return [functools.partial(_draw, part, len(self.source)) for part in parts]


def _draw(parts: Sequence[tuple[np.ndarray, int]], items: int, generator: np.random.Generator) -> np.ndarray:
    """``count`` samples of each part; the n-th repetition of an item is its index + n * ``items``."""
    drawn: list[np.ndarray] = [np.zeros(0, np.int64)]
    for members, count in parts:
        repeats, rest = divmod(count, len(members))
        drawn += [members + number * items for number in range(repeats)]
        if rest:
            drawn.append(generator.permutation(members)[:rest] + repeats * items)
    return np.concatenate(drawn)


def apportioned(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` split in proportion to ``sizes``, by largest remainder, the first of equals preferred."""
    whole = sum(sizes)
    if not whole:
        return [0] * len(sizes)
    counts = [total * size // whole for size in sizes]
    remainders = [total * size % whole for size in sizes]
    for place in sorted(range(len(sizes)), key=lambda place: -remainders[place])[: total - sum(counts)]:
        counts[place] += 1
    return counts


COMMON = ("encoder_hash", "latent_dim", "sample_rate_hz", "hop_length", "frame_rate_hz")
TRAIN = "train"


def check_common(infos: Mapping[str, Mapping[str, Any]]) -> None:
    """A UserError unless all folders, given with their info.json, hold latents of one encoder."""
    (first, reference), *others = infos.items()
    for path, info in others:
        for key in COMMON:
            if info[key] != reference[key]:
                raise UserError(
                    f"latents that do not mix: {key} is {str(reference[key])[:12]} in '{first}' but {str(info[key])[:12]} in '{path}'; "
                    "encode both with the same Flow-VAE"
                )


def mixed_info(infos: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """The info.json that a folder of the mix would have, as far as training asks.

    ``weights`` are samples an epoch for each training item. "mean" and "std" are those of a training frame drawn from the mix: with f_i
    frames of weight w_i, mean = sum p_i mean_i and std^2 = sum p_i (std_i^2 + mean_i^2) - mean^2, where p_i = w_i f_i / sum w_j f_j.
    """
    if len(infos) == 1:
        return dict(infos[0])
    frames = np.array([weight * info["splits"][TRAIN]["frames"] for weight, info in zip(weights, infos, strict=True)])
    parts = (frames / frames.sum())[:, None]
    means, stds = (np.array([info[key] for info in infos], dtype=np.float64) for key in ("mean", "std"))
    mean = (parts * means).sum(0)
    variance = (parts * (stds**2 + means**2)).sum(0) - mean**2
    return {
        **{key: infos[0][key] for key in COMMON},
        "speaker_mels": all(info["speaker_mels"] for info in infos),
        "total_frames": sum(info["total_frames"] for info in infos),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
    }
