"""Speak texts with the teachers: the synthetic corpora. Runs in an environment of its own (teachers.txt); see README.md beside this file.

    python speak.py hibari --texts texts/train.jsonl --out synthetic/hibari --hours 60 --part 0 --parts 2
    python speak.py shifted --texts texts/train.jsonl --out synthetic/shifted --hours 3
    python speak.py kokoro --texts texts/train.jsonl --out synthetic/kokoro --hours 10 --model kokoro.onnx --styles kokoro-js-1.2.1.tgz

Imports nothing of kalle. Writes OUT/audio/NAME.flac (16 kHz) and, for every part, OUT/list.PART.jsonl with {"audio", "text", "id",
"speaker", "seconds", "phonemes", "milliseconds"}: the phonemes that were spoken, and how long each of them takes (the silences at both
ends included). What is there already is not spoken again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import onnx
import onnxruntime
import soundfile
import soxr
from hibari import Hibari
from hibari import dsp as hibari_dsp
from hibari.g2p import G2P

TEACHER_RATE_HZ = 24_000
SAMPLE_RATE_HZ = 16_000
RMS = 0.08
"""Loudness of every utterance, so that no voice is known by it."""
PEAK = 0.95
SILENCE = 0.01
"""Share of the peak under which the ends are cut."""
KEPT_SECONDS = (0.06, 0.18)
"""Silence that is left before and after the speech; behind it up to one latent frame less, for whole frames."""
FRAME_SAMPLES = 1280
"""Of a latent frame at `SAMPLE_RATE_HZ`: utterances of whole frames often have the same length, and are then encoded together."""
MOST_PHONEMES = 400
DURATIONS = {"hibari": "/Clip_output_0", "kokoro": "/encoder/Clip_output_0"}
"""The tensor of each graph that holds the length of every phoneme, in frames."""
FRAME_SECONDS = {"hibari": 0.025, "kokoro": 0.025}
KOKORO_CHARACTERS = range(12, 71)
"""Kokoro is slow: many short texts teach more voices an hour than few long ones."""
USUAL_CHARACTERS = 60
"""Longer texts come later in the turn of the shifted voices, as in texts.py."""
NEAR = ({"am_fenrir", "am_puck"}, {"af_heart", "af_bella"})
"""Voices too much alike to be blended into a third."""
BLENDS = 42
HELD_OUT_BLENDS = 6
"""The last blends never speak a training text: they are the strangers that cloning is tested on."""
SHIFTS = (0.70, 0.74, 0.78, 0.82, 0.86, 0.92, 1.10, 1.25)
"""Ratios of pitch and formants together: hibari as so many more speakers, at its own tempo. GE2E cosines to hibari: 0.61 (0.70), 0.64
(0.78), 0.71 (0.86), 0.76 (1.25); between Kokoro's voices 0.60."""
REPORT_EVERY = 500

Spoken = tuple[numpy.ndarray, list[int]]
"""Samples at `TEACHER_RATE_HZ`, and milliseconds of the silence in front, of every phoneme, and of the silence behind."""


@dataclass(frozen=True)
class Speaker:
    """A voice of a teacher, or a mean of some."""

    name: str
    parts: tuple[str, ...]
    shift: float = 1.0
    """Ratio of pitch and formants to the teacher's own."""

    @property
    def held_out(self) -> bool:
        """Whether it speaks test texts alone."""
        return self.name.startswith("blend") and int(self.name[-2:]) > BLENDS - HELD_OUT_BLENDS


