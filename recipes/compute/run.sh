#!/usr/bin/env bash
# The arithmetic of 10 s of speech, by the paper's counting and by ours, and what speech takes on this machine.
#
#   recipes/compute/run.sh OUT [full|small|nano [small|full|nano]]      # size that is counted, size that is timed
set -euo pipefail
out=${1:?the folder to write} size=${2:-full} timed=${3:-small}
mkdir -p "$out"
kalle bench compute --size "$size" --out "$out/compute-$size.json"
kalle bench synthesis --size "$timed" --seconds 4 --batch 4 --minutes "${MINUTES:-10}" --out "$out/synthesis-$timed.json"
