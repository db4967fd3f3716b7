#!/usr/bin/env bash
# LibriTTS or LibriTTS-R: prepare, look at the data, train both stages, encode, calibrate, score. README.md has hardware and numbers.
#
#   recipes/libritts/run.sh /data/LibriTTS_R runs/libritts                # the full models
#   SCALE=nano recipes/libritts/run.sh /data/LibriTTS_R runs/libritts     # small ones, on a CPU
#
# Every line is an ordinary `kalle` command that knows what it has done: run the script again after an interruption. More words go to both trainings as
# Hydra overrides, such as trainer.devices=8.
set -euo pipefail
data=${1:?the folder that holds train-clean-100 and its kind} out=${2:?the folder to write} && shift 2

scale=${SCALE:-full}
flowvae_steps=${FLOWVAE_STEPS:-} lm_steps=${LM_STEPS:-}
case $scale in
  full)
    flowvae=(flowvae=full)
    lm=(lm=small tokenizer=bytes lm.latent_dim=512 optimizer.lr=2e-4 objective.end_weight=0.2)
    : "${flowvae_steps:=1000000}" "${lm_steps:=300000}"
    ;;
  nano)
    flowvae=(experiment=quickstart_flowvae)
    lm=(experiment=quickstart_lm)
    : "${flowvae_steps:=4000}" "${lm_steps:=8000}"
    ;;
  *) echo "SCALE: got '$scale', expected full or nano" >&2 && exit 2 ;;
esac

kalle prepare libritts "$data" --out "$out/corpus"
kalle data doctor "$out/corpus" --out "$out/doctor" --filter "$out/clean"
kalle train flowvae "${flowvae[@]}" data.corpus="$out/clean" out="$out/flowvae" trainer.max_steps="$flowvae_steps" "$@"
kalle evaluate kind=reconstruction model="$out/flowvae/weights" testset="$out/clean" out="$out/reconstruction" testset.limit="${ITEMS:-200}"
kalle encode flowvae="$out/flowvae/weights" corpus="$out/clean" out="$out/latents"
kalle train lm "${lm[@]}" data.latents="$out/latents" flowvae="$out/flowvae/weights" out="$out/lm" trainer.max_steps="$lm_steps" "$@"
kalle evaluate kind=synthesis model="$out/lm/weights" testset="$out/clean" out="$out/synthesis" synthesis.prompts=speaker testset.limit="${ITEMS:-200}"
