"""The form in which every reader returns a corpus: source items, rejections, splits; and the table of the readers."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kalle.errors import UserError
from kalle.text.languages import language_code, language_of_name

REASONS = (
    "missing",
    "bad entry",
    "unreadable",
    "empty",
    "not finite",
    "outside the recording",
    "too short",
    "too long",
    "clipped",
    "silent",
    "no text",
    "not speech",
    "duplicate id",
)
UNKNOWN_SPEAKER = "unknown"
# A remark about the sound rather than words that are spoken: [@], (simple tone plays), <beep>.
ANNOTATION = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")
OUTER = re.compile(rf"^(\s*({ANNOTATION.pattern}))+|(({ANNOTATION.pattern})\s*)+$")
# The whole text is a tag such as [noise] or <beep>; parentheses may well be spoken.
TAG = re.compile(r"\s*(\[[^\]]*\]|<[^>]*>)\s*")
AUDIO_SUFFIXES = frozenset(
    (
        *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".webm", ".aif", ".aiff", ".au", ".g722", ".mp4"),
        *(".caf", ".w64", ".rf64", ".aifc", ".oga", ".sph", ".voc", ".wv", ".tta"),
        *(".3gp", ".3g2", ".mka", ".mkv", ".mov", ".m4b", ".amr", ".mp2", ".ac3", ".eac3"),
    )
)
"""Of the formats that `kalle.decoding` reads, the last ones by PyAV."""
_LONGEST_ID_BYTES = 120
"""Of a name that becomes an id: file names may have 255, and get a suffix."""
_MARK_DIGITS = 8
_LARGEST_NUMBER = 2**63


@dataclass(frozen=True, slots=True)
class TarMember:
    """A recording in an uncompressed tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int

    def read(self, path: Path) -> bytes:
        """The member's bytes; an OSError or EOFError when the archive is shorter than it was."""
        with path.open("rb") as archive:
            archive.seek(self.offset)
            content = archive.read(self.size)
        if len(content) != self.size:
            raise EOFError(f"'{path}' ends inside {self.name}")
        return content


@dataclass(frozen=True, slots=True)
class ArrowCell:
    """The audio of one row of an Arrow stream file, as Hugging Face datasets stores it: {"bytes", "path"}."""

    name: str
    column: str
    row: int

    def read(self, path: Path) -> bytes:
        """The encoded audio; EOFError when the row holds none."""
        cell = _arrow_column(path, self.column)[self.row].as_py()
        content: bytes | None = cell.get("bytes") if cell else None
        if not content:
            raise EOFError(f"row {self.row} of '{path}' holds no audio")
        return content


@lru_cache(maxsize=4)
def _arrow_column(path: Path, column: str) -> Any:
    """A column of a file that is mapped into memory, not read."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()[column]


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One recording and its text, before anything is known of its sound.

    A reader gives ``id`` as the corpus names the item, and ``origin`` where that name may stand for several; `collected` makes ids of
    both. ``start_s`` and ``duration_s`` (None: to the end) make it a part of a longer recording, ``channel`` one channel of several
    (None: their mean). ``inside`` says where in the file ``audio`` the recording lies when that file holds many. ``custom`` goes into
    the cut.
    """

    id: str
    audio: Path
    text: str
    speaker: str = UNKNOWN_SPEAKER
    language: str = ""
    split: str | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    channel: int | None = None
    inside: TarMember | ArrowCell | None = None
    custom: dict[str, Any] | None = None
    origin: str = ""

    @property
    def is_segment(self) -> bool:
        """Whether the item is a part of its recording."""
        return self.start_s > 0 or self.duration_s is not None

    @property
    def place(self) -> str:
        """The recording's path, with its name inside that file where it lies in one."""
        return str(self.audio) if self.inside is None else f"{self.audio}:{self.inside.name}"


@dataclass(frozen=True)
class Rejection:
    """An item that is left out, and why (one of `REASONS`)."""

    id: str
    audio: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        assert self.reason in REASONS, self.reason


@dataclass(frozen=True)
class Source:
    """A corpus as a reader found it: ``notes`` go into the report as they are."""

    name: str
    items: list[SourceItem]
    rejected: list[Rejection] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    lists: tuple[Path, ...] = ()
    """Files that the reader read and whose names a corpus folder could have, too."""


