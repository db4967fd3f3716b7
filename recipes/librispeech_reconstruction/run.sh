#!/usr/bin/env bash
# The paper's table 1: LibriSpeech test-clean through the Flow-VAE. README.md has the published rows.
#
#   recipes/librispeech_reconstruction/run.sh LibriSpeech/test-clean ckpt/mine runs/reconstruction \
#       metrics.sim.checkpoint=wavlm_large_finetune.pth metrics.utmos.weights=utmos.pt
#   AT_HAND=1 ITEMS=50 recipes/librispeech_reconstruction/run.sh LibriSpeech/test-clean ckpt/kalle-nano runs/try
set -euo pipefail
here=$(dirname "$0")
data=${1:?the folder LibriSpeech/test-clean} model=${2:?weight folder} out=${3:?the folder to write} && shift 3
. "$here/../at_hand.sh"
score=("${score[@]/metrics.wer.*/}") # no words are recognised here
python "$here/../librispeech_cloning/lists.py" recordings "$data" "$out/list.jsonl"
kalle evaluate protocol=librispeech_reconstruction testset.path="$out/list.jsonl" model="$model" out="$out" ${score[@]+${score[@]}} "$@"
