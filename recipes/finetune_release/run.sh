#!/usr/bin/env bash
# Fine-tune released (or any) weights on recordings of one's own, mixed 1:1 with a base list as the authors did. README.md has hardware and numbers.
#
#   kalle download && kalle say "Hello."                                                     # once: ckpt/kalle-release
#   recipes/finetune_release/run.sh ckpt/kalle-release corpora/mine runs/mine                # all weights
#   LORA=16 BASE=latents/base recipes/finetune_release/run.sh ckpt/kalle-release corpora/mine runs/mine
#
# corpora/mine is what `kalle prepare` wrote. BASE is a latent folder of the same Flow-VAE, mixed in 1:1 so that the model forgets nothing. Run it again after
# an interruption. More words go to the training as Hydra overrides.
set -euo pipefail
weights=${1:?the weight folder to start from} corpus=${2:?a folder that kalle prepare wrote} out=${3:?the folder to write} && shift 3

# The authors' scripts: lr 3e-5 for 512 dimensions, after which their learning rate hardly falls.
tuning=(optimizer.lr="${LR:-3e-5}" trainer.max_steps="${STEPS:-2000}" scheduler.warmup_steps="${WARMUP:-100}")
[[ -n ${LORA:-} ]] && tuning=(optimizer.lr="${LR:-1e-4}" trainer.max_steps="${STEPS:-2000}" scheduler.warmup_steps="${WARMUP:-100}" +lora.rank="$LORA")

kalle data doctor "$corpus" --out "$out/doctor" --filter "$out/clean"
kalle encode flowvae="$weights" corpus="$out/clean" out="$out/latents"
mix=(data.latents="$out/latents")
[[ -n ${BASE:-} ]] && mix=("data.latents=[$out/latents,$BASE]" data.mix=equal)
kalle evaluate kind=synthesis model="$weights" testset="$out/clean" out="$out/before" synthesis.prompts=speaker testset.limit="${ITEMS:-100}"
kalle train lm init="$weights" flowvae="$weights" "${mix[@]}" out="$out/lm" "${tuning[@]}" "$@"
kalle calibrate "$out/lm/weights" --latents "$out/latents"
kalle evaluate kind=synthesis model="$out/lm/weights" testset="$out/clean" out="$out/after" synthesis.prompts=speaker testset.limit="${ITEMS:-100}"
