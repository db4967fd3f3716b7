#!/usr/bin/env bash
# Emilia: json + mp3 folders or WebDataset tars in, a language model with the speaker voice distribution out. README.md has hardware and numbers.
#
#   recipes/emilia/run.sh FLOWVAE_WEIGHTS /data/Emilia runs/emilia                  # after a Flow-VAE, such as that of recipes/libritts
#   SCALE=nano recipes/emilia/run.sh runs/libritts/flowvae/weights DIR runs/emilia  # a small language model, on a CPU
#
# Run it again after an interruption. More words go to the training as Hydra overrides, those in SCORE to the evaluation. On several machines see
# recipes/cluster.
set -euo pipefail
flowvae=${1:?a weight folder with a Flow-VAE} data=${2:?the Emilia folder} out=${3:?the folder to write} && shift 3
read -ra score <<< "${SCORE:-}"

case ${SCALE:-full} in
  full)
    # The authors' scripts: about 3 epochs of 96.7 k hours, 24000 positions a GPU on 8 of them, from Llama's text weights (INIT_TEXT names their folder).
    lm=(lm=full_speaker data=lm_speaker packing=true objective.speaker_drop=0.1 trainer.max_steps="${LM_STEPS:-253000}")
    [[ -n ${INIT_TEXT:-} ]] && lm+=(init_text="$INIT_TEXT")
    ;;
  nano)
    lm=(experiment=quickstart_lm lm=nano_speaker data=lm_speaker packing=true objective.speaker_drop=0.1 trainer.max_steps="${LM_STEPS:-8000}")
    ;;
  *) echo "SCALE: got '$SCALE', expected full or nano" >&2 && exit 2 ;;
esac

kalle prepare emilia "$data" --out "$out/corpus" --jobs "${JOBS:-$(nproc)}"
kalle data doctor "$out/corpus" --out "$out/doctor" --jobs "${JOBS:-$(nproc)}" || [[ $? -eq 1 ]] # 1: a bad verdict, which the report explains
kalle encode flowvae="$flowvae" corpus="$out/corpus" out="$out/latents" speaker_mels=true
kalle train lm "${lm[@]}" data.latents="$out/latents" flowvae="$flowvae" out="$out/lm" "$@"
kalle calibrate "$out/lm/weights" --latents "$out/latents" || echo "no usable stop threshold yet: train longer" >&2
kalle evaluate kind=synthesis model="$out/lm/weights" testset="$out/corpus" out="$out/synthesis" synthesis.prompts=speaker testset.limit="${ITEMS:-200}" "${score[@]}"
