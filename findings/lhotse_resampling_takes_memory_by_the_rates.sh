#!/usr/bin/env bash
# lhotse: the memory that resampling a recording takes depends on the two rates, and hardly on how long the recording is.
#
# One would guess that a tenth of a second costs little, whatever its rate, and that rates that are nearly equal cost least.
#
# What happens: the filter has a row for every phase, of which there are as many as the target rate over the greatest common divisor of both. From
# 44,100 to 16,000 Hz that is 160 rows; between neighbours such as 3,999 and 4,000 Hz it is one for every sample of a second, and each row is as
# long. A tenth of a second then takes some hundred megabytes, which grow with the square of the rate, and the filter is kept for good.
#
# Why it matters for speech: recorders with a clock of their own, video and damaged headers give rates one beside the usual one. A single such
# recording of 16 kHz in a corpus ends a process for want of memory that reads thousands of ordinary ones (seen at 18 GB). Look at the divisor first,
# and resample such a file by another library once (soxr takes no such filter).
#
# lhotse 1.33.0 (which imports urllib3 without requiring it), torch and torchaudio 2.11.0, CPU, Linux x86-64, 2026-11-30. The rates here are low, so that it stays below a gigabyte.
# Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install lhotse==1.33.0 torch==2.11.0 torchaudio==2.11.0 numpy==2.4.6 urllib3==2.8.0
"$folder/env/bin/python" - <<'PYTHON'
import resource
from importlib.metadata import version

import numpy as np
from lhotse.augmentation import Resample

print("lhotse", version("lhotse"), "torch", version("torch"))


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def grown(source_hz, target_hz, seconds):
    """Megabytes by which the largest memory of the process rises."""
    before = peak_mb()
    Resample(source_hz, target_hz)(np.zeros((1, round(seconds * source_hz)), np.float32), source_hz)
    return peak_mb() - before


grown(8000, 4000, 0.1)  # what is loaded once
usual = grown(44100, 16000, 10)
small, large = grown(1999, 2000, 0.1), grown(3999, 4000, 0.1)
print(f"10 s from 44,100 to 16,000 Hz: {usual:.0f} MB more")
print(f"0.1 s from 1,999 to 2,000 Hz: {small:.0f} MB more; from 3,999 to 4,000 Hz: {large:.0f} MB more")
assert large > 100 and large > 5 * usual, "the behaviour has changed: rates without a common divisor are no longer costly"
PYTHON
