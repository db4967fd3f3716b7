"""Clean fabricated speech, and the same with one known fault an item."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kalle.audio import resample
from kalle.data.corpus.cuts import cuts_path, make_cut, write_cuts

RATE_HZ = 16000
WORDS = [
    "river",
    "stone",
    "amber",
    "candle",
    "window",
    "garden",
    "silver",
    "morning",
    "paper",
    "forest",
    "travel",
    "yellow",
    "number",
    "winter",
]
Audio = np.ndarray


@dataclasses.dataclass
class Entry:
    """One item to be written: samples, or the bytes of its file."""

    text: str
    audio: Audio | bytes
    split: str = "train"
    speaker: str = "ann"
    language: str = "en"


def text_of(number: int) -> str:
    """A text of 2 to 8 words that no other number has."""
    return (
        " ".join(WORDS[(number * 5 + step * (1 + number % 3)) % len(WORDS)] for step in range(2 + number % 7)) + f" {chr(97 + number // 7)}"
    )


def speech(text: str, seed: int) -> Audio:
    """Noise with a falling spectrum, in syllables with gaps between words, 0.08 s a letter: as wide and as long as speech of ``text``."""
    generator = np.random.default_rng(seed)
    pieces = [np.zeros(1600)]
    for word in text.split():
        samples = round(len(word) * 0.08 * RATE_HZ * generator.uniform(0.9, 1.1))
        noise = generator.standard_normal(samples)
        voiced = np.convolve(noise, np.exp(-np.arange(40) / 6), "same")
        pieces += [np.hanning(samples) ** 0.5 * (0.07 * voiced + 0.02 * noise), np.zeros(480)]
    audio = np.concatenate([*pieces, np.zeros(1600)]) + 1e-4 * generator.standard_normal(sum(map(len, pieces)) + 1600)
    return (0.5 * audio / np.abs(audio).max()).astype(np.float32)


def clean_entries(count: int = 36) -> dict[str, Entry]:
    """Items without any fault, the last three in the test split."""
    entries = {f"clean{n:02d}": Entry(text_of(n), speech(text_of(n), n)) for n in range(count)}
    for name in list(entries)[-3:]:
        entries[name].split = "test"
    return entries


def _low_mp3(audio: Audio) -> Audio:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, RATE_HZ, format="MP3", compression_level=0.99, bitrate_mode="CONSTANT")
    buffer.seek(0)
    return np.asarray(soundfile.read(buffer, dtype="float32")[0])


def faulty_entries(clean: dict[str, Entry]) -> tuple[dict[str, Entry], dict[str, set[str]]]:
    """Items with a fault each, and the checks that have to flag them."""
    entries: dict[str, Entry] = {}
    expected: dict[str, set[str]] = {}

    def add(name: str, checks: set[str], change: Callable[[Audio], Audio] = lambda audio: audio, text: str = "") -> None:
        number = 40 + len(entries)
        said = text or text_of(number)
        audio = change(speech(said, number))
        entries[name], expected[name] = Entry(said, audio), checks

    add("clipped", {"clipping"}, lambda audio: np.clip(audio * 4, -1, 1))
    add("clipped_then_lowered", {"clipping"}, lambda audio: 0.6 * np.clip(audio * 4, -1, 1))
    add("upsampled", {"bandwidth"}, lambda audio: resample(resample(audio, RATE_HZ, 8000), 8000, RATE_HZ))
    add("low_mp3", {"bandwidth"}, _low_mp3)
    add("leading", {"silence"}, lambda audio: np.concatenate([np.zeros(3 * RATE_HZ, np.float32), audio]))
    add("trailing", {"silence"}, lambda audio: np.concatenate([audio, np.zeros(2 * RATE_HZ, np.float32)]))
    add("paused", {"silence", "outlier"}, lambda audio: np.concatenate([audio, np.zeros(3 * RATE_HZ, np.float32), audio]))
    add("quiet", {"loudness"}, lambda audio: 0.02 * audio)
    long_text, short_text = " ".join(WORDS[:4]), "stone amber"
    add("swapped_long", {"outlier"}, lambda _: speech(short_text, 70), text=long_text)
    add("swapped_short", {"outlier"}, lambda _: speech(long_text, 71), text=short_text)
    add("absurd_rate", {"rate", "outlier"}, lambda _: speech(short_text, 72), text=" ".join(WORDS + WORDS[::-1]))
    add("cyrillic", {"script"}, text="каменный мост и река")
    add("lookalike", {"script"}, text="silver m\u043erning paper")
    add("broken_decoding", {"characters"}, text="caf\ufffd amber river")
    add("markup", {"characters"}, text="river <b>stone</b> candle")
    add(
        "leaked_text",
        {"leakage", "duplicate_text"},
        text=clean["clean35"].text.upper() + "!",
        change=lambda _: speech(clean["clean35"].text, 90),
    )
    add(
        "leaked_audio",
        {"leakage", "duplicate_audio"},
        change=lambda _: clean["clean34"].audio,
        text=clean["clean34"].text.replace("a", "o"),
    )
    add("copied_audio", {"duplicate_audio"}, change=lambda _: clean["clean03"].audio, text="number " + text_of(3).split(" ", 1)[1])
    add("long", {"duration"}, text=" ".join(WORDS * 5), change=lambda _: speech(" ".join(WORDS * 5), 93))
    entries["broken"], expected["broken"] = Entry("travel winter forest", b"no audio at all"), {"unreadable"}
    return entries, expected


def write_corpus(folder: Path, entries: dict[str, Entry]) -> Path:
    """A prepared corpus folder with relative audio paths; an item of bytes claims to be a second long."""
    (folder / "audio").mkdir(parents=True)
    cuts: dict[str, list] = {"train": [], "valid": [], "test": []}
    for name, entry in entries.items():
        path = folder / "audio" / f"{name}.wav"
        samples = RATE_HZ
        if isinstance(entry.audio, bytes):
            path.write_bytes(entry.audio)
        else:
            soundfile.write(path, entry.audio, RATE_HZ)
            samples = len(entry.audio)
        cuts[entry.split].append(make_cut(name, f"audio/{name}.wav", RATE_HZ, samples, RATE_HZ, entry.text, entry.speaker, entry.language))
    for split, found in cuts.items():
        write_cuts(cuts_path(folder, split), found)
    (folder / ".completed").write_text("fabricated\n")
    return folder


@dataclasses.dataclass(frozen=True)
class Sick:
    """A corpus of clean and faulty items, and the checks each item is to be flagged by."""

    folder: Path
    expected: dict[str, set[str]]


@pytest.fixture(scope="session")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Sick:
    clean = clean_entries()
    faulty, expected = faulty_entries(clean)
    folder = write_corpus(tmp_path_factory.mktemp("sick") / "corpus", {**clean, **faulty})
    return Sick(folder, {**{name: set() for name in clean}, **expected})


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("healthy") / "corpus", clean_entries())
