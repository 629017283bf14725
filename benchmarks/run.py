"""Measure the engine on this machine: a table for each suite, and one JSON object at the end.

python benchmarks/run.py media
python benchmarks/run.py media kernels --json found.json
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
from kernel_suite import kernel_table, measure_kernels
from media import measure_media
from timing import WrongResult, table

from engine.errors import EngineError
from kernels.launch import DriverError
from kernels.spec import BuildError

SUITES = {"media": (measure_media, table), "kernels": (measure_kernels, kernel_table)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suites", nargs="+", choices=sorted(SUITES), metavar="SUITE",
        help=", ".join(sorted(SUITES)))  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the last line here too")
    args = parser.parse_args(argv)
    found: dict[str, object] = {"machine": machine()}
    try:
        for suite in dict.fromkeys(args.suites):
            measure, show = SUITES[suite]
            checked, rows = measure()
            print(f"{suite}, checked by {checked}\n{show(rows)}\n")
            found[suite] = {"checked_by": checked, "rows": [asdict(row) for row in rows]}
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
