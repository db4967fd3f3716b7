#!/usr/bin/env bash
# LibriSpeech test-clean cloning: `continuation` of the first three seconds, or `cross` sentences of the same speaker. README.md has the published rows.
#
#   recipes/librispeech_cloning/run.sh continuation LibriSpeech/test-clean ckpt/mine runs/continuation metrics.sim.checkpoint=FILE metrics.utmos.weights=FILE
#   PAIRS=librispeech_pc_test_clean_cross_sentence.lst recipes/librispeech_cloning/run.sh cross LibriSpeech/test-clean ckpt/mine runs/cross …
#   AT_HAND=1 ITEMS=20 recipes/librispeech_cloning/run.sh continuation LibriSpeech/test-clean ckpt/kalle-nano runs/try
set -euo pipefail
here=$(dirname "$0")
kind=${1:?continuation or cross} data=${2:?the folder LibriSpeech/test-clean} model=${3:?weight folder} out=${4:?the folder to write} && shift 4
. "$here/../at_hand.sh"
case $kind in
  continuation) # cutting hears every utterance: what scores them is looked for before, on the list of the whole recordings without prompts
    protocol=librispeech_continuation
    python "$here/lists.py" recordings "$data" "$out/recordings.jsonl"
    kalle evaluate check=true protocol="$protocol" testset.path="$out/recordings.jsonl" model="$model" out="$out" "${score[@]}" \
      "$@" synthesis.prompts=none
    python "$here/lists.py" continuation "$data" "$out/list.jsonl" ;;
  cross) protocol=librispeech_cross_sentence && python "$here/lists.py" cross "$data" "$out/list.jsonl" --pairs "${PAIRS:?the list of pairs}" ;;
  *) echo "kind: got '$kind', expected continuation or cross" >&2 && exit 2 ;;
esac
kalle evaluate protocol="$protocol" testset.path="$out/list.jsonl" model="$model" out="$out" "${score[@]}" "$@"
