"""Published corpora that lhotse's recipes read only in part: LJSpeech, VCTK, Common Voice, ESD, Kaldi data folders, Emilia."""

from __future__ import annotations

import csv
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalle.data.corpus.items import (
    AUDIO_SUFFIXES,
    UNKNOWN_SPEAKER,
    Rejection,
    Source,
    SourceItem,
    TarMember,
    alike,
    audio_name,
    collected,
    find_root,
    plain_fields,
    split_of_part,
    text_or,
    word_count,
)
from kalle.data.corpus.library_readers import from_cuts
from kalle.errors import UserError
from kalle.files import is_file, lines_of, parse_json, read_lines, read_text_line
from kalle.text.languages import detect_language, language_of_name

_LJSPEECH_ID = re.compile(r"LJ\d{3}-\d{4}")
_LJSPEECH_LAYOUT = "metadata.csv (id|text|normalised text; for other lists see `kalle prepare csv`) and wavs/"


def read_ljspeech(folder: Path, speaker: str = UNKNOWN_SPEAKER, language: str = "") -> Source:
    """LJSpeech 1.1: one speaker; the third column, in which numbers are spelled out, is the text, or the second where it is empty.

    Corpora of the same layout may have rows of two cells, id and text, which are counted in the notes; their items, whose ids are not
    LJSpeech's, get ``speaker`` and ``language``. Blank lines are skipped, and a row of any other width is rejected as "bad entry". Raises
    UserError where the second cells are mostly something else than the third and far shorter: they may be speakers.
    """
    root = find_root(folder, ("metadata.csv", "wavs"), "LJSpeech", _LJSPEECH_LAYOUT)
    paths = [path for path in sorted(root.glob("wavs/*")) if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("._")]
    audio = {path.stem: path for path in paths}
    named: set[str] = set()
    items: list[SourceItem] = []
    others = [path for path in paths if audio[path.stem] != path]
    rejected = [Rejection(path.stem, str(path), "duplicate id", f"the name of '{audio[path.stem]}'") for path in others]
    counts: Counter[str] = Counter()
    rows = [(number, line.split("|")) for number, line in enumerate(read_lines(root / "metadata.csv"), start=1) if line.strip()]
    _refuse_speakers_as_texts(root / "metadata.csv", [(number, cells) for number, cells in rows if len(cells) == 3])
    for number, row in rows:
        name, *cells = (cell.strip() for cell in row)
        name = audio_name(name.removeprefix("wavs/"))
        named.add(name)
        if len(cells) not in (1, 2):
            detail = f"line {number}: got {1 + len(cells)} cells, expected id|text|normalised text; correct it, or see `kalle prepare csv`"
            rejected.append(Rejection(name, "", "bad entry", detail))
        elif name not in audio:
            rejected.append(Rejection(name, "", "missing", f"line {number} of metadata.csv: no wavs/{name}.wav"))
        else:
            is_linda = _LJSPEECH_ID.fullmatch(name) is not None
            who, spoken, custom = ("linda-johnson", "en", {"gender": "female"}) if is_linda else (speaker, language, None)
            counts["rows of id and text alone"] += len(cells) == 1
            counts["items of another corpus than LJSpeech, by their ids"] += not is_linda
            items.append(SourceItem(name, audio[name].resolve(), cells[-1] or cells[0], who, spoken, custom=custom))
    for name in sorted(audio.keys() - named):
        rejected.append(Rejection(name, str(audio[name]), "no text", "audio that metadata.csv does not name"))
    return collected("LJSpeech", items, rejected, {note: count for note, count in counts.items() if count})


def _refuse_speakers_as_texts(table: Path, rows: list[tuple[int, list[str]]]) -> None:
    differing = [(number, cells) for number, cells in rows if cells[2].strip() and not alike(cells[1], cells[2])]
    first, second = (sum(word_count(cells[at]) for _, cells in rows) for at in (1, 2))
    if len(differing) > len(rows) / 2 > 0 and first < second / 2:
        number, cells = differing[0]
        raise UserError(
            f"columns in doubt in '{table}': line {number} has '{cells[1][:40]}' and '{cells[2][:40]}', expected one text written twice "
            "(id|text|normalised text); for id|speaker|text use `kalle prepare csv --columns audio,speaker,text`"
        )


MICROPHONES = ("mic1", "mic2")
_VCTK_LAYOUT = "txt/SPEAKER/*.txt, and wav48_silence_trimmed/SPEAKER/*_mic1.flac (0.92) or wav48/SPEAKER/*.wav (0.80)"


