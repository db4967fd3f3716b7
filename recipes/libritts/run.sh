#!/usr/bin/env bash
# LibriTTS or LibriTTS-R: prepare, judge the data, train both stages, encode, calibrate, score. README.md has hardware and numbers.
#
#   recipes/libritts/run.sh /data/LibriTTS_R runs/libritts                # the full Flow-VAE, a small language model
#   SCALE=nano recipes/libritts/run.sh /data/LibriTTS_R runs/libritts     # both small, on a CPU
#
# Every line is an ordinary `kalle` command that knows what it has done: run the script again after an interruption. More words go to both trainings as
# Hydra overrides, such as trainer.devices=8, those in SCORE to the evaluations.
set -euo pipefail
data=${1:?the folder that holds train-clean-100 and its kind} out=${2:?the folder to write} && shift 2
read -ra score <<< "${SCORE:-}"

case ${SCALE:-full} in
  full)
    flowvae=(flowvae=full trainer.max_steps="${FLOWVAE_STEPS:-1000000}")
    lm=(lm=small tokenizer=bytes lm.latent_dim=512 packing=true optimizer.lr=2e-4 objective.end_weight=0.2 trainer.max_steps="${LM_STEPS:-300000}")
    ;;
  nano)
    flowvae=(experiment=quickstart_flowvae trainer.max_steps="${FLOWVAE_STEPS:-4000}")
    lm=(experiment=quickstart_lm packing=true trainer.max_steps="${LM_STEPS:-8000}")
    ;;
  *) echo "SCALE: got '$SCALE', expected full or nano" >&2 && exit 2 ;;
esac
scoring=(testset="$out/clean" testset.limit="${ITEMS:-200}" "${score[@]}")

kalle prepare libritts "$data" --out "$out/corpus" --jobs "${JOBS:-$(nproc)}"
kalle data doctor "$out/corpus" --out "$out/doctor" --filter "$out/clean" --jobs "${JOBS:-$(nproc)}" || [[ $? -eq 1 ]] # 1: a bad verdict, see its report
kalle train flowvae "${flowvae[@]}" data.corpus="$out/clean" out="$out/flowvae" "$@"
kalle evaluate kind=reconstruction model="$out/flowvae/weights" out="$out/reconstruction" "${scoring[@]}"
kalle encode flowvae="$out/flowvae/weights" corpus="$out/clean" out="$out/latents"
kalle train lm "${lm[@]}" data.latents="$out/latents" flowvae="$out/flowvae/weights" out="$out/lm" "$@"
kalle calibrate "$out/lm/weights" --latents "$out/latents" || echo "no usable stop threshold yet: train longer" >&2
kalle evaluate kind=synthesis model="$out/lm/weights" out="$out/synthesis" synthesis.prompts=speaker "${scoring[@]}"
