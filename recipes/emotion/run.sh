#!/usr/bin/env bash
# Emotion from the text alone: sixty texts of six emotions, three seeds, labelled by emotion2vec+; a heat map and its numbers. README.md says more.
#
#   recipes/emotion/run.sh model=ckpt/mine runs/emotion                        # needs pip install funasr; the classifier downloads itself
#   recipes/emotion/run.sh model=ckpt/mine runs/emotion metrics.emotion.model=FOLDER
set -euo pipefail
here=$(dirname "$0")
source=${1:?model=FOLDER or wavs=FOLDER} out=${2:?the folder to write} && shift 2
SIM=no UTMOS=no . "$here/../at_hand.sh"
[[ $source == model=* ]] && kind=synthesis || kind=wavs
kalle evaluate protocol=emotion kind="$kind" testset.path="$here/texts.jsonl" "$source" out="$out" "${score[@]}" "$@"
python "$here/heat_map.py" "$out"
