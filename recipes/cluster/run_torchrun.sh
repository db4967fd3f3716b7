#!/usr/bin/env bash
# A language model on all GPUs of one machine, from a prepared corpus and a Flow-VAE: encode, train, evaluate.
# run_torchrun.sh CORPUS FLOWVAE OUT [PROCESSES] [OVERRIDE ...]     the overrides go to the training
set -euo pipefail
corpus=$1 flowvae=$2 out=$3 processes=${4:-$(nvidia-smi -L 2>/dev/null | wc -l)}
shift $(($# < 4 ? $# : 4))
[ "$processes" -ge 1 ] || processes=1
ranks=(torchrun --standalone --nproc-per-node "$processes" -m kalle)

"${ranks[@]}" encode flowvae="$flowvae" corpus="$corpus" out="$out/latents"
"${ranks[@]}" train lm data.latents="$out/latents" flowvae="$flowvae" out="$out/lm" trainer=ddp "$@"
"${ranks[@]}" evaluate kind=synthesis model="$out/lm/weights" testset="$corpus" out="$out/evaluation"
