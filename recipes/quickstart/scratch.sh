#!/usr/bin/env bash
# quickstart-scratch without make: needs an environment with '.[train,eval]' installed. Arguments go to scratch.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python recipes/quickstart/scratch.py "$@"
