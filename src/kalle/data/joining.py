"""Longer training utterances out of short ones: several cuts of one speaker, a silence between them, texts joined by a space.

Joined on waveforms, before encoding, so that the encoder sees across the join as it would in a real utterance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lhotse.cut import Cut

from kalle.data.sampling import numpy_generator
from kalle.errors import UserError


@dataclass(frozen=True)
class JoinConfig:
    """How short utterances are joined."""

    passes: int = 0
    """Different random joinings of the whole split; 0 joins nothing."""
    min_seconds: float = 3.0
    """Least length up to which a joined utterance is filled; the wanted length is drawn uniformly from here to ``max_seconds``."""
    max_seconds: float = 12.0
    """Longest joined utterance, silences included."""
    gap_seconds: tuple[float, float] = (0.1, 0.4)
    """Range of the silence between two cuts, drawn uniformly."""
    seed: int = 0
    """Seed of the joinings."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gap_seconds", tuple(self.gap_seconds))
        low, high = self.gap_seconds
        if self.passes < 0 or not 0 < self.min_seconds <= self.max_seconds or not 0 <= low <= high:
            expected = "passes >= 0, 0 < min_seconds <= max_seconds, 0 <= gap_seconds[0] <= gap_seconds[1]"
            raise UserError(f"join: got {self}, expected {expected}; correct it")


@dataclass(frozen=True)
class Utterance:
    """What is encoded as one: one cut, or several with ``gaps_samples`` zeros between neighbours (one fewer than cuts)."""

    id: str
    cuts: tuple[Cut, ...]
    gaps_samples: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The texts of all supervisions, joined by a space."""
        texts = [supervision.text or "" for cut in self.cuts for supervision in cut.supervisions]
        return " ".join(text.strip() for text in texts if text.strip())

    @property
    def speaker(self) -> str | None:
        """Speaker of the first cut; joined cuts share it."""
        return cut_field(self.cuts[0], "speaker")

    @property
    def language(self) -> str | None:
        """Language of the first cut."""
        return cut_field(self.cuts[0], "language")

    @property
    def seconds(self) -> float:
        """Duration without the gaps."""
        return float(sum(cut.duration for cut in self.cuts))

    def audio(self, sample_rate_hz: int) -> np.ndarray:
        """The waveform, float32 (S,), mono at ``sample_rate_hz``."""
        pieces = [load_audio(self.cuts[0], sample_rate_hz)]
        for gap, cut in zip(self.gaps_samples, self.cuts[1:], strict=True):
            pieces += [np.zeros(gap, np.float32), load_audio(cut, sample_rate_hz)]
        return np.concatenate(pieces)


def cut_field(cut: Cut, name: str) -> str | None:
    """``name`` of the first supervision of ``cut``; None without one."""
    return getattr(cut.supervisions[0], name) if cut.supervisions else None


def load_audio(cut: Cut, sample_rate_hz: int) -> np.ndarray:
    """The audio of ``cut`` as float32 (S,), resampled to ``sample_rate_hz``, channels averaged.

    A UserError names the cut when its audio cannot be read or holds a value that is not finite.
    """
    try:
        audio = (cut if cut.sampling_rate == sample_rate_hz else cut.resample(sample_rate_hz)).load_audio()
    except Exception as error:  # lhotse raises what its many backends raise
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"unreadable audio: cut '{cut.id}' ({reason}); run `kalle prepare` again or remove the file") from None
    mono = np.ascontiguousarray(np.atleast_2d(audio).mean(axis=0), dtype=np.float32)
    if not np.isfinite(mono).all():
        raise UserError(f"audio with NaN or infinity: cut '{cut.id}', expected finite samples; run `kalle prepare` again or remove it")
    return mono


def singles(cuts: Sequence[Cut]) -> list[Utterance]:
    """Every cut as an utterance of its own."""
    return [Utterance(cut.id, (cut,)) for cut in cuts]


def joined(cuts: Sequence[Cut], config: JoinConfig, sample_rate_hz: int) -> list[Utterance]:
    """Joinings of ``cuts`` of the same speaker: deterministic in the set of cuts and the configuration, whatever their order.

    A pass puts the cuts of a speaker in a random order and fills one utterance after another up to a length drawn uniformly
    from [min_seconds, max_seconds]; a cut that stays alone gives none, for it exists as a single already.
    """
    by_speaker: dict[str, list[Cut]] = {}
    for cut in sorted(cuts, key=lambda cut: cut.id):
        by_speaker.setdefault(cut_field(cut, "speaker") or "", []).append(cut)
    utterances: list[Utterance] = []
    for number in range(config.passes):
        for speaker in sorted(by_speaker):
            utterances += _one_pass(by_speaker[speaker], config, number, speaker, sample_rate_hz)
    return utterances


def _one_pass(cuts: list[Cut], config: JoinConfig, number: int, speaker: str, sample_rate_hz: int) -> list[Utterance]:
    generator = numpy_generator("join", config.seed, number, speaker)
    shortest, longest = (round(seconds * sample_rate_hz) for seconds in (config.min_seconds, config.max_seconds))
    low, high = (round(seconds * sample_rate_hz) for seconds in config.gap_seconds)
    groups: list[Utterance] = []
    members: list[Cut] = []
    gaps: list[int] = []
    filled = target = 0

    def close() -> None:
        if len(members) > 1:
            name = f"joined-{number}-{speaker or 'unknown'}-{len(groups):06d}"
            groups.append(Utterance(name, tuple(members), tuple(gaps)))

    for index in generator.permutation(len(cuts)):
        samples = int(np.ceil(cuts[index].duration * sample_rate_hz))
        gap = int(generator.integers(low, high + 1))
        if members and filled + gap + samples <= target:
            members.append(cuts[index])
            gaps.append(gap)
            filled += gap + samples
            continue
        close()
        members, gaps, filled = [cuts[index]], [], samples
        target = int(generator.integers(shortest, longest + 1))
    close()
    return groups
