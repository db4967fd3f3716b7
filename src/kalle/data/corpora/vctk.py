"""VCTK, releases 0.92 (two microphones) and 0.80.

Read here and not by lhotse's recipe, which ends at the first text without audio and passes over audio without a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kalle.data.corpora.items import Rejection, Source, SourceItem
from kalle.data.corpora.layout import collected, find_root
from kalle.data.prepare_files import read_lines, safe_id
from kalle.errors import UserError

MICROPHONES = ("mic1", "mic2")
_LAYOUT = "txt/SPEAKER/*.txt, and wav48_silence_trimmed/SPEAKER/*_mic1.flac (0.92) or wav48/SPEAKER/*.wav (0.80)"


def read_vctk(folder: Path, microphone: str = "mic1") -> Source:
    """One microphone's recordings with the texts of txt/; accent, age and gender as in speaker-info.txt, where there is one.

    A recording without a text (all of p315) is rejected as "no text", a text without a recording (p280 at mic2) as "missing". Raises
    UserError for another layout or microphone.
    """
    if microphone not in MICROPHONES:
        raise UserError(f"--mic: got '{microphone}', expected {' or '.join(MICROPHONES)}; correct it")
    root = find_root(folder, ("txt", "wav48*"), "VCTK", _LAYOUT)
    new = (root / "wav48_silence_trimmed").is_dir()
    ending = f"_{microphone}" if new else ""
    pattern = f"wav48_silence_trimmed/*/*{ending}.flac" if new else "wav48/*/*.wav"
    audio = {path.stem.removesuffix(ending): path for path in sorted(root.glob(pattern))}
    rejected: list[Rejection] = []
    items = list(_items(root, audio, ending, rejected))
    return collected("VCTK", items, rejected, {"microphone": microphone if new else "the only one"})


def _items(root: Path, audio: dict[str, Path], ending: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    speakers = _speakers(root / "speaker-info.txt")
    texts = {path.stem: path for path in sorted(root.glob("txt/*/*.txt"))}
    for name, path in audio.items():
        if name not in texts:
            rejected.append(Rejection(safe_id(name + ending), str(path), "no text", f"no {name}.txt in txt"))
            continue
        speaker, text = path.parent.name, " ".join(" ".join(read_lines(texts[name])).split())
        yield SourceItem(safe_id(name + ending), path.resolve(), text, speaker, "en", custom=speakers.get(speaker))
    for name in sorted(texts.keys() - audio.keys()):
        rejected.append(Rejection(safe_id(name + ending), "", "missing", f"no recording of '{texts[name].relative_to(root)}'"))


def _speakers(path: Path) -> dict[str, dict[str, str]]:
    """Age, gender and accent by speaker: the first four words of a line; release 0.80 leaves the p of a speaker out."""
    rows = [line.split() for line in read_lines(path)[1:]] if path.is_file() else []
    names = ("age", "gender", "accent")
    found = {}
    for row in rows:
        if len(row) > len(names):
            found[f"p{row[0]}" if row[0].isdigit() else row[0]] = dict(zip(names, row[1:4], strict=True))
    return found
