"""Test lists: what evaluation is to speak, decode or re-score, read from lhotse cuts, Seed-TTS lists or JSONL."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kalle.audio import Audio, read_with_rate, resample
from kalle.data.corpus.lists import COLUMNS
from kalle.errors import UserError
from kalle.files import lines_of, refuse_other_formats, text_of
from kalle.text.languages import language_of_name

CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff"
WORDS = re.compile(rf"[{CJK}]|[^\W{CJK}]+(?:['’][^\W{CJK}]+)*")
AudioLoader = Callable[[int], tuple[Audio, int]]
MAX_NAME_BYTES = 200
"""Room for a suffix in the 255 bytes that file systems give a name."""
MAX_SECONDS = 1e6
LONGEST_RECORDING_S = 3600.0
"""Of what is scored; at 16 kHz it takes 230 MB, and a small file may hold days of silence."""
_USUAL_NAMES = ("text", "audio", "speaker", "language", "id", "split")
"""Keys that a JSONL list may name as other tools do (`COLUMNS`); a duration is stated under its own name alone."""
_DAMAGED = (ValueError, RecursionError)
_UNPRINTABLE = re.compile("[\0\ud800-\udfff]")


def read_scored(path: str | Path, sample_rate_hz: int) -> tuple[Audio, int]:
    """A file that is to be scored, mono float32 (S,), and the rate in Hz at which it is stored.

    A UserError as `read_audio`, and when it is longer than `LONGEST_RECORDING_S`.
    """
    return read_with_rate(path, sample_rate_hz, LONGEST_RECORDING_S)


@dataclass(frozen=True)
class TestItem:
    """One line of a test list. A path that does not exist stays in the list, so that scoring counts it as an error."""

    __test__ = False  # the name starts with Test, and pytest would collect it

    id: str
    text: str
    audio_path: Path | None = None
    """The recording of ``text``; None when the list has none."""
    speaker: str | None = None
    language: str = "en"
    """Two-letter code; "" where the list states none, until ``read_test_list`` fills it."""
    duration_s: float | None = None
    """Length of the recording in seconds, where the list states it."""
    prompt_text: str | None = None
    prompt_path: Path | None = None
    split: str | None = None
    """This item's split, for a list that holds several."""
    loader: AudioLoader | None = field(default=None, repr=False, compare=False)
    """Reads the recording at a rate in Hz, and tells the stored rate, where it is a part of a file; None reads all of ``audio_path``."""

    def audio(self, sample_rate_hz: int = 16000) -> Audio:
        """The recording, mono float32 (S,). UserError when it is missing, unreadable or not in the list."""
        return self.recording(sample_rate_hz)[0]

    def recording(self, sample_rate_hz: int = 16000) -> tuple[Audio, int]:
        """``audio``, and the rate in Hz at which it is stored."""
        if self.audio_path is None:
            raise UserError(f"no recording for '{self.id}': got text only, expected a list with audio; add the recording")
        return self.loader(sample_rate_hz) if self.loader is not None else read_scored(self.audio_path, sample_rate_hz)

    def prompt_audio(self, sample_rate_hz: int = 16000) -> Audio:
        """The prompt's recording, mono float32 (S,). UserError when it is missing, unreadable or not in the list."""
        if self.prompt_path is None:
            raise UserError(f"no prompt for '{self.id}': expected a prompt recording in the list; use a Seed-TTS list or prompts=none")
        return read_scored(self.prompt_path, sample_rate_hz)[0]

    @property
    def file_stem(self) -> str:
        """The id as a file name without its suffix: path separators become underscores."""
        stem = self.id[:-4] if self.id.endswith(".wav") else self.id
        return re.sub(r"[\\/:]", "_", stem).lstrip(".") or "_"


@dataclass(frozen=True)
class TestList:
    """The items to score, and how many lines of ``source`` were left out for which reason."""

    __test__ = False

    source: Path
    items: list[TestItem]
    left_out: dict[str, int]


@dataclass(frozen=True)
class TestListConfig:
    """A test list, and the items of it that are scored."""

    __test__ = False

    path: str | Path
    """``*.jsonl.gz``, a folder with ``cuts_test.jsonl.gz``, ``*.lst`` or ``*.jsonl``; see ``read_test_list``."""
    min_words: int = 4
    """Shorter texts are left out and counted, for one word says little about a WER; a CJK character is a word."""
    limit: int | None = None
    """Items scored at most."""
    language: str | None = None
    """Of the texts for which the list states none: a two-letter code or an English name. None is English, and refuses other letters."""