def collected(
    corpus: str, items: Iterable[SourceItem], rejected: list[Rejection], notes: dict[str, object] | None = None, name: str | None = None
) -> Source:
    """A Source named ``name`` (else ``corpus``) with ids that are distinct and usable as file names; a UserError when nothing is in it.

    A second item with the same id and origin is rejected as "duplicate id". Different ones whose file names would be the same get a
    mark of their whole name. An item whose name or text is not Unicode is rejected: neither could be written down. Languages become ISO
    639 codes, and those that are none are counted in the notes.
    """
    kept: dict[tuple[str, str], SourceItem] = {}
    unknown: Counter[str] = Counter()
    for item in items:
        strange = next((value for value in (item.place, item.id, item.text, item.speaker, item.language) if not _is_unicode(value)), None)
        if strange is not None:
            reason = "unreadable" if strange == item.place else "bad entry"
            rejected.append(Rejection(item.id, item.place, reason, f"got '{strange}', which is not UTF-8; rename or convert it"))
            continue
        language = language_of_name(item.language)
        unknown[language] += bool(language) and language_code(language) is None
        known = replace(item, language=language)
        if (first := kept.setdefault((item.id, item.origin), known)) is not known:
            rejected.append(Rejection(item.id, str(item.audio), "duplicate id", f"the id of '{first.audio}'"))
    if not kept and not rejected:
        raise UserError(f"nothing found of {corpus}: got 0 recordings, expected some; unpack it completely, or fill the list")
    names = {key: safe_id(item.id) for key, item in kept.items()}
    same = Counter(_file_name(made) for made in names.values())
    ids = {key: made if same[_file_name(made)] == 1 else _marked(made, "\0".join(key)) for key, made in names.items()}
    left_out = [Rejection(safe_id(one.id), *map(printable, (one.audio, one.reason, one.detail))) for one in rejected]
    unknown_notes = {
        f"items of an unknown language ({language[:40]}), expected such as en": count for language, count in unknown.items() if count
    }
    items = [replace(item, id=ids[key], origin="") for key, item in kept.items()]
    return Source(printable(name or corpus), items, left_out, {**(notes or {}), **unknown_notes})


def safe_id(name: str) -> str:
    """``name`` with all but letters with their marks, digits, ``_`` and ``-`` turned into ``_``: usable as a file and archive member name.

    A very long one is cut, and ends in a mark of the whole.
    """
    kept = "".join(char if char in "_-" or char.isalnum() or unicodedata.category(char)[0] == "M" else "\0" for char in name)
    made = re.sub("\0+", "_", kept).strip("_") or "_"
    return made if len(made.encode()) <= _LONGEST_ID_BYTES else _marked(made, name)


def _marked(made: str, name: str) -> str:
    mark = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_MARK_DIGITS // 2).hexdigest()
    return f"{made.encode()[:_LONGEST_ID_BYTES].decode(errors='ignore')}-{mark}"


def _file_name(name: str) -> str:
    """``name`` as a file system sees it that ignores case and the encoding of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: names of files that cannot, and halves of characters in JSON, come as surrogates."""
    return text.isascii() or printable(text) == text


def printable(text: str) -> str:
    """``text`` with what is no Unicode spelled out, such as ``\\udce9``."""
    return text.encode("utf-8", "backslashreplace").decode()


def find_root(folder: Path, patterns: tuple[str, ...], corpus: str, layout: str) -> Path:
    """``folder``, or the one folder inside it, that holds something of each of ``patterns``; else a UserError that tells the layout."""
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', expected {corpus}: {layout}; check the path")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [root for root in (folder, *inside) if all(any(root.glob(pattern)) for pattern in patterns)]
    if found and (found[0] == folder or len(found) == 1):
        return found[0]
    if found:
        names = ", ".join(root.name for root in found)
        raise UserError(f"more than one copy of {corpus} in '{folder}': got {names}, expected one; name that folder")
    raise UserError(f"not the layout of {corpus}: got '{folder}', expected {layout}; name the folder that holds these")


def spoken_text(text: str) -> str | None:
    """``text`` without remarks in brackets before and after it, and without superfluous spaces; empty when there is nothing else.

    None when a remark stands inside: whether it is spoken cannot be told.
    """
    rest = OUTER.sub(" ", text)
    return None if ANNOTATION.search(rest) else " ".join(rest.split())


def audio_name(name: str) -> str:
    """The name of an item that has none: its audio's, without an audio suffix."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in AUDIO_SUFFIXES else path).as_posix()


def split_of_part(part: str) -> str | None:
    """Valid or test for a part that is named so (dev-clean, test_other …), None for the rest, which trains unless shares hold some out."""
    name = part.lower()
    if name.startswith(("dev", "val", "eval")):
        return "valid"
    return "test" if name.startswith("test") else None


def text_or(value: Any, default: str) -> str:
    """``value`` of a list as text, ``default`` where there is none: 0 is a name, null and the empty text are not."""
    return default if value is None or value == "" else str(value)


def plain_fields(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Those fields that are text or numbers of a usual size, None when there are none."""
    return {key: value for key, value in fields.items() if value != "" and is_plain(value)} or None


