#!/usr/bin/env bash
# wetext (the front end of WeTextProcessing): English decades become seconds, and a thousand with a comma loses its "one".
#
# A normaliser in front of a synthesis writes out what a reader would say. Of "the 1980s" one would guess "the nineteen eighties" (or, from a
# program without a rule for it, the input as it was), and of "1,234" the words of 1234.
#
# What happens: a year with an s is taken for a measure, a number of seconds: "the 1980s" is "the one thousand nine hundred and eighty seconds", while
# "1980" alone is "nineteen eighty". Every number from 1,000 to 1,999 that has a comma begins with a bare "thousand" ("thousand two hundred and thirty
# four"), with or without a currency; from 2,000 on the words are right. A full stop of "No." stays behind its word: "Number. five", which is a pause,
# or the end of a sentence for whatever splits the text afterwards.
#
# Why it matters for speech: nothing fails, and the result is spoken fluently, so neither the synthesis' own checks nor a word error rate against the
# normalised text shows it. Decades, prices and populations between one and two thousand are common in news and narration. Expand them before the text
# goes to wetext, or compare its output with a table of readings.
#
# wetext 0.1.8, Python 3.11, Linux x86-64, 2026-11-30. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install wetext==0.1.8
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

from wetext import Normalizer

print("wetext", version("wetext"))
READINGS = {
    "the 1980s": "the one thousand nine hundred and eighty seconds",
    "in 1980": "in nineteen eighty",
    "It has 1,234 points.": "It has thousand two hundred and thirty four points.",
    "It costs $1,100.": "It costs thousand one hundred dollars.",
    "We sold 2,015 copies.": "We sold two thousand and fifteen copies.",
    "platform No. 5": "platform Number. five",
}
normaliser = Normalizer(lang="en")
changed = []
for text, expected in READINGS.items():
    reading = normaliser.normalize(text)
    print(f"{text!r:24} -> {reading!r}")
    if reading != expected:
        changed.append(f"{text!r}: {reading!r}, was {expected!r}")
assert not changed, f"the behaviour has changed: {'; '.join(changed)}"
PYTHON
