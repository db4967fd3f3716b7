"""Make the audio samples and the picture of README.md and the docs anew, with the weights that ship.

    python scripts/docs_samples.py [--model kalle-nano] [--asr tiny.en]

Writes docs/audio/*.mp3, docs/audio/README.md (each sample's text, command and transcript) and docs/images/speech.png. Every sample is
spoken once, with the seed written here: none is chosen by its sound. Needs the extras serve (figure) and eval (transcripts).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
from PIL import Image

from kalle.cli.main import main as kalle

ROOT = Path(__file__).resolve().parents[1]
AUDIO, IMAGES = ROOT / "docs" / "audio", ROOT / "docs" / "images"
MAX_TOTAL_BYTES = 300_000
PICTURED = "hello"


@dataclass(frozen=True)
class Sample:
    """One call of `kalle say`; ``options`` come after the text."""

    name: str
    title: str
    text: str
    options: list[str] = field(default_factory=list)


SAMPLES = (
    Sample("hello", "default voice", "Thank you for calling. Please leave a message after the tone.", ["--seed", "1"]),
    Sample("again", "the same text, another seed", "Thank you for calling. Please leave a message after the tone.", ["--seed", "2"]),
    Sample("sentence", "another sentence", "The old man walked slowly to the window and looked out at the sea.", ["--seed", "1"]),
    Sample(
        "long",
        "longer text, spoken sentence by sentence",
        "The train was late again. Nobody on the platform seemed to mind. A woman read her book, a boy counted birds, and it rained.",
        ["--seed", "1"],
    ),
    Sample(
        "other-voice",
        "another built-in voice",
        "The old man walked slowly to the window and looked out at the sea.",
        ["--voice", "isabella", "--seed", "1"],
    ),
    Sample(
        "stored-voice",
        "stored voice of a recorded speaker",
        "Please enter your number, followed by the pound key.",
        ["--voice", "allison", "--seed", "1"],
    ),
)


def speak(sample: Sample, model: str, folder: Path) -> Path:
    """Run `kalle say`; returns the WAV file. The pictured sample leaves ``folder``/speech.png too."""
    wav = folder / f"{sample.name}.wav"
    figure = ["--plot", str(folder / "speech.png")] if sample.name == PICTURED else []
    code = kalle(["say", sample.text, "-o", str(wav), "--model", model, *sample.options, *figure])
    if code:
        sys.exit(code)
    return wav


def transcripts(folder: Path, asr: str) -> dict[str, str]:
    """What a speech recogniser hears in each sample of ``folder``, by the name of the sample; empty where there is no recogniser."""
    testset = folder / "samples.jsonl"
    rows = [{"id": s.name, "audio": str(folder / f"{s.name}.wav"), "text": s.text, "language": "en"} for s in SAMPLES]
    testset.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = folder / "scores"
    keep = ["~metrics.sim", "~metrics.stoi", "~metrics.pesq_wb", "~metrics.pesq_nb", "~metrics.mel_l1", "score_recordings=false"]
    given = [f"testset={testset}", f"wavs={folder}", f"out={out}", f"metrics.wer.model={asr}", *keep]
    if kalle(["evaluate", "kind=wavs", *given]):
        return {}
    items = [json.loads(line) for line in (out / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    return {str(item["id"]): str(item["transcript"]) for item in items if "transcript" in item}


def page(heard: dict[str, str], recogniser: str) -> str:
    """The Markdown table of docs/audio/README.md."""
    lines = [
        "# Audio samples",
        "",
        "`python scripts/docs_samples.py` made these files with the weights that ship, [kalle-nano](../../ckpt/kalle-nano/README.md).",
        "Each was spoken once with the seed shown; none was chosen by its sound. They come under the licence of the weights, CC-BY-SA 3.0.",
        "",
        f"| sample | text | command | what a recogniser hears ({recogniser}) |",
        "|---|---|---|---|",
    ]
    for sample in SAMPLES:
        command = shlex.join(["kalle", "say", "…", *sample.options])
        lines.append(
            f"| [{sample.name}.mp3]({sample.name}.mp3): {sample.title} | {sample.text} | `{command}` | {heard.get(sample.name, '-')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Speak, transcribe, encode, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kalle-nano", help="weight folder, name or hub id")
    parser.add_argument("--asr", default="tiny.en", help="recogniser of `kalle evaluate`: tiny.en, base, or a CTranslate2 folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for sample in SAMPLES:
            audio, rate = soundfile.read(speak(sample, given.model, folder))
            soundfile.write(AUDIO / f"{sample.name}.mp3", audio, rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.4)
        picture = Image.open(folder / "speech.png").convert("RGB")
        picture.quantize(96).save(IMAGES / "speech.png", optimize=True)
        (AUDIO / "README.md").write_text(page(transcripts(folder, given.asr), given.asr), encoding="utf-8")
    total = sum(path.stat().st_size for path in AUDIO.glob("*.mp3"))
    if total > MAX_TOTAL_BYTES:
        sys.exit(f"docs/audio: got {total} bytes, expected at most {MAX_TOTAL_BYTES}; shorten the texts")


if __name__ == "__main__":
    main()
