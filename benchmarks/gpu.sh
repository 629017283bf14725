#!/usr/bin/env bash
# Checks and times every sm90 kernel on a Hopper GPU, and compares its bits with those of the virtual
# GPU, in less than nine minutes.
#
#   benchmarks/gpu.sh build          on a machine with the project's .venv: cubins into .gpu/
#   benchmarks/gpu.sh [OPTION...]    on the GPU machine, with .gpu/ carried there
#   benchmarks/gpu.sh --dry          anywhere with the .venv: the same steps, interpreted, tiny
#
# Needs torch and numpy there, and a C++ compiler or the ziglang wheel for the virtual GPU; no Triton.
# Results: $OUT/twins.jsonl and $OUT/gpu.jsonl (here without OUT). Options go to `benchmarks/run.py`:
# --only attention. Where results differ, the others are still timed, and the exit status is not 0.
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
status=0
timeout 150 "$python" benchmarks/run.py twins --kernels .gpu --out "${OUT:-.}/twins.jsonl" "$@" || status=$?
timeout 380 "$python" benchmarks/run.py gpu --kernels .gpu --out "${OUT:-.}/gpu.jsonl" "$@" || status=$?
exit "$status"
