#!/usr/bin/env bash
# speechmos (DNSMOS): the last one to two seconds of a clip of nine seconds or more are not part of its score.
#
# DNSMOS predicts what listeners would say of a whole recording, and the package scores windows of 9.01 s that move by 1 s. One
# would guess that the last window ends with the recording, or that the rest is padded and scored like the start.
#
# What happens: the number of windows is computed from whole seconds (floor of the length, minus 9.01, rounded towards zero, plus one), so
# behind the last window between 0.99 and 1.98 s remain that no window contains; for a clip of 9.01 to 9.99 s it is what exceeds 9.01 s.
# Replacing them by noise at full scale changes no bit of any of the four scores, the same noise one second earlier takes
# more than a point. (A shorter clip is repeated until it is long enough, so its end is heard.)
#
# Why it matters for speech: synthesis fails at the end. Babble after the last word, a click, a cut-off word or a loop that starts there
# leave the score of a long sentence untouched, so a mean of DNSMOS cannot rank two systems by how they stop. Move the
# clip's end to a window's end (or score it with a second's shift too) when the end is what is compared.
#
# speechmos 0.0.1.1, onnxruntime 1.32.0, librosa 0.11.0, numpy 2.4.6, CPU, Linux x86-64, 2026-11-30. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
# speechmos declares no requirements; these are what it imports.
"$folder/env/bin/pip" --quiet --disable-pip-version-check install speechmos==0.0.1.1 onnxruntime==1.32.0 librosa==0.11.0 numpy==2.4.6 requests==2.32.5 tqdm==4.67.1
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from speechmos import dnsmos

RATE = 16000
print("speechmos", version("speechmos"), "onnxruntime", version("onnxruntime"))


def voiced(seconds):
    """Syllable-like harmonic tones of a gliding pitch over weak noise, at most 0.5."""
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(130 + 30 * np.sin(2 * np.pi * 0.4 * time)) / RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    envelope = np.clip(np.sin(2 * np.pi * 2 * time), 0, None)
    wave = tone * envelope + 0.003 * np.random.default_rng(0).standard_normal(time.size)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def scores(wave):
    return {name: float(value) for name, value in dnsmos.run(wave, RATE).items()}


unheard = {}
for seconds in (9.9, 10.9, 11.0, 14.9):
    clean = voiced(seconds)
    windows = int(np.floor(seconds) - 9.01) + 1
    heard = windows - 1 + 9.01
    end = clean.copy()
    end[int(np.ceil(heard * RATE)) :] = np.random.default_rng(1).uniform(-1, 1, end.size - int(np.ceil(heard * RATE)))
    before = clean.copy()
    start = int((heard - 1) * RATE)
    before[start : start + RATE] = np.random.default_rng(1).uniform(-1, 1, RATE)
    reference, replaced, inside = scores(clean), scores(end), scores(before)
    unheard[seconds] = reference == replaced
    print(
        f"{seconds:5.1f} s: {windows} windows, {seconds - heard:.2f} s behind the last; overall score {reference['ovrl_mos']:.3f}, "
        f"with noise there {replaced['ovrl_mos']:.3f} ({'the same bits' if unheard[seconds] else 'different'}), with noise a second earlier {inside['ovrl_mos']:.3f}"
    )
    assert inside != reference, "the behaviour has changed: the noise inside the last window is not heard either"
assert all(unheard.values()), "the behaviour has changed"
PYTHON