def share(key: str) -> float:
    """A number in [0, 1) that follows from ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def speakers(names: list[str]) -> list[Speaker]:
    """The voices ``names`` (af_, am_, bf_, bm_), and `BLENDS` of two or three of one sex, the same ones every time."""
    pairs = [
        (a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a[1] == b[1] and {a, b} not in NEAR
    ]  # fmt: skip
    blends: list[tuple[str, ...]] = []
    used = dict.fromkeys(names, 0)
    while pairs and len(blends) < BLENDS:  # every voice is as often a parent as any other
        pairs.sort(key=lambda pair: (used[pair[0]] + used[pair[1]], share("+".join(pair))))
        first, second = pairs.pop(0)
        third = min(
            (name for name in names if name[1] == first[1] and name not in (first, second)), key=lambda name: share(f"{first}{name}")
        )
        parts = (first, second, third) if len(blends) % 3 == 2 else (first, second)
        blends.append(parts)
        for name in parts:
            used[name] += 1
    return [Speaker(name, (name,)) for name in names] + [Speaker(f"blend_{i + 1:02d}", parts) for i, parts in enumerate(blends)]


def session_of(model: bytes | str, teacher: str) -> onnxruntime.InferenceSession:
    """The graph on one thread, with the phonemes' durations as one more output."""
    graph = onnx.load(model)
    graph.graph.output.append(onnx.ValueInfoProto(name=DURATIONS[teacher]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def milliseconds(frames: numpy.ndarray, teacher: str) -> list[int]:
    """Whole milliseconds of each phoneme; rounding does not add up."""
    ends = numpy.cumsum(frames.reshape(-1)) * FRAME_SECONDS[teacher] * 1000
    return numpy.diff(numpy.round(ends), prepend=0).astype(int).tolist()


class HibariTeacher:
    """One American voice."""

    def __init__(self) -> None:
        self.tts = Hibari(g2p=G2P())
        self.session = session_of(self.tts.model_path, "hibari")
        self.vocab = set(self.tts.vocab)

    def __call__(self, phonemes: str, speaker: Speaker, seed: int) -> Spoken:
        """Speak ``phonemes``; a shifted voice speaks at another speed and is resampled back to the tempo."""
        ids = numpy.asarray([self.tts.ids(phonemes)], numpy.int64)
        *parts, frames = self.session.run(None, {"ids": ids, "speed": numpy.full(1, 1 / speaker.shift, numpy.float32)})
        audio = hibari_dsp.synth(*(part[0] for part in parts), numpy.random.default_rng(seed))
        if speaker.shift != 1:
            audio = soxr.resample(audio.astype(numpy.float32), TEACHER_RATE_HZ * speaker.shift, TEACHER_RATE_HZ)
        return audio, milliseconds(frames / speaker.shift, "hibari")


class KokoroTeacher:
    """Many voices by style vectors."""

    def __init__(self, model: Path, styles: dict[str, numpy.ndarray], vocab: dict[str, int]) -> None:
        self.session, self.styles, self.ids = session_of(str(model), "kokoro"), styles, vocab
        self.vocab = set(vocab)

    def __call__(self, phonemes: str, speaker: Speaker, seed: int) -> Spoken:
        """Speak ``phonemes`` in the mean of the styles of ``speaker``."""
        ids = [0, *(self.ids[character] for character in phonemes), 0]
        style = numpy.mean([self.styles[name][min(len(phonemes), len(self.styles[name])) - 1] for name in speaker.parts], axis=0)
        feed = {
            "tokens": numpy.asarray([ids], numpy.int64),
            "style": style[None].astype(numpy.float32),
            "speed": numpy.ones(1, numpy.float32),
        }
        audio, frames = self.session.run(None, feed)
        return audio.reshape(-1), milliseconds(frames, "kokoro")


def read_styles(tarball: Path) -> dict[str, numpy.ndarray]:
    """The style vectors of the English voices, (phonemes, 256) each."""
    with tarfile.open(tarball) as archive:
        members = {Path(member.name).stem: member for member in archive if member.name.startswith("package/voices/")}
        found = {name: archive.extractfile(member) for name, member in sorted(members.items()) if name[:2] in ("af", "am", "bf", "bm")}
        return {name: numpy.frombuffer(handle.read(), "<f4").reshape(-1, 256) for name, handle in found.items() if handle is not None}


def to_phonemes(g2p: G2P, text: str, vocab: set[str]) -> str:
    """The phonemes of one sentence, of the characters that the teachers know; a double quote would make words unknown."""
    phonemes = g2p(text.replace('"', ""))
    return " ".join("".join(character for character in phonemes if character in vocab).split())


def trim(audio: numpy.ndarray, lengths: list[int]) -> Spoken:
    """The utterance without the silence beyond `KEPT_SECONDS` at its ends, its lengths likewise."""
    loud = numpy.flatnonzero(numpy.abs(audio) > SILENCE * numpy.abs(audio).max())
    start = max(0, loud[0] - round(KEPT_SECONDS[0] * TEACHER_RATE_HZ))
    end = min(len(audio), loud[-1] + 1 + round(KEPT_SECONDS[1] * TEACHER_RATE_HZ))
    cut = [round(start / TEACHER_RATE_HZ * 1000), round((len(audio) - end) / TEACHER_RATE_HZ * 1000)]
    kept = list(lengths)
    for order, left in ((1, cut[0]), (-1, cut[1])):
        at = 0 if order == 1 else len(kept) - 1
        while left > 0 and 0 <= at < len(kept):
            taken = min(left, kept[at])
            kept[at] -= taken
            left -= taken
            at += order
    return audio[start:end], kept


def finished(audio: numpy.ndarray) -> numpy.ndarray:
    """At 16 kHz and `RMS`, in whole frames."""
    audio = soxr.resample(audio.astype(numpy.float32), TEACHER_RATE_HZ, SAMPLE_RATE_HZ)
    audio = audio[: max(1, len(audio) // FRAME_SAMPLES) * FRAME_SAMPLES]
    return audio * min(RMS / max(numpy.sqrt(numpy.mean(audio**2)), 1e-5), PEAK / max(numpy.abs(audio).max(), 1e-5))


def jobs(given: argparse.Namespace, voices: list[Speaker]) -> Iterator[tuple[dict[str, str], Speaker]]:
    """Texts and who speaks them, in order; a part takes every so many."""
    items = [json.loads(line) for line in given.texts.read_text(encoding="utf-8").split("\n") if line]
    if given.teacher == "kokoro":
        heard = [voice for voice in voices if voice.held_out] if given.strangers else [voice for voice in voices if not voice.held_out]
        items = sorted((item for item in items if len(item["text"]) in KOKORO_CHARACTERS), key=lambda item: share(item["text"]))
        pairs = [(item, heard[index % len(heard)]) for index, item in enumerate(items)]
    else:
        if given.teacher == "shifted":  # in an order of its own, so that most are texts that hibari itself does not say
            items = sorted(items, key=lambda item: (share(item["text"]) + 0.02) * max(1.0, len(item["text"]) / USUAL_CHARACTERS))
        pairs = [(item, voices[index % len(voices)]) for index, item in enumerate(items)]
    yield from pairs[given.part :: given.parts]


def speak_all(given: argparse.Namespace, teacher: Callable[[str, Speaker, int], Spoken], vocab: set[str], voices: list[Speaker]) -> None:
    """Speak until the hours are full; the list grows as it goes, so that others can read what there is."""
    g2p, started, seconds, count = G2P(), time.perf_counter(), 0.0, 0
    (given.out / "audio").mkdir(parents=True, exist_ok=True)
    path = given.out / f"list.{given.part}.jsonl"
    done = {item["id"]: item["seconds"] for item in map(json.loads, filter(None, path.read_text().split("\n")))} if path.is_file() else {}
    with path.open("a", encoding="utf-8") as listing:
        for item, speaker in jobs(given, voices):
            if seconds >= given.hours * 3600 / given.parts or time.perf_counter() - started > given.minutes * 60:
                break
            name = f"{speaker.name}-{item['id']}"
            if name in done:
                seconds += done[name]
                continue
            phonemes = to_phonemes(g2p, item["text"], vocab)
            if not 1 <= len(phonemes) <= MOST_PHONEMES:
                continue
            audio, lengths = trim(*teacher(phonemes, speaker, round(share(name) * 2**31)))
            buffer = io.BytesIO()
            soundfile.write(buffer, finished(audio), SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
            file = given.out / "audio" / f"{name}.flac"
            file.with_suffix(".partial").write_bytes(buffer.getvalue())
            os.replace(file.with_suffix(".partial"), file)
            took = len(audio) / TEACHER_RATE_HZ
            entry = {"audio": f"audio/{file.name}", "text": item["text"], "id": name, "speaker": speaker.name, "seconds": round(took, 3)}
            listing.write(json.dumps(entry | {"phonemes": phonemes, "milliseconds": lengths}, ensure_ascii=False) + "\n")
            seconds, count = seconds + took, count + 1
            if count % REPORT_EVERY == 0:
                listing.flush()
                minutes = (time.perf_counter() - started) / 60
                print(
                    f"{given.teacher}, part {given.part}: {count} items, {seconds / 3600:.2f} h of speech in {minutes:.1f} min", flush=True
                )
    print(f"{given.teacher}, part {given.part}: {count} new items, {seconds / 3600:.2f} h of speech", flush=True)


def run() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=("hibari", "shifted", "kokoro"))
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1e9, help="of all parts together")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many of the clock")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--model", type=Path, help="Kokoro's graph")
    parser.add_argument("--styles", type=Path, help="npm's kokoro-js as a tarball")
    parser.add_argument("--strangers", action="store_true", help="the held-out blends instead of the others")
    given = parser.parse_args()
    if given.teacher in ("hibari", "shifted"):
        hibari = HibariTeacher()
        shifted = [Speaker(f"hibari_{round(shift * 100)}", ("hibari",), shift) for shift in SHIFTS]
        speak_all(given, hibari, hibari.vocab, shifted if given.teacher == "shifted" else [Speaker("hibari", ("hibari",))])
    else:
        styles = read_styles(given.styles)
        kokoro = KokoroTeacher(given.model, styles, Hibari().vocab)
        speak_all(given, kokoro, kokoro.vocab, speakers(list(styles)))
    return 0


if __name__ == "__main__":
    sys.exit(run())
