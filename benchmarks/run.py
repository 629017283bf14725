"""Measure the engine on this machine: a table for each suite, and one JSON object at the end.

python benchmarks/run.py media kernels --json found.json
python benchmarks/run.py cold-start --package DIR --models DIR    without DIR: the tiny one
python benchmarks/run.py clip quality --keep      into results/, with pictures and RESULTS.md
python benchmarks/run.py compare A.json B.json    exit 1 if B is worse by more than the noise
python benchmarks/run.py report                   RESULTS.md again, from what is kept
python benchmarks/run.py cubins DIR --arch sm90   kernels for a GPU machine without a compiler
PYTHONPATH=$PWD python benchmarks/run.py twins gpu forward vae --kernels DIR      there
"""

import argparse
import importlib
import json
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import compare, report
from benchmarks.record import (
    BadRecord,
    Record,
    Suite,
    SuiteResult,
    encode,
    machine,
    merged,
    read_record,
    write_json,
    write_record,
)
from benchmarks.timing import WrongResult
from engine.command_line import program
from engine.errors import EngineError
from kernels.launch import DriverError
from kernels.spec import BuildError

# Where each suite is, and the options that its `measure` takes. A module is imported when its suite
# is asked for: `gpu.sh` runs where nothing but torch and numpy is installed.
SUITES = {
    "media": ("benchmarks.media", ()),
    "kernels": ("benchmarks.kernel.suite", ()),
    "denoiser": ("benchmarks.denoiser.suite", ()),
    "published": ("benchmarks.kernel.published", ()),
    "clip": (
        "benchmarks.clip.suite", ("package", "models", "sizes", "frames", "recipes", "runs"),
    ),
    "quality": ("benchmarks.quality.suite", ("checkpoint", "package", "models")),
    "cold-start": ("benchmarks.cold_start.suite", ("package", "models", "before", "runs")),
    "reading": ("benchmarks.cold_start.reading", ("file", "runs")),
    "streaming": ("benchmarks.cold_start.streaming", ("runs",)),
    "formats": ("benchmarks.cold_start.formats", ("runs",)),
    "gpu": ("benchmarks.kernel.gpu", ("kernels", "out", "dry", "only")),
    "twins": ("benchmarks.kernel.twins", ("kernels", "out", "dry", "only")),
    "forward": ("benchmarks.denoiser.forward", ("kernels", "out", "dry")),
    "vae": ("benchmarks.clip.vae", ("kernels", "runs")),
    "nano": ("benchmarks.nano.suite", ()),
    "nano-scail2": ("benchmarks.nano_scail2.forms", ()),
    "projection": ("benchmarks.denoiser.projection", ("archs",)),
}  # fmt: skip
# What other suites bring with them: `quality` without a checkpoint, `denoiser --project`
NANO = ("nano", "nano-scail2")
BROUGHT = (*NANO, "projection")
STARTS = ("cold-start", "reading", "streaming")  # of processes, which look for the GPU themselves
FLAGS = {"archs": "--project"}  # where an option is not called like what `measure` takes


def suite_of(name: str) -> Suite:
    return importlib.import_module(SUITES[name][0]).SUITE


