"""Measure the engine on this machine: a table for each suite, and one JSON object at the end.

python benchmarks/run.py media
python benchmarks/run.py media kernels --json found.json
python benchmarks/run.py cold-start                             of the tiny package
python benchmarks/run.py cold-start --package DIR --models DIR --jit
python benchmarks/run.py cold-start --synthetic 14b             and what building 14B weights takes
"""

import argparse
import json
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
from cold_start import cold_table, measure_cold_start
from kernel_suite import kernel_table, measure_kernels
from media import measure_media
from synthetic import build
from timing import WrongResult, table

from engine.config import state_dir
from engine.errors import EngineError
from kernels.launch import DriverError
from kernels.spec import BuildError

SUITES = {
    "media": (measure_media, table),
    "kernels": (measure_kernels, kernel_table),
    "cold-start": (measure_cold_start, cold_table),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suites", nargs="+", choices=sorted(SUITES), metavar="SUITE",
        help=", ".join(sorted(SUITES)))  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the last line here too")
    add = parser.add_argument_group("cold-start").add_argument
    add("--package", type=Path, metavar="DIR", help="in place of the tiny one")
    add("--models", type=Path, metavar="DIR", help="beside --package ($SCAIL_MODELS)")
    add("--jit", action="store_true", help="compile its kernels at run time too: minutes")
    add("--synthetic", choices=["14b"], help="build weights of that size: minutes, 20 GB of disk")
    args = parser.parse_args(argv)
    options = {"cold-start": {"package": args.package, "models": args.models, "jit": args.jit}}
    found: dict[str, object] = {"machine": machine()}
    try:
        for suite in dict.fromkeys(args.suites):
            measure, show = SUITES[suite]
            checked, rows = measure(**options.get(suite, {}))
            print(f"{suite}, checked by {checked}\n{show(rows)}\n")
            found[suite] = {"checked_by": checked, "rows": [asdict(row) for row in rows]}
        if args.synthetic is not None:
            found["synthetic"] = build(state_dir() / "synthetic", "fp8")
        found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    except (WrongResult, EngineError, BuildError, DriverError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(found))


def machine() -> dict[str, object]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


if __name__ == "__main__":
    main()