def read_test_list(config: TestListConfig | str | Path, min_words: int = 4, limit: int | None = None) -> TestList:
    """Read a test list; its format follows from the name. A path alone takes ``min_words`` and ``limit`` beside it.

    ``*.jsonl.gz``, or a folder with ``cuts_test.jsonl.gz``: lhotse cuts. ``*.lst``: Seed-TTS lists, ``utt|text``, ``utt|text|prompt_wav``,
    ``utt|prompt_text|prompt_wav|text[|recording]``; wavs relative to the list's folder. ``*.jsonl``: objects with ``text`` and optionally
    ``id, audio, speaker, language, duration, prompt_text, prompt_audio, split``, or the names that `COLUMNS` has for these; the same
    paths; other keys are not read. Items of a split other than "test", of fewer than ``min_words`` words (a CJK character is one) and
    beyond the first ``limit`` are left out and counted. UserError for a missing, malformed or empty list, for ids (or the file names made
    from them) that repeat, and for texts in letters that are not Latin whose language neither the list nor the configuration states:
    scored as English they would count as one word.
    """
    if not isinstance(config, TestListConfig):
        config = TestListConfig(config, min_words, limit)
    source = Path(config.path)
    source = source / "cuts_test.jsonl.gz" if source.is_dir() else source
    if not source.is_file():
        raise UserError(f"test list not found: got '{config.path}', expected a .jsonl.gz, .lst or .jsonl file; run `kalle prepare`")
    if config.limit is not None and config.limit < 1:
        raise UserError(f"limit: got {config.limit}, expected at least 1 or none; correct it")
    items = _with_language(source, list(_reader(source)(source)), config.language)
    tests = [item for item in items if (item.split or "test").lower() == "test"]
    long_enough = [item for item in tests if count_words(item.text) >= config.min_words]
    kept = long_enough[: config.limit]
    reasons = {
        "of another split": len(items) - len(tests),
        f"fewer than {config.min_words} words": len(tests) - len(long_enough),
        "beyond the limit": len(long_enough) - len(kept),
    }
    if not kept:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "no lines"
        remedy = "set their split to test" if items and not tests else "lower testset.min_words"
        raise UserError(f"empty test list: '{source}' has {len(items)} items, none to test ({counts}); {remedy}")
    _check_unique(source, kept)
    return TestList(source, kept, {reason: count for reason, count in reasons.items() if count})


def count_words(text: str) -> int:
    """Words of ``text``: runs of letters and digits with inner apostrophes, and every CJK character or kana alone."""
    return len(WORDS.findall(text))


def _with_language(source: Path, items: list[TestItem], language: str | None) -> list[TestItem]:
    """``items``, those whose language the list does not state in ``language``."""
    unstated = [item for item in items if not item.language]
    foreign = [item for item in unstated if language is None and _has_other_letters(item.text)]
    if foreign:
        chinese = any(re.search(rf"[{CJK}]", item.text) for item in foreign)
        needs = ", and a WER of Chinese needs the package zhconv (pip install zhconv)" if chinese and not find_spec("zhconv") else ""
        raise UserError(
            f"language not stated: {len(foreign)} texts of '{source}' are not in Latin letters, the first is '{foreign[0].id}'; "
            f"set testset.language={'zh' if chinese else 'CODE'}{needs}"
        )
    code = language_of_name(language or "en")
    return [item if item.language else replace(item, language=code) for item in items]


def _has_other_letters(text: str) -> bool:
    return any(character.isalpha() and not unicodedata.name(character, "LATIN").startswith("LATIN") for character in text)


def _reader(source: Path) -> Callable[[Path], Iterator[TestItem]]:
    for suffix, reader in ((".jsonl.gz", _read_cuts), (".lst", _read_seed_tts), (".jsonl", _read_jsonl)):
        if source.name.endswith(suffix):
            return reader
    raise UserError(f"unknown test list: got '{source}', expected .jsonl.gz (lhotse cuts), .lst (Seed-TTS) or .jsonl; rename it")


def _check_unique(source: Path, items: list[TestItem]) -> None:
    repeated = [stem for stem, count in Counter(item.file_stem for item in items).items() if count > 1]
    if repeated:
        raise UserError(f"repeated ids in '{source}': {', '.join(repeated[:5])} ({len(repeated)}), expected unique ones; rename them")


def _read_cuts(source: Path) -> Iterator[TestItem]:
    from kalle.data.corpus.cuts import read_cuts

    yield from (_from_cut(cut, source) for cut in read_cuts(source))


def _from_cut(cut: Any, source: Path) -> TestItem:
    if len(cut.supervisions) != 1:
        raise UserError(f"cut '{cut.id}' in '{source}': got {len(cut.supervisions)} supervisions, expected one; prepare the corpus again")
    sources = 0 if getattr(cut, "recording", None) is None else len(cut.recording.sources)
    if sources != 1:
        raise UserError(f"cut '{cut.id}' in '{source}': got {sources} recordings, expected one file; prepare the corpus again")
    supervision = cut.supervisions[0]
    return TestItem(
        id=cut.id,
        text=supervision.text or "",
        audio_path=Path(cut.recording.sources[0].source),
        speaker=supervision.speaker,
        language=language_of_name(supervision.language or ""),
        duration_s=cut.duration,
        loader=lambda rate_hz: _cut_audio(cut, rate_hz),
    )


def _cut_audio(cut: Any, sample_rate_hz: int) -> tuple[Audio, int]:
    from kalle.data.corpus.cuts import load_audio

    path = Path(cut.recording.sources[0].source)
    if cut.start == 0 and abs(cut.duration - cut.recording.duration) < 1 / cut.recording.sampling_rate:
        return read_scored(path, sample_rate_hz)
    return resample(load_audio(cut, cut.sampling_rate), cut.sampling_rate, sample_rate_hz), cut.sampling_rate


