"""The lhotse cuts of a prepared corpus: made, written, read, and their audio loaded."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.audio.backend import LibsndfileBackend, get_current_audio_backend, set_current_audio_backend
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.serialization import deserialize_item

from kalle.data.corpus.items import SPLITS
from kalle.decoding import AudioError, Span, open_audio, open_plain
from kalle.errors import UserError
from kalle.files import atomic_file, output_folder, parse_json, write_atomic

COMPLETED_NAME = ".completed"
REPORT_JSON, REPORT_MD = "report.json", "report.md"
LONGEST_CUT_SECONDS = 3600.0
"""Longest cut that is read; at 16 kHz it takes 230 MB."""
HIGHEST_RATE_HZ = 768_000
MOST_VALUES = 2**29
"""Of the audio of one cut, all channels together: 2 GiB in fp32, or an hour and a half of 96 kHz."""
_MOST_FILTER_VALUES = 2**20
"""Of a filter between two rates, all of which lhotse keeps; from 44.1 kHz to 16 kHz it has 0.1 million, from 15,999 Hz 256 million."""
_TRANSFORMS = ("Resample", "Speed", "Tempo", "Volume")
"""Changes of a recording that read no other one."""


def cuts_path(folder: Path, split: str) -> Path:
    """Where a corpus folder keeps the cuts of a split."""
    return folder / f"cuts_{split}.jsonl.gz"


def is_resampled_cheaply(from_hz: int, to_hz: int) -> bool:
    """Whether lhotse's filter from one rate to another is small; where the rates have no great common divisor it takes gigabytes."""
    divisor = math.gcd(from_hz, to_hz)
    before, after = from_hz // divisor, to_hz // divisor
    return from_hz == to_hz or after * (before + 2 * math.ceil(6 * before / (0.99 * min(before, after)))) <= _MOST_FILTER_VALUES


def make_cut(
    cut_id: str,
    audio: str,
    stored_rate_hz: int,
    stored_samples: int,
    sample_rate_hz: int,
    text: str,
    speaker: str,
    language: str,
    source: str = "",
    start_samples: int = 0,
    seconds: float | None = None,
    custom: dict[str, Any] | None = None,
) -> MonoCut:
    """One cut over a mono recording with one supervision; `load_audio()` gives (1, num_samples) at ``sample_rate_hz``.

    ``stored_rate_hz`` and ``stored_samples`` describe the file as it lies on disk; another rate is resampled on loading. ``seconds``
    from ``start_samples`` on (at the stored rate) make a cut of a part of it; None means the whole. ``custom`` goes into the cut's own.
    """
    recording = Recording(
        id=cut_id,
        sources=[AudioSource(type="file", channels=[0], source=audio)],
        sampling_rate=stored_rate_hz,
        num_samples=stored_samples,
        duration=stored_samples / stored_rate_hz,
    )
    if stored_rate_hz != sample_rate_hz:
        recording = recording.resample(sample_rate_hz)
    start = start_samples / stored_rate_hz
    duration = recording.duration if seconds is None else min(seconds, recording.duration - start)
    supervision = SupervisionSegment(
        id=cut_id, recording_id=cut_id, start=0.0, duration=duration, text=text, speaker=speaker, language=language or None
    )
    fields = {**(custom or {}), **({"source": source} if source else {})}
    return MonoCut(
        id=cut_id, start=start, duration=duration, channel=0, recording=recording, supervisions=[supervision], custom=fields or None
    )


