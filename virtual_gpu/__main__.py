"""Compiles all kernels of the 14B model, proves their machine code, runs them, and writes a report.

    python -m virtual_gpu [--state DIR] [--out docs/proof.md] [--broken 1000] [--processes 2]

Exits with 1 if a kernel is wrong, or if less than 98 % of broken kernels are found out.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from kernels.aot.compile import compile_kernels
from kernels.arch import ARCHS
from virtual_gpu.cases import table
from virtual_gpu.machine import the_machine
from virtual_gpu.proof import prove_architecture, try_breaks
from virtual_gpu.report import report

SEED = 2
ENOUGH = 0.98  # of broken kernels


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--state", type=Path, default=Path(sys.prefix) / "scail-build")
    parser.add_argument("--out", type=Path, default=Path("docs/proof.md"))
    parser.add_argument("--broken", type=int, default=1000, help="how many kernels to break")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    began = time.monotonic()
    wanted = [(spec, arch) for arch in ARCHS for spec in table(arch)]
    compile_kernels(wanted, args.state, processes=args.processes)
    the_machine(args.state)
    print(
        f"{len(wanted)} kernels compiled and proven, {time.monotonic() - began:.0f} s", flush=True
    )
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        runs = [pool.submit(prove_architecture, arch.name, args.state) for arch in ARCHS]
        tried = pool.submit(try_breaks, args.state, args.broken, SEED)
        proven = [run.result() for run in runs]
        breaks = tried.result()
    args.out.write_text(report(proven, breaks), "utf-8")
    failures = [failure for one in proven for failure in one.failures]
    for failure in failures:
        print(f"FAILED {failure}")
    for survivor in breaks.survivors:
        print(f"broken and not found out: {survivor}")
    found, count = breaks.count()
    print(
        f"{len(wanted)} kernels, {sum(one.instructions for one in proven) / 1e6:.0f} million "
        f"instructions of warps, {len(failures)} failures; {found} of {count} broken kernels found "
        f"out; {args.out}; {time.monotonic() - began:.0f} s"
    )
    return 1 if failures or found < ENOUGH * count else 0


if __name__ == "__main__":
    sys.exit(main())