def _read_seed_tts(source: Path) -> Iterator[TestItem]:
    for number, line in _lines(source):
        try:
            fields = [value.strip() for value in next(csv.reader([line], delimiter="|", quoting=csv.QUOTE_NONE))]
        except csv.Error as error:  # a field of 131,072 characters
            raise _bad_line(source, number, f"is no line of a table ({error})") from None
        if len(fields) not in (2, 3, 4, 5):
            raise _bad_line(source, number, f"got {len(fields)} fields, expected 2 to 5 separated by '|'")
        names = {2: ("id", "text"), 3: ("id", "text", "prompt_audio")}.get(
            len(fields), ("id", "prompt_text", "prompt_audio", "text", "audio")
        )
        yield _item(source, number, dict(zip(names, fields, strict=False)))


def _read_jsonl(source: Path) -> Iterator[TestItem]:
    for number, line in _lines(source):
        try:
            row = json.loads(line, strict=False)
        except _DAMAGED as error:  # also numbers of thousands of digits and deep nesting
            raise _bad_line(source, number, f"is not JSON ({' '.join(str(error).split())[:120]})") from None
        if isinstance(row, dict):
            row = {**row, **{kind: row[name] for kind in _USUAL_NAMES if kind not in row and (name := _named(row, kind))}}
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise _bad_line(source, number, f"got {line[:80]!r}, expected an object with a text")
        yield _item(source, number, row)


def _named(row: Mapping[str, Any], kind: str) -> str | None:
    """The key under which another tool's list holds ``kind``."""
    return next((name for name in COLUMNS[kind] if name in row), None)


def _item(source: Path, number: int, row: Mapping[str, Any]) -> TestItem:
    """The item of one line; a UserError names the field that is of another type, or that no file or report can hold."""
    strings: dict[str, str | None] = {}
    for name in ("text", "audio", "speaker", "language", "prompt_text", "prompt_audio", "split"):
        value = row.get(name)
        if not isinstance(value, str | None):
            raise _bad_line(source, number, f"{name}: got {value!r:.60}, expected a string or nothing")
        strings[name] = value
    identifier = row.get("id")
    if identifier in (None, ""):
        identifier = Path(strings["audio"]).stem if strings["audio"] else number
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise _bad_line(source, number, f"id: got {identifier!r:.60}, expected a string or a whole number")
    for name, value in {**strings, "id": str(identifier)}.items():
        if value is not None and _UNPRINTABLE.search(value):
            raise _bad_line(source, number, f"{name}: got {value!r:.60} with a NUL or half of a character, expected text")
    duration = row.get("duration")
    if duration is not None and not (type(duration) in (int, float) and 0 <= duration < MAX_SECONDS):
        raise _bad_line(source, number, f"duration: got {duration!r:.60}, expected seconds, at least 0")
    item = TestItem(
        id=str(identifier),
        text=strings["text"] or "",
        audio_path=_beside(source, strings["audio"]),
        speaker=strings["speaker"],
        language=language_of_name(strings["language"] or ""),
        duration_s=duration,
        prompt_text=strings["prompt_text"],
        prompt_path=_beside(source, strings["prompt_audio"]),
        split=strings["split"],
    )
    if len(item.file_stem.encode()) > MAX_NAME_BYTES:
        raise _bad_line(source, number, f"id: got {len(item.file_stem.encode())} bytes, expected at most {MAX_NAME_BYTES} for a file name")
    return item


def _bad_line(source: Path, number: int, problem: str) -> UserError:
    return UserError(f"line {number} of '{source}': {problem}; correct the line")


def _beside(source: Path, name: str | None) -> Path | None:
    return source.parent / name if name else None


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    content = source.read_bytes()
    refuse_other_formats(source, content)
    try:
        lines = lines_of(text_of(content))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: '{source}' ({error}); save the list as UTF-8") from None
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


USUAL_SECONDS = 5.0
"""Long enough to hear a voice in, short enough to leave a small model its context."""
MIN_WORDS = 4


def choose_prompt(items: Sequence[TestItem], seconds: float = USUAL_SECONDS, speaker: str | None = None) -> TestItem:
    """The recording of ``items`` whose length is nearest to ``seconds``; of equally near ones the first by id.

    Only those of ``speaker`` (of anybody, when None) with a stated length and a text of `MIN_WORDS` words count, for a single word tells
    little of a voice. UserError when there is none.
    """
    usable = [
        item
        for item in items
        if item.audio_path is not None and speaker in (None, item.speaker) and count_words(item.text) >= MIN_WORDS and item.duration_s
    ]
    if not usable:
        whose = "anybody" if speaker is None else f"'{speaker}'"
        raise UserError(
            f"no prompt: got {len(items)} items, expected a recording of {whose} with a text of {MIN_WORDS} words and a stated length; "
            "give another list"
        )
    return min(usable, key=lambda item: (abs((item.duration_s or 0.0) - seconds), item.id))