def write_cuts(path: Path, cuts: Iterable[MonoCut]) -> int:
    """Write gzipped JSONL, the same bytes for the same cuts; returns how many."""
    count = 0
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as lines,
    ):
        for cut in cuts:
            lines.write(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n")
            count += 1
    return count


def load_cuts(corpus: str | Path, split: str) -> list[Cut]:
    """The cuts of ``split`` in the folder that ``kalle prepare`` wrote, their audio paths made absolute.

    UserError when the folder is no prepared corpus, is unfinished, or lacks the split.
    """
    root = Path(corpus).resolve()
    if not (root / ".completed").is_file():
        raise UserError(
            f"not a prepared corpus: got '{corpus}', expected cuts_*.jsonl.gz and .completed in it; run `kalle prepare` to the end"
        )
    path = root / f"cuts_{split}.jsonl.gz"
    if not path.is_file():
        found = splits_of(root)
        raise UserError(
            f"no split '{split}' in '{corpus}': found {', '.join(found) or 'none'}; name one of them or run `kalle prepare` again"
        )
    return read_cuts(path)


_OF_VALUES = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
"""Raised by lhotse for values that it did not expect."""


def read_cuts(path: Path) -> list[Cut]:
    """The cuts in a .jsonl.gz file, their audio paths counted from its folder. Every cut is read here.

    A corpus is something that people download. UserError for a damaged file, and for a cut that names anything but audio files: lhotse
    would run a recording of type "command" and fetch one of type "url", also inside an augmentation or a custom field.
    """
    cuts: list[Cut] = []
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    row = parse_json(line)
                    _check_recordings(row)
                    # A path that is absolute already stays as it is: pathlib drops what stands before it.
                    cuts.append(_checked(deserialize_item(row)).with_recording_path_prefix(path.parent))
    except (OSError, EOFError, zlib.error, RecursionError, *_OF_VALUES) as error:
        reason = " ".join(f"{error}".split())[:200] or type(error).__name__
        got = f"cannot read '{path}' line {number}: {reason}"
        raise UserError(f"{got}; expected lhotse cuts of audio files; prepare the corpus again") from None
    return cuts


def _check_recordings(value: Any) -> None:
    """A ValueError when any recording in the JSON ``value``, however deep, is not one of files, or is changed by more than its rate."""
    if isinstance(value, list):
        for one in value:
            _check_recordings(one)
    if not isinstance(value, dict):
        return
    for source in value.get("sources") or () if isinstance(value.get("sources"), list) else ():
        kind, place = (source.get("type"), source.get("source")) if isinstance(source, dict) else (None, None)
        if kind is None and isinstance(source, str):
            continue  # ids of cuts that were joined
        if kind != "file" or not isinstance(place, str) or "\0" in place:
            raise ValueError(f"got a recording of type '{kind}', expected an audio file")
    for change in value.get("transforms") or () if isinstance(value.get("transforms"), list) else ():
        name = change.get("name") if isinstance(change, dict) else None
        if name not in _TRANSFORMS:
            raise ValueError(f"got a recording with the transform '{name}', expected one of {', '.join(_TRANSFORMS)}")
    for from_hz, to_hz in _rate_pairs(value):
        _check_pair(from_hz, to_hz)
    for one in value.values():
        _check_recordings(one)


def _rate_pairs(recording: dict[str, Any]) -> list[tuple[int, int]]:
    """The rates between which the transforms of a recording, as JSON, resample; whatever is no number is left to lhotse."""
    changes = recording.get("transforms")
    named = [(one["name"], one.get("kwargs")) for one in changes if isinstance(one, dict)] if isinstance(changes, list) else []
    given = [(name, kwargs) for name, kwargs in named if isinstance(kwargs, dict)]
    pairs = [(kwargs.get("source_sampling_rate"), kwargs.get("target_sampling_rate")) for name, kwargs in given if name == "Resample"]
    rate = pairs[0][0] if pairs else recording.get("sampling_rate")  # of what the next transform gets
    for name, kwargs in given:
        if name == "Resample":
            rate = kwargs.get("target_sampling_rate")
        elif name == "Speed" and _is_number(rate) and _is_number(factor := kwargs.get("factor")):
            pairs.append((rate * factor, rate))
    return [(round(from_hz), round(to_hz)) for from_hz, to_hz in pairs if _is_number(from_hz) and _is_number(to_hz)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) <= _GREATEST


def _check_pair(from_hz: int, to_hz: int) -> None:
    if not (0 < from_hz <= HIGHEST_RATE_HZ and 0 < to_hz <= HIGHEST_RATE_HZ):
        raise ValueError(f"got a recording that is resampled from {from_hz:g} to {to_hz:g} Hz, expected up to {HIGHEST_RATE_HZ} Hz")
    if not is_resampled_cheaply(from_hz, to_hz):
        raise ValueError(f"from {from_hz} to {to_hz} Hz lhotse resamples with a filter of gigabytes; expected audio at {to_hz} Hz")


_GREATEST = 1e300
"""Beyond any time or rate: a whole number of JSON may be too great for a float."""


def _checked(cut: Any) -> Cut:
    """``cut`` when its times are possible and its texts are texts; else a ValueError."""
    if not isinstance(cut, Cut):
        raise ValueError(f"got a {type(cut).__name__}, expected a cut")
    numbers = [getattr(cut, "start", 0.0), cut.duration, cut.sampling_rate, *((one.start, one.duration) for one in cut.supervisions)]
    flat = [number for part in numbers for number in (part if isinstance(part, tuple) else (part,))]
    if not all(isinstance(number, int | float) and abs(number) <= _GREATEST for number in flat):
        raise ValueError(f"cut '{cut.id}' has impossible times")
    if not 0 < cut.duration <= LONGEST_CUT_SECONDS or getattr(cut, "start", 0.0) < 0 or not 0 < cut.sampling_rate <= HIGHEST_RATE_HZ:
        raise ValueError(f"cut '{cut.id}' is {cut.duration:g} s at {cut.sampling_rate:g} Hz, expected up to {LONGEST_CUT_SECONDS:g} s")
    parts = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    padding = [one.num_samples for one in parts if isinstance(one, PaddingCut)]
    if max([cut.duration * cut.sampling_rate, *(number if _is_number(number) else math.inf for number in padding)]) > MOST_VALUES:
        raise ValueError(f"cut '{cut.id}' has more than {MOST_VALUES} samples")
    texts = [cut.id, *(text for one in cut.supervisions for text in (one.text, one.speaker, one.language) if text is not None)]
    if not cut.id or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"cut '{cut.id}' has a text, speaker or language that is no string")
    return cut


