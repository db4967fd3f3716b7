#!/usr/bin/env bash
# Check and measure kalle on a CUDA device within 12 minutes: the GPU tests, then synthesis and training.
#
#   scripts/gpu_check.sh [OUT]     results into OUT (default docs/results/gpu): a JSON file and a log a step, and summary.md
#   scripts/gpu_check.sh --list    print the steps with their time limits, run nothing
#
# Needs an environment with kalle's dependencies and pytest; PYTHON names its interpreter. A step that fails or runs
# out of its time does not end the others; the exit code is 1 when one did.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

list=no
[ "${1:-}" != --list ] || { list=yes; shift; }
out=${1:-docs/results/gpu}
kalle="$python -m kalle"
# name | seconds at most | command
steps="
tests|150|$python -m pytest -m gpu --timeout 140
synthesis_full|160|$kalle bench synthesis --size full --device cuda --engine bfloat16 --engine float16 --engine graph --seconds 4 --seconds 10 --batch 8 --batch 64 --no-uncached --minutes 2 --out $out/synthesis_full.json
synthesis_nano|60|$kalle bench synthesis --model ckpt/kalle-nano --device cuda --engine bfloat16 --engine graph --seconds 4 --seconds 10 --batch 8 --batch 64 --no-uncached --minutes 0.7 --out $out/synthesis_nano.json
release_full|80|$kalle bench synthesis --size full --device cuda --engine bfloat16 --seconds 4 --minutes 1 --out $out/release_full.json
streaming_full|40|$kalle bench streaming --size full --device cuda --chunk 1 --chunk 4 --out $out/streaming_full.json
train_lm|110|$kalle bench train lm --size full --positions 8000 --steps 5 --rounds 1 --compile --minutes 1.3 --device cuda --out $out/train_lm.json
train_flowvae|120|$kalle bench train flowvae --size small --steps 5 --rounds 1 --compile --minutes 1.3 --device cuda --out $out/train_flowvae.json
"
if [ $list = yes ]; then
  printf '%s' "$steps" | sed -n 's/^\([^|]*\)|\([^|]*\)|/\2 s at most: /p'
  exit 0
fi

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: got a torch that sees none, expected one; run this on a machine with a GPU")' || exit 1
mkdir -p "$out"
failed=0
{
  echo "| step | result | seconds |"
  echo "|---|---|---|"
} > "$out/summary.md"
while IFS='|' read -r name limit command; do
  [ -n "$name" ] || continue
  echo "== $name (at most $limit s): $command"
  start=$SECONDS
  timeout -k 5 "$limit" bash -c "$command" 2>&1 < /dev/null | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) result=passed ;;
    124 | 137) result="stopped after $limit s" failed=1 ;;
    *) result="failed with exit code $code" failed=1 ;;
  esac
  echo "| $name | $result | $((SECONDS - start)) |" >> "$out/summary.md"
done <<< "$steps"
{
  echo
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" -c 'import torch; print("torch", torch.__version__)'
  git rev-parse --short HEAD 2> /dev/null
} >> "$out/summary.md"
cat "$out/summary.md"
exit "$failed"
