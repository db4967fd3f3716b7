#!/usr/bin/env bash
# The quickstart without make: needs an environment with '.[train,eval]' installed. Arguments go to run.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python recipes/quickstart/run.py "$@"
