"""Measure the engine on this machine: a table for each suite, and one JSON object at the end.

python benchmarks/run.py media kernels --json found.json
python benchmarks/run.py cold-start --package DIR --models DIR --jit    without DIR: the tiny one
python benchmarks/run.py clip quality --keep      into results/, with pictures and RESULTS.md
python benchmarks/run.py compare A.json B.json    exit 1 if B is worse by more than the noise
python benchmarks/run.py report                   RESULTS.md again, from what is kept
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import compare, report
from benchmarks.clip.rows import clip_figures, clip_pictures, clip_table
from benchmarks.clip.suite import measure_clip, recipes_of, sizes_of
from benchmarks.cold_start.suite import cold_figures, cold_pictures, cold_table, measure_cold_start
from benchmarks.denoiser.projection import (
    measure_projection,
    projection_figures,
    projection_pictures,
    projection_table,
)
from benchmarks.denoiser.suite import (
    denoiser_figures,
    denoiser_pictures,
    denoiser_table,
    measure_denoiser,
)
from benchmarks.figures import Figure
from benchmarks.kernel.suite import kernel_figures, kernel_table, measure_kernels
from benchmarks.media import measure_media
from benchmarks.nano.suite import measure_nano, nano_figures, nano_pictures, nano_table
from benchmarks.quality.suite import measure_quality
from benchmarks.quality.tables import quality_figures, quality_pictures, quality_table
from benchmarks.record import (
    BadRecord,
    Record,
    SuiteResult,
    encode,
    machine,
    merged,
    read_record,
    write_record,
)
from benchmarks.synthetic import build
from benchmarks.timing import WrongResult, figures, table
from engine.config import state_dir
from engine.errors import EngineError
from engine.recipes import RECIPES
from kernels.launch import DriverError
from kernels.spec import BuildError

OPTIONS = {"archs": "--project"}  # where an option is not called like what `measure` takes
# What others bring with them; not to be asked for by themselves
PROJECTION = "projection"  # of `denoiser --project`
NANO = "nano"  # of `quality` without a checkpoint
BROUGHT = (PROJECTION, NANO)


@dataclass(frozen=True, slots=True)
class Suite:
    """What a suite is to this tool. `Any` is its own frozen row."""

    measure: Callable[..., tuple[str, Sequence[Any]]]  # how results were checked, and rows
    table: Callable[[Sequence[Any]], str]
    figures: Callable[[Sequence[Any]], list[Figure]]
    pictures: Callable[[Sequence[Any], Path, str], list[Path]] | None = None
    takes: tuple[str, ...] = ()  # options that `measure` is given if they were


LOADED = ("package", "models")
SUITES = {
    "media": Suite(measure_media, table, figures),
    "kernels": Suite(measure_kernels, kernel_table, kernel_figures),
    "denoiser": Suite(measure_denoiser, denoiser_table, denoiser_figures, denoiser_pictures),
    "clip": Suite(
        measure_clip, clip_table, clip_figures, clip_pictures,
        (*LOADED, "sizes", "frames", "recipes", "runs"),
    ),
    "quality": Suite(
        measure_quality, quality_table, quality_figures, quality_pictures,
        ("checkpoint", *LOADED),
    ),
    "cold-start": Suite(
        measure_cold_start, cold_table, cold_figures, cold_pictures, (*LOADED, "runs", "jit"),
    ),
    NANO: Suite(measure_nano, nano_table, nano_figures, nano_pictures),
    PROJECTION: Suite(
        measure_projection, projection_table, projection_figures, projection_pictures,
        ("archs", "measured"),
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["compare"]:
        compare.main(given[1:])
    elif given[:1] == ["report"]:
        report.main(given[1:])
    else:
        run(parse(given))


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Suites and their options. An option of a suite that is not asked for is an error."""
    parser = _parser()
    args = parser.parse_args(given)
    if args.archs is not None and "denoiser" in args.suites:
        args.suites.append(PROJECTION)
    if args.checkpoint is None and "quality" in args.suites:
        args.suites.append(NANO)
    args.suites = list(dict.fromkeys(args.suites))
    taken = {option for name in args.suites for option in SUITES[name].takes}
    for option in sorted({option for suite in SUITES.values() for option in suite.takes} - taken):
        if getattr(args, option) is not None:
            parser.error(f"{OPTIONS.get(option, f'--{option}')} is of no suite that is asked for")
    return args


def run(args: argparse.Namespace) -> None:
    """Suites, and what is to be kept of them. Wrong results leave nothing behind."""
    try:
        record, rows = measure(args.suites, vars(args))
        found = encode(record)
        if args.synthetic is not None:
            found["synthetic"] = build(state_dir() / "synthetic", "fp8")
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        if args.keep:
            print(*keep(record, rows, report.RESULTS), sep="\n")
    except (WrongResult, BadRecord, EngineError, BuildError, DriverError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(found))


def measure(
    names: Sequence[str], options: Mapping[str, Any]
) -> tuple[Record, dict[str, Sequence[Any]]]:
    """Runs and prints suites one after the other; their record, and rows to draw."""
    began, place = datetime.now(UTC).isoformat(timespec="seconds"), machine()
    found: dict[str, SuiteResult] = {}
    drawn: dict[str, Sequence[Any]] = {}
    for name in names:
        suite = SUITES[name]
        takes = {key: options[key] for key in suite.takes if options[key] is not None}
        checked, rows = suite.measure(**takes)
        print(f"{name}, checked by {checked}\n{suite.table(rows)}\n", flush=True)
        found[name] = SuiteResult(checked, [asdict(r) for r in rows], suite.figures(rows), [])
        drawn[name] = rows
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Record(began, place, found, peak_mib), drawn


def keep(record: Record, rows: Mapping[str, Sequence[Any]], folder: Path) -> list[Path]:
    """Pictures, the record and the report. A run of the same machine and day is added to."""
    path = folder / f"{record.stem}.json"
    suites, written = dict(record.suites), list[Path]()
    for name, held in rows.items():
        draw = SUITES[name].pictures
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
    add = parser.add_argument_group("clip, quality and cold-start").add_argument
    add("--package", type=Path, metavar="DIR", help="in place of the tiny one")
    add("--models", type=Path, metavar="DIR", help="beside --package ($SCAIL_MODELS)")
    add("--runs", type=_positive, metavar="N", help="not quality: more runs, less noise")
    add = parser.add_argument_group("clip").add_argument
    add("--sizes", type=sizes_of, metavar="HxW,...", help="of clips")
    add("--frames", type=_positive, metavar="N", help="of each clip: 1, 5, 9, ...")
    add("--recipes", type=recipes_of, metavar="NAME,...", help=", ".join(RECIPES))
    add = parser.add_argument_group("quality").add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="real weights; --package is made from them")
    add = parser.add_argument_group("denoiser").add_argument
    add("--project", dest="archs", type=_names, metavar="ARCH,...",
        help="seconds on GPUs that nobody measured, such as sm89,sm120")  # fmt: skip
    add("--measured", type=Path, metavar="FILE", help="times of sm90 to project from")
    add = parser.add_argument_group("cold-start").add_argument
    add("--jit", action="store_true", default=None, help="compile kernels at run time too: minutes")
    add("--synthetic", choices=["14b"], help="build weights of that size: minutes, 20 GB of disk")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    main()
