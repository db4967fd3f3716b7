#!/usr/bin/env bash
# wetext (the front end of WeTextProcessing), Chinese: before a unit that its grammar lacks, 110, 120 and some others are telephone numbers.
#
# A number with a unit is a quantity, so of "110V", "120Hz" or "120㎡" one would guess "one hundred and ten", "one hundred and twenty", as of 130,
# whether the unit itself is known or left as it is.
#
# What happens: seventeen numbers up to 13,000 that are service lines in China (110 is the police, 120 the ambulance, 12306 the railway) are read digit by
# digit, with the "yao" of telephone numbers, wherever no known measure follows. V, Hz, ㎡ and fps are not known: "110V" is "yao yao ling V" and 130V
# "one hundred and thirty V". Before the unit is spoken at all, its first letter may be taken: "5000mAh" is "five thousand metres Ah", "5mA" "five metres A".
#
# Why it matters for speech: 110 V, 120 Hz, 120 m² and mAh stand in every text about devices or flats. The result is fluent, differs from that of the
# neighbouring numbers, and a word error rate against the normalised text does not show it. Write such units out before the text goes to wetext.
#
# wetext 0.1.8, kaldifst 1.8.3, Python 3.11, Linux x86-64, 2026-12-01. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install wetext==0.1.8 kaldifst==1.8.3
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

from wetext import Normalizer

print("wetext", version("wetext"), "kaldifst", version("kaldifst"))
READINGS = {
    "110V": "幺幺零V",
    "130V": "一百三十V",
    "频率是120Hz。": "频率是幺二零Hz。",
    "频率是130Hz。": "频率是一百三十Hz。",
    "房子120㎡。": "房子幺二零㎡。",
    "他跑了120米。": "他跑了一百二十米。",
    "5000mAh": "五千米Ah",
    "5mA": "五米A",
}
normaliser = Normalizer(lang="zh", operator="tn")
changed = []
for text, expected in READINGS.items():
    reading = normaliser.normalize(text)
    print(f"{text:12} -> {reading}")
    if reading != expected:
        changed.append(f"{text}: {reading}, was {expected}")
# Two is no telephone number: before metres it is "liang", the two of counting, and before an unknown unit "er".
lines = [n for n in range(3, 13000) if normaliser.normalize(f"{n}Hz") != normaliser.normalize(f"{n}米").replace("米", "Hz")]
print("read digit by digit before Hz:", len(lines), lines)
if len(lines) != 17:
    changed.append(f"{len(lines)} numbers, were 17")
assert not changed, f"the behaviour has changed: {'; '.join(changed)}"
PYTHON