def main(argv: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["compare"]:
        compare.main(given[1:])
    elif given[:1] == ["cubins"]:
        importlib.import_module("benchmarks.kernel.cubins").main(given[1:])
    else:
        try:
            if given == ["report"]:
                print(report.write_report(report.RESULTS))
            else:
                run(parse(given))
        except (WrongResult, BadRecord, EngineError, BuildError, DriverError, OSError) as error:
            sys.exit(f"error: {error}")


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Suites and their options. An option of a suite that is not asked for is an error."""
    parser = _parser()
    args = parser.parse_args(given)
    if args.archs is not None and "denoiser" in args.suites:
        args.suites.append("projection")
    if args.checkpoint is None and "quality" in args.suites:
        args.suites += NANO
    args.suites = list(dict.fromkeys(args.suites))
    taken = {option for name in args.suites for option in SUITES[name][1]}
    known = {option for _, options in SUITES.values() for option in options}
    for option in sorted(known - taken):
        if getattr(args, option) is not None:
            owners = ", ".join(name for name, (_, options) in SUITES.items() if option in options)
            flag = FLAGS.get(option, f"--{option}")
            parser.error(f"{flag} is of no suite that is asked for, only of {owners}")
    return args


def _require_usable_gpu() -> None:
    """Refuses a machine whose GPU PyTorch cannot use: its times would be those of the CPU."""
    from engine.machine.device import find_device  # brings PyTorch, which a start must not find

    find_device()


def run(args: argparse.Namespace) -> None:
    """Runs suites and keeps what is to be kept of them. Wrong results leave nothing behind."""
    if not {*args.suites} <= {*STARTS}:
        _require_usable_gpu()
    record, rows = measure(args.suites, vars(args))
    found = encode(record)
    if args.json is not None:
        write_json(args.json, found)
    if args.keep:
        print(*keep(record, rows, report.RESULTS), sep="\n")
    print(json.dumps(found))


def measure(
    names: Sequence[str], options: Mapping[str, Any]
) -> tuple[Record, dict[str, Sequence[Any]]]:
    """Runs and prints suites one after the other; their record, and rows to draw."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    found: dict[str, SuiteResult] = {}
    drawn: dict[str, Sequence[Any]] = {}
    for name in names:
        suite = suite_of(name)
        takes = {key: options[key] for key in SUITES[name][1] if options[key] is not None}
        checked, rows = suite.measure(**takes)
        print(f"{name}, checked by {checked}\n{suite.table(rows)}\n", flush=True)
        found[name] = SuiteResult(checked, [asdict(r) for r in rows], suite.figures(rows), [])
        drawn[name] = rows
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Record(began, machine(), found, peak_mib), drawn


def keep(record: Record, rows: Mapping[str, Sequence[Any]], folder: Path) -> list[Path]:
    """Writes pictures, the record and the report. A run of the same machine and day is added to."""
    path = folder / f"{record.stem}.json"
    suites, written = dict(record.suites), list[Path]()
    for name, held in rows.items():
        draw = suite_of(name).pictures
        if draw is not None:
            made = draw(held, folder / "pictures", f"{record.stem}-{name}")
            shown = [str(one.relative_to(folder)) for one in made if one.suffix == ".png"]
            suites[name] = replace(suites[name], pictures=shown)
            written += made
    record = replace(record, suites=suites)
    if path.exists():
        record = merged(read_record(path), record)
    write_record(path, record)
    return [*written, path, report.write_report(folder)]


def _parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    suites = [name for name in SUITES if name not in BROUGHT]
    parser.add_argument("suites", nargs="+", choices=suites, metavar="SUITE",
        help=", ".join(suites))  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the last line here too")
    parser.add_argument("--keep", action="store_true",
        help="add the run to benchmarks/results, draw its pictures, write RESULTS.md")  # fmt: skip
    add = parser.add_argument_group("clip, quality, cold-start, reading and vae").add_argument
    add("--package", type=Path, metavar="DIR", help="in place of the tiny one")
    add("--models", type=Path, metavar="DIR", help="beside --package ($SCAIL_MODELS)")
    add("--runs", type=_positive, metavar="N", help="not quality: more runs, less noise")
    add("--sizes", type=_sizes, metavar="HxW,...", help="clip: of the frames")
    add("--frames", type=_positive, metavar="N", help="clip: 1, 5, 9, ...")
    add("--recipes", type=_names, metavar="NAME,...", help="clip: production, official")
    add("--checkpoint", type=Path, metavar="FILE",
        help="quality: real weights, which --package is made from")  # fmt: skip
    add("--before", type=Path, metavar="DIR",
        help="cold-start: another checkout, whose engine starts beside this one")  # fmt: skip
    add("--file", type=Path, metavar="FILE", help="reading: more than 1 GB, of random bytes")
    add = parser.add_argument_group("denoiser").add_argument
    add("--project", dest="archs", type=_names, metavar="ARCH,...",
        help="seconds on GPUs that nobody measured, such as sm89,sm120")  # fmt: skip
    add = parser.add_argument_group("gpu, forward and vae").add_argument
    add("--kernels", type=Path, metavar="DIR", help="what `cubins` wrote")
    add("--out", type=Path, metavar="FILE", help="gets a line after each step")
    add("--dry", action="store_true", default=None, help="on a CPU: tiny, without times")
    add("--only", nargs="+", metavar="NAME", help="gpu: beginnings of kernels' names")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Heights and widths from "128x224,256x448"."""
    found = [re.fullmatch(r"(\d+)x(\d+)", part) for part in _names(text)]
    pairs = [(int(one[1]), int(one[2])) for one in found if one is not None]
    if len(pairs) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH,...")
    return tuple(pairs)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


if __name__ == "__main__":
    program(main)
