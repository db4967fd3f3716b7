#!/usr/bin/env bash
# kalle-nano from nothing: needs an environment with '.[train,eval]' installed. Arguments go to run.py; README.md explains them.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python recipes/nano/run.py "$@"