def is_plain(value: Any) -> bool:
    """Whether ``value`` is text that can be written, or a number that others can read."""
    if isinstance(value, str):
        return _is_unicode(value)
    return isinstance(value, int | float) and abs(value) < _LARGEST_NUMBER


SPLITS = ("train", "valid", "test")


def normalised(text: str) -> str:
    """Case, punctuation, accents' encoding and spacing removed: what two readings of one text have in common.

    Apostrophes vanish ("we're" is "were"), every other sign becomes a space. May be empty.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("'", "").replace("\u2019", "")
    # Marks (M*) belong to the letter before them in scripts such as Devanagari.
    spaced = "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in folded)
    return " ".join(spaced.split())


_ALIKE = 0.5


def alike(first: str, second: str) -> bool:
    """Whether two texts are one, written twice."""
    return difflib.SequenceMatcher(None, normalised(first), normalised(second), autojunk=False).ratio() > _ALIKE


def word_count(text: str) -> int:
    """Number of words of the normalised text."""
    return len(normalised(text).split())


@dataclass(frozen=True)
class SplitPolicy:
    """Shares of distinct texts held out, by length: texts outside [min_words, max_words] use shares times ``outside_scale``.

    Short prompts say little about quality and are needed in training; very long ones would take much of the training data.
    """

    valid_share: float = 0.02
    test_share: float = 0.02
    seed: int = 0
    min_words: int = 0
    max_words: int = 1_000_000
    outside_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.valid_share >= 0 and self.test_share >= 0 and self.valid_share + self.test_share <= 1):
            got = f"valid {self.valid_share} and test {self.test_share}"
            raise UserError(f"split shares: got {got}, expected both >= 0 and a sum of at most 1; change them")

    @property
    def trains(self) -> bool:
        """Whether any text is for training: a corpus may be for tests alone."""
        return self.valid_share + self.test_share < 1

    def assign(self, text: str) -> str:
        """The split of ``text``: a function of its normalised form and the seed alone, not of the rest of the corpus."""
        key = normalised(text)
        scale = 1.0 if self.min_words <= len(key.split()) <= self.max_words else self.outside_scale
        position = self._position(key)
        if position < self.test_share * scale:
            return "test"
        return "valid" if position < (self.test_share + self.valid_share) * scale else "train"

    def _position(self, key: str) -> float:
        digest = hashlib.sha256(f"{self.seed}\n{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def completed(self, texts: Sequence[str], splits: Sequence[str], fixed: Collection[str] = ()) -> list[str]:
        """``splits`` of ``texts`` with at least one text in each part that has a share, if there are texts enough.

        A small corpus has parts that no hash falls into. Such a part gets the text of the lowest hash out of the largest other one, all
        items of it. ``fixed`` are the parts that hold items of their own besides.
        """
        keys = [normalised(text) for text in texts]
        found = dict(zip(keys, splits, strict=True))
        wanted = {"train": self.trains, "valid": self.valid_share > 0, "test": self.test_share > 0}
        for part in (part for part, share in wanted.items() if share and part not in fixed):
            counts = Counter(found.values())
            if not counts[part] and counts and max(counts.values()) > 1:
                largest = max(SPLITS, key=lambda name: counts[name])
                found[min((key for key, split in found.items() if split == largest), key=self._position)] = part
        return [found[key] for key in keys]


@dataclass(frozen=True)
class PrepareOptions:
    """The limits for an item; lengths in seconds, levels of full scale.

    ``headers_only`` reads headers only: silence, clipping and damage inside a file are not noticed. Items that must be converted are
    decoded, and checked in full, all the same.
    """

    sample_rate_hz: int = 16000
    min_seconds: float = 0.3
    max_seconds: float = 30.0
    silent_below_dbfs: float = -60.0
    max_clipped_share: float = 0.001
    headers_only: bool = False
    split: SplitPolicy = field(default_factory=SplitPolicy)

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds < self.max_seconds:
            raise UserError(
                f"length limits: got {self.min_seconds} to {self.max_seconds} s, expected 0 <= min_seconds < max_seconds; change them"
            )


@dataclass(frozen=True)
class Option:
    """An option of a reader: its parameter, the command's flag."""

    name: str
    help: str
    default: str | None = ""


