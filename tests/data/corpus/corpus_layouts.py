"""Fabricated copies of published corpora: their folders and list formats with a few noises for recordings."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

SECONDS = 0.5


def noise(seed: int, rate_hz: int = 16000, seconds: float = SECONDS) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate_hz))).clip(-0.9, 0.9).astype(np.float32)


def record(path: Path, rate_hz: int = 16000, seconds: float = SECONDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(sum(map(ord, path.name)), rate_hz, seconds), rate_hz)
    return path


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def ljspeech(root: Path) -> Path:
    """One text with an unbalanced quotation mark, one line without a recording, one recording without a line, one broken file."""
    root = root / "LJSpeech-1.1"
    for name in ("LJ001-0001", "LJ001-0002", "LJ001-0004"):
        record(root / "wavs" / f"{name}.wav", 22050)
    write(root / "wavs" / "LJ001-0005.wav", "RIFF torn")
    rows = [
        ("LJ001-0001", 'He said, "in 1455', 'He said, "in fourteen fifty-five'),
        ("LJ001-0002", "Printing, in the only sense", "Printing, in the only sense"),
        ("LJ001-0003", "has no recording", "has no recording"),
        ("LJ001-0005", "is torn", "is torn"),
    ]
    write(root / "metadata.csv", "".join("|".join(row) + "\n" for row in rows))
    return root


def librispeech(root: Path) -> Path:
    root = root / "LibriSpeech"
    for part, speaker in (("train-clean-5", "103"), ("dev-clean-2", "84"), ("test-clean", "1089")):
        chapter = root / part / speaker / "1240"
        lines = [f"{speaker}-1240-000{i} CHAPTER {word}\n" for i, word in enumerate(("ONE", "TWO", "THREE"))]
        write(chapter / f"{speaker}-1240.trans.txt", "".join(lines))
        for i in range(3 if part == "train-clean-5" else 2):
            record(chapter / f"{speaker}-1240-000{i}.flac")
    return root


def libritts(root: Path, tables: bool = True) -> Path:
    """Texts in tables and beside the audio; a resource fork of a Mac, and a wav that no text names."""
    root = root / "LibriTTS_R"
    write(
        root / "SPEAKERS.txt", ";ID|SEX|SUBSET|MINUTES|NAME\n84 | F | dev-clean | 8.0 | Someone\n14 | M | train-clean-100 | 25.0 | Else\n"
    )
    for part, speaker in (("train-clean-100", "14"), ("dev-clean", "84"), ("test-other", "367")):
        chapter = root / part / speaker / "121123"
        names = [f"{speaker}_121123_00000{i}_000000" for i in range(2)]
        for i, name in enumerate(names):
            record(chapter / f"{name}.wav", 24000)
            write(chapter / f"{name}.original.txt", f"Dr. No, {i}.")
            write(chapter / f"{name}.normalized.txt", f"Doctor No, number {i}.")
        if tables:
            rows = [f"{name}\tDr. No, {i}.\tDoctor No, number {i}.\n" for i, name in enumerate(names)]
            write(chapter / f"{speaker}_121123.trans.tsv", "".join(rows))
            write(chapter / f"{speaker}_121123.book.tsv", "".join(f"{name}\tDr. No.\t1\t2\t25.5\n" for name in names))
    write(root / "dev-clean" / "84" / "121123" / "._84_121123_000000_000000.wav", "a resource fork")
    record(root / "train-clean-100" / "14" / "121123" / "14_121123_000009_000000.wav", 24000)
    return root


def aishell3(root: Path) -> Path:
    write(root / "spk-info.txt", "# speaker\tage\tgender\taccent\nSSB0005\tB\tfemale\tnorth\nSSB0009\tB\tmale\tsouth\n")
    write(root / "train" / "label_train-set.txt", "# id|pinyin|text\nSSB00050001|guang3 zhou1 %|广州%$\n")
    write(root / "train" / "content.txt", "SSB00050001.wav\t广 guang3 州 zhou1\nSSB00050002.wav\t大 da4 学 xue2\nSSB00050003.wav\t不 bu4\n")
    write(root / "test" / "content.txt", "SSB00090001.wav\t你 ni3 好 hao3\n")
    for part, name in (("train", "SSB00050001"), ("train", "SSB00050002"), ("test", "SSB00090001")):
        record(root / part / "wav" / name[:7] / f"{name}.wav", 44100)
    return root


def vctk(root: Path) -> Path:
    """Release 0.92: two microphones, p315 without texts, p280 without the second microphone."""
    root = root / "VCTK-Corpus-0.92"
    info = "ID  AGE  GENDER  ACCENTS  REGION COMMENTS\np225  23  F    English    Southern  England\np280  25  F  French  France\n"
    write(root / "speaker-info.txt", info + "p315  18  M  American  New  England\n")
    for speaker, microphones in (("p225", (1, 2)), ("p280", (1,)), ("p315", (1, 2))):
        for number in ("001", "002"):
            for microphone in microphones:
                record(root / "wav48_silence_trimmed" / speaker / f"{speaker}_{number}_mic{microphone}.flac", 48000)
            if speaker != "p315":
                write(root / "txt" / speaker / f"{speaker}_{number}.txt", f"Please call Stella {number}.\n")
    write(root / "wav48_silence_trimmed" / "log.txt", "trimmed")
    return root


def common_voice(root: Path) -> Path:
    """Two locales, one with the columns of an old release; an unbalanced quotation mark; a clip that is missing."""
    for locale, extra in (("zh-CN", "gender\taccents\tvariant"), ("fr", "accent")):
        folder = root / "cv-corpus-13.0" / locale
        header = f"client_id\tpath\tsentence\tage\t{extra}\n"
        for split, count in (("train", 2), ("dev", 1), ("test", 1)):
            rows = [f'c{i}\tcommon_voice_{locale}_{split}{i}.mp3\t"Phrase {split} {i}\ttwenties\tx\n' for i in range(count)]
            rows += [f"c9\tcommon_voice_{locale}_gone.mp3\tgone\t\t\n"] if split == "train" else []
            write(folder / f"{split}.tsv", header + "".join(rows))
            for i in range(count):
                record(folder / "clips" / f"common_voice_{locale}_{split}{i}.mp3", 32000)
        record(folder / "clips" / f"common_voice_{locale}_invalidated.mp3", 32000)
    return root / "cv-corpus-13.0"


def esd(root: Path) -> Path:
    """A Mandarin speaker with a list in UTF-16 and Chinese labels, an English one with split folders."""
    root = root / "Emotional Speech Dataset (ESD)"
    write(root / "0001" / "0001.txt", "0001_000351\t打远一看，它们的确很是美丽，\t愤怒\n0001_000001\t这是一个测试\t中立\n", "utf-16")
    record(root / "0001" / "Angry" / "0001_000351.wav")
    record(root / "0001" / "Neutral" / "0001_000001.wav")
    lines = [f"0011_00000{i}\tThe nine the eggs, I keep. {i}\tSurprise\n" for i in range(1, 5)]
    write(root / "0011" / "0011.txt", "".join(lines) + "\n")
    for i, split in ((1, "train"), (2, "evaluation"), (3, "test"), (9, "train")):
        record(root / "0011" / "Surprise" / split / f"0011_00000{i}.wav")
    return root


EMILIA_ROW = {
    **{"id": "", "wav": "", "text": " Hello there, number {}.", "duration": 0.5},
    **{"speaker": "EN_B00000_S00000", "language": "en", "dnsmos": 3.3},
}


def emilia_rows() -> list[dict]:
    names = [f"EN_B00000_S00000_W00000{i}" for i in range(3)]
    return [{**EMILIA_ROW, "id": name, "wav": f"{name}.mp3", "text": EMILIA_ROW["text"].format(i)} for i, name in enumerate(names)]


def emilia_folder(root: Path) -> Path:
    """Pairs, a clip without JSON, JSON without a clip, and JSON that is none."""
    folder = root / "EN" / "EN_B00000" / "EN_B00000_S00000" / "mp3"
    for row in emilia_rows():
        record(folder / row["wav"], 24000)
        write(folder / f"{row['id']}.json", json.dumps(row))
    record(folder / "EN_B00000_S00000_W000008.mp3", 24000)
    record(folder / "EN_B00000_S00000_W000007.mp3", 24000)
    write(folder / "EN_B00000_S00000_W000007.json", "{torn")
    write(folder / "EN_B00000_S00000_W000009.json", json.dumps(EMILIA_ROW))
    return root


def emilia_tar(root: Path, mode: str = "w") -> Path:
    """A WebDataset of the pairs, an audio member without JSON, and a damaged one."""
    path = root / ("EN-B000000.tar" + (".gz" if mode == "w:gz" else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for row in emilia_rows():
            clip = io.BytesIO()
            soundfile.write(clip, noise(len(row["text"]), 24000), 24000, format="MP3")
            _add(archive, f"{row['id']}.mp3", clip.getvalue())
            _add(archive, f"{row['id']}.json", json.dumps(row).encode())
        _add(archive, "EN_B00000_S00000_W000008.mp3", b"no json")
        _add(archive, "EN_B00000_S00000_W000009.mp3", b"damaged")
        _add(archive, "EN_B00000_S00000_W000009.json", json.dumps({**EMILIA_ROW, "text": "damaged"}).encode())
    return path


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def emilia_lists(root: Path) -> Path:
    """The first release: one list a batch, paths relative to the language."""
    rows = [{**row, "wav": f"EN_B00000/EN_B00000_S00000/mp3/{row['wav']}"} for row in emilia_rows()]
    write(root / "raw" / "EN" / "EN_B00000.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for row in rows[:2]:
        record(root / "raw" / "EN" / row["wav"], 24000)
    return root


def kaldi(root: Path) -> Path:
    """Segments of one long recording, a command, a missing recording, a missing text, a segment beyond the end, an end of -1."""
    record(root / "train" / "call.wav", 8000, 3.0)
    write(root / "train" / "wav.scp", "call call.wav\npiped sph2pipe -f wav x.sph |\n")
    segments = [
        "call-1 call 0.5 1.25",
        "call-2 call 2.5 -1",
        "call-3 call 2.5 3.5",
        "call-4 call 0 1",
        "piped-1 piped 0 1",
        "lost-1 lost 0 1",
    ]
    write(root / "train" / "segments", "\n".join(segments) + "\n")
    write(root / "train" / "text", "call-1 first words\ncall-2 last words\ncall-3 beyond\npiped-1 piped\nlost-1 lost\nnowhere-1 nowhere\n")
    write(root / "train" / "utt2spk", "call-1 ann\ncall-2 bob\ncall-3 bob\n")
    record(root / "test" / "whole.flac")
    write(root / "test" / "wav.scp", f"whole {root / 'test' / 'whole.flac'}\n")
    write(root / "test" / "text", "whole a whole recording\n")
    write(root / "test" / "utt2lang", "whole fr\n")
    return root