def read_vctk(folder: Path, mic: str = "mic1") -> Source:
    """One microphone's recordings with the texts of txt/; accent, age and gender as in speaker-info.txt, where there is one.

    A recording without a text (all of p315) is rejected as "no text", a text without a recording (p280 at mic2) as "missing". Raises
    UserError for another layout or microphone.
    """
    if mic not in MICROPHONES:
        raise UserError(f"mic: got '{mic}', expected {' or '.join(MICROPHONES)}; correct it")
    root = find_root(folder, ("txt", "wav48*"), "VCTK", _VCTK_LAYOUT)
    new = (root / "wav48_silence_trimmed").is_dir()
    ending = f"_{mic}" if new else ""
    pattern = f"wav48_silence_trimmed/*/*{ending}.flac" if new else "wav48/*/*.wav"
    audio = {path.stem.removesuffix(ending): path for path in sorted(root.glob(pattern))}
    rejected: list[Rejection] = []
    items = list(_vctk_items(root, audio, ending, rejected))
    return collected("VCTK", items, rejected, {"microphone": mic if new else "the only one"})


def _vctk_items(root: Path, audio: dict[str, Path], ending: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    speakers = _vctk_speakers(root / "speaker-info.txt")
    texts = {path.stem: path for path in sorted(root.glob("txt/*/*.txt"))}
    for name, path in audio.items():
        if name not in texts:
            rejected.append(Rejection(name + ending, str(path), "no text", f"no {name}.txt in txt"))
            continue
        speaker = path.parent.name
        try:
            text = read_text_line(texts[name])
        except (UserError, OSError) as error:
            rejected.append(Rejection(name + ending, str(path), "no text", str(error)))
            continue
        yield SourceItem(name + ending, path.resolve(), text, speaker, "en", custom=speakers.get(speaker))
    for name in sorted(texts.keys() - audio.keys()):
        rejected.append(Rejection(name + ending, "", "missing", f"no recording of '{texts[name].relative_to(root)}'"))


def _vctk_speakers(path: Path) -> dict[str, dict[str, str]]:
    """Age, gender and accent by speaker: the first four words of a line; release 0.80 leaves the p of a speaker out."""
    rows = [line.split() for line in read_lines(path)[1:]] if path.is_file() else []
    names = ("age", "gender", "accent")
    found = {}
    for row in rows:
        if len(row) > len(names):
            found[f"p{row[0]}" if row[0].isdigit() else row[0]] = dict(zip(names, row[1:4], strict=True))
    return found


COMMON_VOICE_TABLES = ("train.tsv", "dev.tsv", "test.tsv")
_COMMON_VOICE_LAYOUT = "expected LANGUAGE/train.tsv, dev.tsv, test.tsv and LANGUAGE/clips/*.mp3, there or in a folder cv-corpus-…"
_COMMON_VOICE_KEPT = ("age", "gender", "accents", "accent", "variant")


def read_common_voice(folder: Path) -> Source:
    """The validated clips that train, dev and test name, with client ids as speakers and the locale folder as language.

    Clips that no such table names (validated, invalidated and other have more) are not looked at. Raises UserError for another layout.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', {_COMMON_VOICE_LAYOUT} (Common Voice); check the path")
    roots = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))]
    locales = [root for root in roots if (root / "clips").is_dir() and any((root / table).is_file() for table in COMMON_VOICE_TABLES)]
    if not locales:
        raise UserError(f"not the layout of Common Voice: got '{folder}', {_COMMON_VOICE_LAYOUT}; name the folder that holds these")
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    for locale in locales:
        for table in COMMON_VOICE_TABLES:
            if (locale / table).is_file():
                items += _common_voice_rows(locale, locale / table, rejected)
    names = ", ".join(locale.resolve().name for locale in locales)
    return collected("Common Voice", items, rejected, {"locales": names})


def _common_voice_rows(locale: Path, table: Path, rejected: list[Rejection]) -> Iterator[SourceItem]:
    # Sentences hold unbalanced quotation marks, which mean nothing here.
    rows = csv.DictReader(read_lines(table), delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = {"path", "sentence", "client_id"} - set(rows.fieldnames or ())
    if missing:
        raise UserError(f"cannot read '{table}': no column {', '.join(sorted(missing))}; expected a table of Common Voice; unpack it again")
    clips = (locale / "clips").resolve()
    split = split_of_part(table.stem)
    for row in rows:
        name = row["path"] or ""
        audio = clips / (name if Path(name).suffix else f"{name}.mp3")
        item_id = Path(name).with_suffix("").name
        if not name or not is_file(audio):
            rejected.append(Rejection(item_id, str(audio), "missing", f"named in {table.name}, but not in clips"))
            continue
        language = language_of_name(row.get("locale") or locale.resolve().name)
        custom = plain_fields({key: row.get(key) or "" for key in _COMMON_VOICE_KEPT})
        yield SourceItem(item_id, audio, row["sentence"] or "", row["client_id"] or UNKNOWN_SPEAKER, language, split, custom=custom)


EMOTIONS = {
    **{"angry": "angry", "happy": "happy", "neutral": "neutral", "sad": "sad", "surprise": "surprise"},
    **{"生气": "angry", "愤怒": "angry", "快乐": "happy", "开心": "happy", "中立": "neutral", "伤心": "sad", "惊喜": "surprise"},
}
ESD_SPLITS = {"train": "train", "evaluation": "valid", "test": "test"}
_ESD_LAYOUT = "0001/0001.txt (id, text, emotion) and 0001/Angry/*.wav or 0001/Angry/{train,evaluation,test}/*.wav, and so on to 0020"


def read_esd(folder: Path) -> Source:
    """Every wav that a speaker's list names, its emotion kept; train, evaluation and test folders, where there are some, are the split.

    The lists are in UTF-8, UTF-16 or GB 18030. Raises UserError for another layout or encoding.
    """
    root = find_root(folder, ("[0-9][0-9][0-9][0-9]/[0-9][0-9][0-9][0-9].txt",), "ESD", _ESD_LAYOUT)
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    for speaker in sorted(root.glob("[0-9][0-9][0-9][0-9]")):
        items += _esd_speaker(speaker, rejected)
    return collected("ESD", items, rejected)


def _esd_speaker(folder: Path, rejected: list[Rejection]) -> Iterator[SourceItem]:
    audio = {path.stem: path.resolve() for path in sorted(folder.rglob("*.wav")) if not path.name.startswith("._")}
    table = folder / f"{folder.name}.txt"
    rows = _esd_table(table, rejected) if table.is_file() else {}
    language = detect_language(" ".join(text for text, _ in rows.values()))
    for name, (text, label) in rows.items():
        path = audio.pop(name, None)
        if path is None:
            rejected.append(Rejection(name, "", "missing", f"named in {table.name}, but there is no such wav"))
            continue
        places = [part.lower() for part in path.relative_to(folder.resolve()).parts[:-1]]
        emotion = next((EMOTIONS[word] for word in [*places, label.lower()] if word in EMOTIONS), label)
        split = next((ESD_SPLITS[place] for place in places if place in ESD_SPLITS), None)
        yield SourceItem(name, path, text, folder.name, language, split, custom={"emotion": emotion})
    for name, path in audio.items():
        rejected.append(Rejection(name, str(path), "no text", f"no line for it in {table.name}"))


def _esd_table(path: Path, rejected: list[Rejection]) -> dict[str, tuple[str, str]]:
    """Id -> text and label of its first line; another text or label goes to ``rejected``."""
    rows: dict[str, tuple[str, str]] = {}
    table = csv.reader(lines_of(_decoded(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        for cells in ([cell.strip() for cell in row] for row in table):
            if cells and cells[0]:
                name, text, label = (*cells, "", "")[:3]
                if rows.setdefault(name, (text, label)) != (text, label):
                    detail = f"line {table.line_num} of {path.name}: an earlier line says '{' '.join(rows[name])[:80]}'; remove one"
                    rejected.append(Rejection(name, "", "duplicate id", detail))
    except csv.Error as error:
        raise UserError(
            f"line {table.line_num} of '{path}': got {error}, expected id, text and emotion separated by tabs; correct it"
        ) from None
    return rows


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    encodings = ("utf-16",) if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "gb18030")
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise UserError(f"cannot read '{path}': got an unknown encoding, expected UTF-8, UTF-16 or GB 18030; convert it with iconv")


_KALDI_LAYOUT = "expected wav.scp (recording path) and text (utterance words), there or in train/, dev/ and test/"


def read_kaldi(folder: Path, speaker: str = UNKNOWN_SPEAKER, language: str = "") -> Source:
    """A Kaldi data folder, or a folder of several, of which those named dev… and test… are valid and test.

    Relative paths count from the folder, or from the working directory where the file is only there. A wav.scp entry that is a command
    is rejected as "unreadable": nothing in it is run. Raises UserError for another layout or a line of it that cannot be.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', {_KALDI_LAYOUT}; check the path")
    below = sorted(path.parent for path in folder.glob("*/wav.scp"))
    parts = [folder] if (folder / "wav.scp").is_file() else below
    if not parts or not all((part / "text").is_file() for part in parts):
        raise UserError(f"not a Kaldi data folder: got '{folder}', {_KALDI_LAYOUT}; name the folder that holds these")
    rejected: list[Rejection] = []
    items = [item for part in parts for item in _kaldi_part(part, speaker, language, rejected)]
    return collected("Kaldi", items, rejected, name=folder.resolve().name)


def _kaldi_part(folder: Path, speaker: str, language: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    recordings, texts = _kaldi_table(folder / "wav.scp", rejected), _kaldi_table(folder / "text", rejected)
    speakers, languages = _kaldi_table(folder / "utt2spk"), _kaldi_table(folder / "utt2lang")
    split = split_of_part(folder.resolve().name)
    table = folder / ("segments" if (folder / "segments").is_file() else "wav.scp")
    segments = _kaldi_segments(table) if table.name == "segments" else {name: (name, 0.0, None) for name in recordings}
    for name, (recording, start, seconds) in segments.items():
        place = recordings.get(recording)
        if place is None:
            rejected.append(Rejection(name, "", "missing", f"no recording '{recording}' in wav.scp"))
        elif place.endswith("|"):
            rejected.append(Rejection(name, place, "unreadable", "wav.scp has a command; run it and name the file it makes"))
        elif name not in texts:
            rejected.append(Rejection(name, place, "no text", "no line for it in text"))
        else:
            who, spoken = speakers.get(name) or speaker, languages.get(name) or language
            yield SourceItem(name, _kaldi_audio(folder, place), texts[name], who, spoken, split, start, seconds)
    for name in sorted(texts.keys() - segments.keys()):
        rejected.append(Rejection(name, "", "missing", f"in text, but not in {table.name}"))


def _kaldi_table(path: Path, rejected: list[Rejection] | None = None) -> dict[str, str]:
    """First word -> rest of its first line; another rest goes to ``rejected``. Empty for a file that is not there."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines(path) if path.is_file() else (), start=1):
        name, rest = (*line.split(maxsplit=1), "", "")[:2]
        rest = rest.strip()
        if name and found.setdefault(name, rest) != rest and rejected is not None:
            detail = f"line {number} of {path.name}: its first line says '{found[name][:80]}'; remove one"
            rejected.append(Rejection(name, rest if path.name == "wav.scp" else "", "duplicate id", detail))
    return found


def _kaldi_segments(path: Path) -> dict[str, tuple[str, float, float | None]]:
    """Utterance -> recording, start and duration in seconds; an end of -1 is the end of the recording."""
    found: dict[str, tuple[str, float, float | None]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            name, recording, start, end = line.split()[:4]
            seconds = None if float(end) == -1 else round(float(end) - float(start), 6)
            found[name] = (recording, float(start), seconds)
        except ValueError:
            raise UserError(f"cannot read '{path}' line {number}: got '{line}', expected utterance recording start end; fix it") from None
    return found


def _kaldi_audio(folder: Path, place: str) -> Path:
    here = folder.resolve() / place
    return here if is_file(here) or not is_file(Path(place)) else Path(place).resolve()


_EMILIA_LAYOUT = "expected x.json beside x.mp3 at any depth, or *.tar with such pairs, or raw/EN/*.jsonl (Emilia)"
_EMILIA_TEXT_KEYS = ("text", "transcript", "caption")
_EMILIA_KEPT = ("dnsmos", "emotion", "phone_count")


def read_emilia(folder: Path, language: str = "") -> Source:
    """Clips with their JSON: text, speaker, language; dnsmos is kept. ``folder`` may be one tar. Nothing of a tar is unpacked.

    A clip without JSON is rejected as "no text", JSON without a clip as "missing". Raises UserError for another layout and for a
    compressed tar, in which nothing can be found without reading it all.
    """
    tars = [folder] if folder.is_file() else sorted(folder.rglob("*.tar"))
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    if (folder / "raw").is_dir() and any(folder.glob("raw/*/*.jsonl")):
        items += _emilia_lists(folder, rejected)
    elif folder.is_dir():
        items += _emilia_folder(folder, language, rejected)
    elif not folder.is_file():
        raise UserError(f"not found: got '{folder}', {_EMILIA_LAYOUT}; check the path")
    for tar in tars:
        items += _emilia_tar(tar.resolve(), language, rejected)
    if not items and not rejected:
        raise UserError(f"not the layout of Emilia: got '{folder}', {_EMILIA_LAYOUT}; name the folder that holds these")
    return collected("Emilia", items, rejected, {"tars": len(tars)} if tars else None)


def _emilia_item(key: str, origin: str, audio: Path, content: bytes, language: str, inside: TarMember | None) -> SourceItem:
    """Raises ValueError for what is no JSON object."""
    row = parse_json(content)
    text = next((said for name in _EMILIA_TEXT_KEYS if (said := text_or(row.get(name), ""))), "")
    spoken = language_of_name(str(row.get("language") or "")) or language
    custom = plain_fields({name: row.get(name) for name in _EMILIA_KEPT})
    speaker = text_or(row.get("speaker"), UNKNOWN_SPEAKER)
    return SourceItem(key, audio, text, speaker, spoken, inside=inside, custom=custom, origin=origin)


def _emilia_folder(folder: Path, language: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    paths: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in AUDIO_SUFFIXES and paths.setdefault(path.with_suffix(""), path.resolve()) != path.resolve():
            rejected.append(Rejection(path.stem, str(path), "duplicate id", f"the name of '{paths[path.with_suffix('')]}'"))
    for path in sorted(folder.rglob("*.json")):
        audio = paths.pop(path.with_suffix(""), None)
        if audio is None:
            rejected.append(Rejection(path.stem, "", "missing", f"no audio beside '{path}'"))
            continue
        try:
            yield _emilia_item(path.stem, str(path.parent), audio, path.read_bytes(), language, None)
        except (ValueError, OSError) as error:
            rejected.append(Rejection(path.stem, str(audio), "no text", f"'{path}' is no JSON object: {error}"))
    for stem, audio in paths.items():
        rejected.append(Rejection(stem.name, str(audio), "no text", f"no {stem.name}.json beside it"))


def _emilia_lists(folder: Path, rejected: list[Rejection]) -> Iterator[SourceItem]:
    """The first release, by lhotse's recipe; lines of the lists that it returns no cut for are "missing"."""
    from lhotse.recipes.emilia import prepare_emilia
    from lhotse.serialization import load_jsonl

    from kalle.data.corpus.library_readers import quietly

    for path in sorted(folder.glob("raw/*/")):
        arguments = {"lang": path.name.lower(), "num_jobs": 1}
        cuts = quietly(prepare_emilia, "Emilia", folder, "raw/EN/*.jsonl and the clips these name", **arguments)
        found = {cut.id: cut for cut in cuts}
        yield from from_cuts(cuts, None, rejected)
        for table in sorted(path.glob("*.jsonl")):
            for row in load_jsonl(table):
                name = Path(str(row.get("wav"))).stem
                if name not in found:
                    rejected.append(Rejection(name, "", "missing", f"named in '{table}', but there is no such clip"))


@dataclass
class _EmiliaPair:
    content: bytes | None = None
    audio: list[TarMember] = field(default_factory=list)


def _emilia_tar(path: Path, language: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    """The pairs of one archive. Its headers and JSON are read, its audio is only located."""
    pairs: dict[str, _EmiliaPair] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = Path(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                key = str(name.with_suffix(""))
                if name.suffix.lower() == ".json":
                    pairs.setdefault(key, _EmiliaPair()).content = _content(archive, member)
                elif name.suffix.lower() in AUDIO_SUFFIXES:
                    pairs.setdefault(key, _EmiliaPair()).audio.append(TarMember(member.name, member.offset_data, member.size))
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read '{path}' ({error}); expected a whole tar that is not compressed; fetch or unpack it again") from None
    for key, pair in pairs.items():
        yield from _emilia_pair(path, key, pair, language, rejected)


def _content(archive: tarfile.TarFile, member: Any) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member.name
    return file.read()


def _emilia_pair(path: Path, key: str, pair: _EmiliaPair, language: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    name = Path(key).name
    if not pair.audio:
        rejected.append(Rejection(name, f"{path}:{key}", "missing", "JSON without audio of the same name"))
        return
    if pair.content is None:
        rejected.append(Rejection(name, f"{path}:{pair.audio[0].name}", "no text", "audio without JSON of the same name"))
        return
    for extra in pair.audio[1:]:
        rejected.append(Rejection(name, f"{path}:{extra.name}", "duplicate id", f"the id of {pair.audio[0].name}"))
    try:
        yield _emilia_item(name, f"{path}:{key}", path, pair.content, language, pair.audio[0])
    except ValueError as error:
        rejected.append(Rejection(name, f"{path}:{pair.audio[0].name}", "no text", f"its JSON is no object: {error}"))
