#!/usr/bin/env bash
# Fine-tune released (or any) weights on recordings of one's own, mixed 1:1 with a base list as the authors did. README.md has hardware and numbers.
#
#   kalle download && kalle say "Hello." -o hello.wav                                        # once: ckpt/kalle-release
#   recipes/finetune_release/run.sh ckpt/kalle-release corpora/mine runs/mine                # all weights
#   LORA=16 BASE=latents/base recipes/finetune_release/run.sh ckpt/kalle-release corpora/mine runs/mine
#
# corpora/mine is what `kalle prepare` wrote. BASE is a latent folder of the same Flow-VAE, mixed in 1:1 so that the model forgets nothing. Run it again
# after an interruption. More words go to the training as Hydra overrides, those in SCORE to the evaluations.
set -euo pipefail
weights=${1:?the weight folder to start from} corpus=${2:?a folder that kalle prepare wrote} out=${3:?the folder to write} && shift 3
read -ra score <<< "${SCORE:-}"

if [[ -n ${LORA:-} ]]; then
  tuning=(experiment=lora lora.rank="$LORA")
else
  tuning=(experiment=sft)
fi
mix=(data.latents="$out/latents")
[[ -n ${BASE:-} ]] && mix=("data.latents=[$out/latents,$BASE]" data.mix=equal)
scoring=(kind=synthesis testset="$out/clean" synthesis.prompts=speaker testset.limit="${ITEMS:-100}" "${score[@]}")

kalle data doctor "$corpus" --out "$out/doctor" --filter "$out/clean" || [[ $? -eq 1 ]] # 1: a bad verdict, which the report explains
kalle encode flowvae="$weights" corpus="$out/clean" out="$out/latents"
kalle evaluate model="$weights" out="$out/before" "${scoring[@]}"
kalle train lm "${tuning[@]}" init="$weights" flowvae="$weights" tokenizer.folder="$weights/tokenizer" "${mix[@]}" out="$out/lm" trainer.max_steps="${STEPS:-2000}" "$@"
kalle calibrate "$out/lm/weights" --latents "$out/latents"
kalle evaluate model="$out/lm/weights" out="$out/after" "${scoring[@]}"
