#!/usr/bin/env bash
# The first hour on a GPU that nobody here has: what its owner runs, and the one file to send back.
#
#   benchmarks/first_hour.sh                                   about 20 minutes, no weights needed
#   benchmarks/first_hour.sh --package DIR --models DIR        and a clip of a real package
#   benchmarks/first_hour.sh --dry                             anywhere: the same steps, tiny, on a CPU
#
# Before: `make setup`, which installs the PyTorch that the driver here can run. A GPU that PyTorch
# cannot use ends this at once. Writes first_hour.json ($OUT, or here) after each step, so that it can be
# stopped. It holds no names of folders, users or hosts.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ! -x .venv/bin/python ]]; then
  echo "error: there is no .venv here. Run make setup first." >&2
  exit 1
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec .venv/bin/python benchmarks/first_hour.py --out "${OUT:-.}/first_hour.json" "$@"
