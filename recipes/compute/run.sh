#!/usr/bin/env bash
# The arithmetic of 10 s of speech, by the paper's counting and by ours: recipes/compute/run.sh OUT [full|nano]
set -euo pipefail
out=${1:?the folder to write} size=${2:-full}
mkdir -p "$out"
kalle bench compute --size "$size" --out "$out/compute-$size.json"
