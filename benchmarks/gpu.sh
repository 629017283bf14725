#!/usr/bin/env bash
# Checks and times every sm90 kernel on a Hopper GPU, in less than nine minutes.
#
#   benchmarks/gpu.sh build          on a machine with the project's .venv: cubins into .gpu/
#   benchmarks/gpu.sh [OPTION...]    on the GPU machine, with .gpu/ carried there
#   benchmarks/gpu.sh --dry          anywhere with the .venv: the same steps, interpreted, tiny
#
# Needs torch and numpy there; no Triton, no compiler. Results: $OUT/gpu.jsonl (here without OUT).
# Options go to `benchmarks/run.py gpu`: --only attention.
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [[ "${1:-}" == build ]]; then
  exec "$python" benchmarks/run.py cubins .gpu --arch sm90
fi
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw --format=csv,noheader
fi
exec timeout 530 "$python" benchmarks/run.py gpu --kernels .gpu --out "${OUT:-.}/gpu.jsonl" "$@"
