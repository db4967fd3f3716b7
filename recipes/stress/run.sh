#!/usr/bin/env bash
# Texts that synthesis fails on, three seeds each, and a table by kind of text. README.md says more.
#
#   recipes/stress/run.sh model=ckpt/kalle-nano runs/stress
#   recipes/stress/run.sh wavs=theirs runs/stress
set -euo pipefail
here=$(dirname "$0")
source=${1:?model=FOLDER or wavs=FOLDER} out=${2:?the folder to write} && shift 2
SIM=no UTMOS=no . "$here/../at_hand.sh"
[[ $source == model=* ]] && kind=synthesis || kind=wavs
kalle evaluate protocol=stress kind="$kind" testset.path="$here/texts.jsonl" "$source" out="$out" "${score[@]}" "$@"
python "$here/summary.py" "$out"
