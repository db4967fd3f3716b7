#!/usr/bin/env bash
# Seed-TTS test sets: synthesise with a model, or score anybody's folder of wavs, by the official protocol. README.md has the published rows.
#
#   recipes/seed_tts_eval/run.sh en seedtts_testset model=ckpt/mine runs/seed-en metrics.sim.checkpoint=wavlm_large_finetune.pth
#   recipes/seed_tts_eval/run.sh hard seedtts_testset wavs=theirs runs/seed-hard metrics.sim.checkpoint=wavlm_large_finetune.pth
#   STEPS=200 recipes/seed_tts_eval/run.sh en seedtts_testset adapt=ckpt/mine runs/seed-en-ttt metrics.sim.checkpoint=wavlm_large_finetune.pth
#   AT_HAND=1 ITEMS=20 recipes/seed_tts_eval/run.sh en seedtts_testset model=ckpt/kalle-nano runs/try
#
# More words go to `kalle evaluate`. Run it again after an interruption: what is scored is kept.
set -euo pipefail
part=${1:?en, zh or hard} sets=${2:?the folder with en/ and zh/} source=${3:?model=FOLDER, adapt=FOLDER or wavs=FOLDER} out=${4:?the folder to write} && shift 4
UTMOS=no . "$(dirname "$0")/../at_hand.sh"
case $part in
  en) protocol=seed_tts_en list=en/meta.lst ;;
  zh) protocol=seed_tts_zh list=zh/meta.lst ;;
  hard) protocol=seed_tts_zh list=zh/hardcase.lst ;;
  *) echo "part: got '$part', expected en, zh or hard" >&2 && exit 2 ;;
esac
case $source in
  model=*) kind=synthesis ;;
  wavs=*) kind=wavs ;;
  adapt=*) # learn each line's prompt before it is spoken, all weights in STEPS steps as in the paper
    kind=wavs language=${part/hard/zh}
    kalle evaluate check=true protocol="$protocol" kind=synthesis testset.path="$sets/$list" model="${source#adapt=}" out="$out" "${score[@]}" "$@"
    python "$(dirname "$0")/adapted.py" "$sets/$list" "${source#adapt=}" "$out/adapted" --language "$language" --full \
      ${STEPS:+--steps "$STEPS"} ${ITEMS:+--limit "$ITEMS"}
    source=wavs=$out/adapted ;;
  *) echo "source: got '$source', expected model=FOLDER, adapt=FOLDER or wavs=FOLDER" >&2 && exit 2 ;;
esac
kalle evaluate protocol="$protocol" kind="$kind" testset.path="$sets/$list" "$source" out="$out" "${score[@]}" "$@"