@dataclass(frozen=True)
class Reader:
    """A reader by its module in ``kalle.data.corpus`` and its name."""

    module: str
    function: str
    help: str
    options: tuple[Option, ...] = ()
    source: str = "DIR"
    source_help: str = "the folder of the corpus, unpacked"
    headers: bool = True
    """Whether some of its recordings can be checked by their headers alone."""

    def read(self, source: Any, **options: Any) -> Source:
        """The items that the reader finds in ``source``; a UserError for a ``language`` that is none.

        Imported when it runs, because lhotse takes seconds.
        """
        language = options.get("language")
        if language and language_code(language) is None:
            raise UserError(f"language: got '{language}', expected an ISO 639 code such as en or zh, or an English name; correct it")
        reader: Callable[..., Source] = getattr(importlib.import_module(f"kalle.data.corpus.{self.module}"), self.function)
        return reader(source, **options)


SPEAKER = Option("speaker", "speaker of items that name none", UNKNOWN_SPEAKER)
LANGUAGE = Option("language", "language of items that name none, such as en")
FOLDER_SPEAKER = Option("speaker", "speaker of every item; `folders` takes the name of its folder", UNKNOWN_SPEAKER)
READERS: Mapping[str, Reader] = {
    "folder": Reader(
        *("lists", "read_folder", "A folder of audio files, each with a text file beside it.", (FOLDER_SPEAKER, LANGUAGE)),
        source_help="x.wav (or flac, mp3, opus, m4a …) beside x.txt or x.lab, at any depth",
    ),
    "jsonl": Reader(
        *("lists", "read_jsonl_corpus", "A JSONL list; audio paths are relative to it. A line's own split wins over the shares."),
        (SPEAKER, LANGUAGE),
        source="FILE",
        source_help='{"audio", "text", "id"?, "speaker"?, "language"?, "split"?} a line, or the usual other names',
    ),
    "csv": Reader(
        *("lists", "read_csv_corpus", "A table with a header line, or `audio|text` rows; audio paths are relative to it."),
        (
            Option("delimiter", "what separates the columns, such as , or tab; found by itself"),
            Option("columns", "the columns of a table without a header, such as audio,speaker,text; - for one that is not used"),
            SPEAKER,
            LANGUAGE,
        ),
        source="FILE",
        source_help="a CSV or TSV file",
    ),
    "ljspeech": Reader(
        *("published", "read_ljspeech", "LJSpeech 1.1, and corpora of its layout. Expected: metadata.csv and wavs/.", (SPEAKER, LANGUAGE))
    ),
    "libritts": Reader("library_readers", "read_libritts", "LibriTTS and LibriTTS-R. Any of their parts; dev is valid, test is test."),
    "librispeech": Reader("library_readers", "read_librispeech", "LibriSpeech. Any of its parts; dev is valid, test is test."),
    "aishell3": Reader("library_readers", "read_aishell3", "AISHELL-3. Expected: spk-info.txt, train/ and test/; test is kept as test."),
    "commonvoice": Reader("published", "read_common_voice", "Common Voice. Expected: clips/ and train, dev, test.tsv, for each locale."),
    "esd": Reader("published", "read_esd", "ESD, emotional speech. Expected: 0001/ to 0020/ with their lists; emotions are kept."),
    "emilia": Reader("published", "read_emilia", "Emilia. Expected: x.json beside x.mp3, in folders or in *.tar; or a tar.", (LANGUAGE,)),
    "kaldi": Reader("published", "read_kaldi", "A Kaldi data folder. Expected: wav.scp and text, at least.", (SPEAKER, LANGUAGE)),
    "lhotse": Reader("library_readers", "read_lhotse", "lhotse manifests, as its own recipes write them.", (SPEAKER, LANGUAGE)),
    "vctk": Reader(
        *("published", "read_vctk", "VCTK 0.92 and 0.80. Expected: txt/ and wav48_silence_trimmed/ or wav48/."),
        (Option("mic", "which microphone of release 0.92: mic1 or mic2", "mic1"),),
    ),
    "hf": Reader(
        *("library_readers", "read_hugging_face", "A Hugging Face dataset. Expected: an audio and a text column; its splits are kept."),
        (
            Option("config", "configuration of a dataset on the hub, such as clean", None),
            Option("audio_column", "column of the audio, where it isn't found by its name", None),
            Option("text_column", "column of the texts", None),
            Option("speaker_column", "column of the speakers", None),
            Option("language_column", "column of the languages", None),
            SPEAKER,
            LANGUAGE,
        ),
        source="DATASET",
        source_help="a save_to_disk folder, parquet files, or a name on the hub",
        headers=False,
    ),
}
