#!/usr/bin/env bash
# Resemblyzer: a copy at -20 dB is less like a clip at -30 dB than a copy that is shifted up by a semitone.
#
# A speaker embedding says who speaks, and the package's preprocess_wav brings the volume to a target before anything else. One would guess that
# the cosine of a clip and of the same samples times a constant is 1, as it is where log spectra are normalised.
#
# What happens: the volume is only ever raised, to a root mean square of -30 dB of full scale; a louder clip keeps its level, and its spectrum
# goes into the network without a logarithm. So all levels up to -30 dB give the same embedding, and above it every decibel counts: with a clip at
# -30 dB, its copy at -26 dB has a cosine of 0.96, at -24 dB 0.93, at -20 dB 0.87. The clip shifted up by a semitone, at the same level, has 0.93;
# another sentence of the voice has 0.83 at one level and 0.75 where one of them is at -20 dB. And as the level is that of the whole clip,
# silence behind a soft one (-35 dB) raises its speech: 8 s of it take 0.06 off the cosine, and nothing off that of a loud one.
#
# Why it matters for speech: papers on voice cloning give speaker similarity by Resemblyzer, and tell systems apart by some hundredths. Speech
# usually has between -30 and -18 dB; a synthesiser has one level, and each of its reference recordings another. So the score ranks systems
# by how loud they are, too. Cut the silence, then bring both clips to -30 dB or less before preprocess_wav; no gain counts then.
#
# Resemblyzer 0.1.4, torch 2.11.0, librosa 0.11.0; speech of hibari-tts 0.2.1; CPU, Linux x86-64, 2026-12-01. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
# webrtcvad, which it requires, is compiled, and imports pkg_resources.
"$folder/env/bin/pip" --quiet --disable-pip-version-check install \
  Resemblyzer==0.1.4 torch==2.11.0 librosa==0.11.0 webrtcvad==2.0.10 hibari-tts==0.2.1 soxr==1.1.0 numpy==2.4.6 'setuptools<81'
OMP_NUM_THREADS=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import soxr
from hibari import Hibari
from resemblyzer import VoiceEncoder, preprocess_wav

SENTENCES = """She walked along the shingle as far as the cliff.
The source of the huge river is the clear spring.
Sixty-six thistles stuck in six sacks.
The small pup gnawed a hole in the sock.
The window of the kitchen was fastened with a rusty hook.
He catches them in his net and gathers them in his drag.""".splitlines()
RATE = 16000
print("Resemblyzer", version("Resemblyzer"), "torch", version("torch"))
teacher, encoder = Hibari(), VoiceEncoder("cpu", verbose=False)
clips = [soxr.resample(np.asarray(teacher(text, seed=0), np.float32).reshape(-1), 24000, RATE) for text in SENTENCES]


def at(clip, decibel):
    return (clip * 10 ** (decibel / 20) / np.sqrt(np.mean(clip**2))).astype(np.float32)


def embedding(wave):
    assert np.abs(wave).max() <= 1, "the clip is cut off"
    return encoder.embed_utterance(preprocess_wav(wave))


def higher(clip, semitones):
    return soxr.resample(clip, RATE * 2 ** (semitones / 12), RATE)


def mean(pairs):
    return float(np.mean([one @ two for one, two in pairs]))


reference = [embedding(at(clip, -30)) for clip in clips]
louder = {level: mean(zip(reference, (embedding(at(clip, level)) for clip in clips))) for level in (-50, -40, -30, -28, -26, -24, -22, -20)}
print("one clip at -30 dB and at another level:", ", ".join(f"{level} dB {value:.3f}" for level, value in louder.items()))
shifted = {steps: mean(zip(reference, (embedding(at(higher(clip, steps), -30)) for clip in clips))) for steps in (1, 2)}
print("both at -30 dB, one shifted up:", ", ".join(f"by {steps} semitones {value:.3f}" for steps, value in shifted.items()))
loud = [embedding(at(clip, -20)) for clip in clips]
others = [(i, j) for i in range(len(clips)) for j in range(len(clips)) if i != j]
alike, apart = mean((reference[i], reference[j]) for i, j in others), mean((reference[i], loud[j]) for i, j in others)
print(f"two sentences of the voice: both at -30 dB {alike:.3f}, one of them at -20 dB {apart:.3f}")
silence = np.zeros(8 * RATE, np.float32)
behind = {level: mean((embedding(at(clip, level)), embedding(np.append(at(clip, level), silence))) for clip in clips) for level in (-20, -35)}
print("8 s of silence behind a clip:", ", ".join(f"at {level} dB {value:.3f}" for level, value in behind.items()))
assert min(louder[-50], louder[-40]) > 0.9999, "the behaviour has changed: soft levels differ"
assert louder[-20] < 0.9 and louder[-20] < shifted[1], "the behaviour has changed: a louder clip has the same voice"
assert apart < alike - 0.03, "the behaviour has changed: the level of another sentence does not matter"
assert behind[-20] > 0.999 and behind[-35] < 0.97, "the behaviour has changed: silence counts otherwise"
PYTHON
