#!/usr/bin/env bash
# Similarity and error against the steps of test-time training: run.sh MODEL RECORDING "what is said in it" [OPTIONS of run.py]
set -euo pipefail
cd "$(dirname "$0")/../.."
model=${1:?weight folder} recording=${2:?recording} text=${3:?transcript}
shift 3
exec python recipes/adapt/run.py --model "$model" --audio "$recording" --text "$text" "$@"