def splits_of(corpus: str | Path) -> list[str]:
    """The names of the splits of a corpus folder, sorted; none when it isn't one."""
    return sorted(file.name.removeprefix("cuts_").removesuffix(".jsonl.gz") for file in Path(corpus).glob("cuts_*.jsonl.gz"))


def cut_field(cut: Cut, name: str) -> str | None:
    """``name`` of the first supervision of ``cut``; None without one."""
    return getattr(cut.supervisions[0], name) if cut.supervisions else None


def load_audio(cut: Cut, sample_rate_hz: int) -> np.ndarray:
    """The audio of ``cut`` as float32 (S,), resampled to ``sample_rate_hz``, channels averaged.

    Files are decoded by `kalle.decoding`, so what crashes a decoder is such an error too. A UserError names the cut when its audio cannot
    be read or holds a value that is not finite.
    """
    if not isinstance(get_current_audio_backend(), CheckedBackend):
        set_current_audio_backend(CheckedBackend())
    try:
        for recording in _recordings(cut):
            _check_plain(recording)
        _check_pair(int(cut.sampling_rate), sample_rate_hz)
        audio = (cut if cut.sampling_rate == sample_rate_hz else cut.resample(sample_rate_hz)).load_audio()
    except Exception as error:  # lhotse raises what its backend and its own checks raise
        first: BaseException = error
        while (cause := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
            first = cause  # what lhotse puts around it says how it was called
        reason = (str(first).strip().splitlines() or [type(first).__name__])[0]
        raise UserError(f"unreadable audio: cut '{cut.id}' ({reason}); run `kalle prepare` again or remove the file") from None
    mono = np.ascontiguousarray(np.atleast_2d(audio).mean(axis=0), dtype=np.float32)
    if not np.isfinite(mono).all():
        raise UserError(f"audio with NaN or infinity: cut '{cut.id}', expected finite samples; run `kalle prepare` again or remove it")
    return mono


class CheckedBackend(LibsndfileBackend):
    """How lhotse reads audio here: by `kalle.decoding`, and of recordings in memory only PCM and FLAC.

    Others of lhotse's backends run programs, with the file's name in a line for the shell.
    """

    def read_audio(
        self, path_or_fd: Any, offset: float = 0.0, duration: float | None = None, force_opus_sampling_rate: int | None = None
    ) -> tuple[np.ndarray, int]:
        """The samples (channels, S) from ``offset`` on, ``duration`` seconds or all there are, and their rate in Hz."""
        if not isinstance(path_or_fd, str | Path):
            open_plain(path_or_fd.getvalue()).close()
            return super().read_audio(path_or_fd, offset, duration)
        # Of a whole recording lhotse asks for no duration; a file may hold more than its manifest says.
        with open_audio(Path(path_or_fd), LONGEST_CUT_SECONDS, Span(offset, duration)) as decoded:
            blocks = list(_bounded(path_or_fd, decoded.blocks))
            joined = np.concatenate(blocks or [np.zeros((0, decoded.channels), np.float32)]) if len(blocks) != 1 else blocks[0]
            return joined.T, decoded.rate_hz


def _bounded(path: Any, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    values = 0
    for block in blocks:
        values += block.size
        if values > MOST_VALUES:
            raise AudioError(f"too long: '{path}' has more than {MOST_VALUES} samples, all channels together; cut it", "too long")
        yield block


def _recordings(cut: Cut) -> list[Recording]:
    cuts = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    return [one.recording for one in cuts if getattr(one, "recording", None) is not None]


def _check_plain(recording: Recording) -> None:
    """A ValueError unless every source is a plain file, or audio in memory: reading a pipe or a device may never end."""
    for source in recording.sources:
        if source.type == "memory":
            continue
        if source.type != "file":
            raise ValueError(f"got a recording of type '{source.type}', expected an audio file")
        if not stat.S_ISREG(Path(str(source.source)).stat().st_mode):
            raise ValueError(f"'{source.source}' is no plain file")


def corpus_cuts(corpus: Path) -> dict[tuple[str, str], Cut]:
    """All cuts of a prepared corpus by (split, id), audio paths absolute; a UserError as `load_cuts`, or for an id that comes twice."""
    found = {path.name.removeprefix("cuts_").removesuffix(".jsonl.gz") for path in corpus.glob("cuts_*.jsonl.gz")}
    splits = [*[split for split in SPLITS if split in found], *sorted(found - set(SPLITS))]
    cuts: dict[tuple[str, str], Cut] = {}
    for split in splits or ["train"]:
        for cut in load_cuts(corpus, split):
            if (split, cut.id) in cuts:
                raise UserError(f"cut ids must differ: got '{cut.id}' twice in the split '{split}' of '{corpus}'; prepare it again")
            cuts[split, cut.id] = cut
    if not cuts:
        raise UserError(f"nothing to examine: '{corpus}' holds no cuts; run `kalle prepare` on recordings")
    return cuts


MADE_BY = "made_by"


def corpus_digest(corpus: Path) -> str:
    """SHA-256 (hex) of the marker and of all cuts of a prepared corpus: what a derived one was made from."""
    digest = hashlib.sha256()
    for path in [corpus / COMPLETED_NAME, *sorted(corpus.glob("cuts_*.jsonl.gz"))]:
        digest.update(path.name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def check_target(out: Path, corpus: Path, made_by: str, others: Sequence[str] = ()) -> None:
    """A UserError unless ``out`` is new, empty, or an earlier result of ``made_by``; an interrupt may have left files called ``others``."""
    if out.resolve() == corpus.resolve():
        raise UserError(f"'{out}' is the corpus itself: expected another folder for the new one; nothing is changed in place")
    if not out.exists() or {path.name for path in out.iterdir()} <= set(others):
        return
    report = out / REPORT_JSON
    try:
        made = parse_json(report.read_bytes()).get(MADE_BY)
    except (OSError, ValueError):
        made = None
    if made != made_by:
        raise UserError(
            f"'{out}' holds something else: expected a new or empty folder, or an earlier result of `{made_by}`; choose another"
        )


def write_derived(
    out: Path, cuts: Mapping[str, Sequence[Cut]], report: dict[str, Any], markdown: str, made_by: str, fingerprint: str
) -> None:
    """Write the cuts of every split, report.json, report.md and, last of all, .completed.

    UserError when nothing is left.
    """
    if not any(cuts.values()):
        raise UserError(f"nothing would be left in '{out}': {_counts(cuts)}; loosen the limits or correct the corpus")
    with output_folder(out):
        (out / COMPLETED_NAME).unlink(missing_ok=True)
        for split in dict.fromkeys((*SPLITS, *cuts)):
            write_cuts(cuts_path(out, split), cuts.get(split, ()))  # type: ignore[arg-type]
        write_atomic(out / REPORT_JSON, json.dumps({MADE_BY: made_by, **report}, indent=2, ensure_ascii=False) + "\n")
        write_atomic(out / REPORT_MD, markdown)
        write_atomic(out / COMPLETED_NAME, fingerprint + "\n")


def _counts(cuts: Mapping[str, Sequence[Cut]]) -> str:
    return ", ".join(f"{len(found)} items in {split}" for split, found in cuts.items()) or "no items"
