"""Suite `cold-start`: times a start from nothing to the first forward, phase by phase.

Beside it: PyTorch's import alone, which no start can undercut, and the start in multiples of it;
the whole worker with the platform's library; the same weights through safetensors; the weights read
to nowhere; with `--before` the engine of another checkout. This process holds neither PyTorch nor
NumPy, so that their files can be taken out of the page cache too.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from threading import Timer

from benchmarks.cold_start.worker import READY, SERVING
from benchmarks.record import Figure, Suite
from benchmarks.timing import Row, figures, require, row_of, table
from engine.package.direct_file import cached_bytes

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).relative_to(ROOT).with_name("worker.py")  # in any checkout
RUNS, COLD_RUNS = 5, 3
ACCEPTED = "first job accepted"  # by a pipeline
ASKED = "first job asked for"  # by the worker, which has made a first clip of nothing by then
TIMEOUT_S = 600
NOISE_MS = 50.0  # between a process' own clock and that of who waits for its line
WAYS = ("torch", "engine", "worker", "safetensors", "read")
IN_IMPORTS = ", in imports of torch"  # ends the names of rows that have no unit
BEFORE = "engine before"  # the engine of another checkout


@dataclass(frozen=True, slots=True)
class Start:
    """One start, as its process and its parent saw it."""

    phases: Mapping[str, float]  # ms, in order
    total_ms: float  # seen by the process itself
    seen_ms: float  # seen by the parent, until the result was there
    files: tuple[str, ...]  # that were in use


@dataclass(frozen=True, slots=True)
class StartScene:
    """The files that are started from, and the arguments of each way."""

    package: Path
    models: Path
    state: Path
    weights: Path  # the same as one safetensors file

    def paths(self, way: str) -> tuple[Path, ...]:
        """The arguments of a way to start."""
        engine = dict.fromkeys(
            ("engine", "worker", BEFORE), (self.package, self.models, self.state)
        )
        given = {**engine, "safetensors": (self.weights,), "read": (self.package,)}
        return given.get(way, ())

    def data(self, way: str) -> list[Path]:
        """Files that a way reads, beside programs."""
        found = [one for path in self.paths(way) for one in (path, *path.rglob("*"))]
        return [path for path in found if path.is_file()]


def measure_cold_start(
    package: Path | None = None,
    models: Path | None = None,
    before: Path | None = None,
    *,
    runs: int = RUNS,
) -> tuple[str, list[Row]]:
    """Says how it was checked, and gives a row for each phase of each way to start. All ways have
    their turn in each round. `before`: a checkout whose engine starts beside this one's.

    Raises `WrongResult` if a start fails, takes a time that its phases do not add up to, or ends in
    numbers that are not finite.
    """
    with TemporaryDirectory(prefix="scail-cold-start-") as folder:
        scene = prepare(Path(folder), package, models)
        roots = dict.fromkeys(WAYS, ROOT) | ({} if before is None else {BEFORE: before})
        # not counted: it warms the page cache
        first = {way: start(way, scene, root) for way, root in roots.items()}
        found: dict[str, list[Start]] = {f"{way}, warm": [] for way in roots}
        for _ in range(runs):
            for way, root in roots.items():
                found[f"{way}, warm"].append(start(way, scene, root))
        found |= {f"{way}, cold": [] for way in roots}
        stayed = []
        for _ in range(min(runs, COLD_RUNS)):
            for way, root in roots.items():
                stayed.append(evict([*map(Path, first[way].files), *scene.data(way)]))
                found[f"{way}, cold"].append(start(way, scene, root))
    rows = [row for name, starts in found.items() for row in rows_of(name, starts)]
    rows += multiples(found)
    checked = "clocks of both sides, and finite results"
    return f"{checked} (when cold, {max(stayed):.0%} of a start's files stayed in memory)", rows


def prepare(folder: Path, package: Path | None, models: Path | None) -> StartScene:
    """The package, or the tiny one for this GPU (without one, sm89), and its weights once more as
    safetensors. Another process makes them, so that this one holds no PyTorch.
    """
    given = [str(folder), *([str(package)] if package else [])]
    command = [sys.executable, "-m", "benchmarks.cold_start.scene", *given]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    require(done.returncode == 0, f"Nothing to start: {_last_line(done.stderr)}")
    made = {name: Path(path) for name, path in json.loads(done.stdout.splitlines()[-1]).items()}
    return StartScene(**made | ({"models": models} if models else {}))


def start(way: str, scene: StartScene, root: Path = ROOT) -> Start:
    """Makes one start of the checkout `root` in a process of its own. Raises `WrongResult`."""
    environment = os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(scene.state)}
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        began = time.monotonic()
        called = way.removesuffix(" before")
        command = [sys.executable, str(root / WORKER), repr(began), called]
        with subprocess.Popen(
            [*command, *map(str, scene.paths(way))],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        ) as process:
            assert process.stdout is not None
            limit = Timer(TIMEOUT_S, process.kill)
            limit.start()
            line = process.stdout.readline()
            seen_ms = 1000 * (time.monotonic() - began)
            files = process.stdout.readline()
        limit.cancel()
        errors.seek(0)
        failure = _last_line(errors.read())
    require(process.returncode == 0 and bool(files), f"{way} does not start: {failure}")
    made = json.loads(line)
    found = Start(made["ms"], made["total_ms"], seen_ms, tuple(json.loads(files)))
    check(way, found)
    return found


def check(way: str, found: Start) -> None:
    """Raises `WrongResult` for times that contradict each other."""
    added = sum(found.phases.values())
    adds_up = abs(added - found.total_ms) < NOISE_MS
    require(adds_up, f"{way}: phases add up to {added:.0f} ms of {found.total_ms:.0f}")
    seen = found.total_ms <= found.seen_ms
    require(seen, f"{way}: {found.total_ms:.0f} ms in {found.seen_ms:.0f} that its parent waited")


def rows_of(name: str, starts: Sequence[Start]) -> list[Row]:
    """A row for each phase, for the whole, and for an engine until it takes its first job."""
    each = [_with_sums(one) for one in starts]
    return [row_of(f"{name}: {phase}", [phases[phase] for phases in each]) for phase in each[0]]


def _with_sums(one: Start) -> dict[str, float]:
    found: dict[str, float] = {}
    for phase, ms in one.phases.items():
        found[phase] = ms
        if phase == READY and SERVING not in one.phases:
            found[ACCEPTED] = sum(found.values())
        if phase == SERVING:
            found[ASKED] = sum(found.values())
    return {**found, "total": one.total_ms}


def multiples(found: Mapping[str, Sequence[Start]]) -> list[Row]:
    """Gives the time until the first job in imports of PyTorch: for each round that of the round,
    so that what else the machine did meanwhile hits both.
    """
    rows = []
    for name, starts in found.items():
        torch = found[f"torch, {name.rpartition(', ')[2]}"]
        for phase in (ACCEPTED, ASKED):
            rounds = [
                sums[phase] / import_.total_ms
                for sums, import_ in zip(map(_with_sums, starts), torch, strict=True)
                if phase in sums
            ]
            rows += [row_of(f"{name}: {phase}{IN_IMPORTS}", rounds)] if rounds else []
    return rows


def cold_figures(rows: Sequence[Row]) -> list[Figure]:
    return [
        replace(one, unit="x") if one.name.endswith(IN_IMPORTS) else one for one in figures(rows)
    ]


def cold_table(rows: Sequence[Row]) -> str:
    """Columns for a terminal, and below them the multiples."""
    times = [row for row in rows if not row.name.endswith(IN_IMPORTS)]
    others = [row for row in rows if row.name.endswith(IN_IMPORTS)]
    lines = [f"{r.name}: {r.ms:.2f}, {r.best_ms:.2f} to {r.worst_ms:.2f}" for r in others]
    return "\n".join([table(times), *lines])


def evict(paths: Iterable[Path]) -> float:
    """Takes files out of the page cache. Returns the share of their bytes that stays there: what
    other processes have mapped does.
    """
    kept = total = 0
    for path in {*paths}:
        try:
            number = os.open(path, os.O_RDONLY)
        except OSError:  # deleted since, or not ours to read
            continue
        try:
            size = os.fstat(number).st_size
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            kept += min(size, cached_bytes(number, 0, size)) if size else 0
            total += size
        finally:
            os.close(number)
    return kept / total if total else 0.0


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


def cold_pictures(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """A bar for each way to start, of the medians of its phases."""
    # Here: NumPy's files, mapped by this process, could not leave the page cache.
    from benchmarks import pictures

    bars: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        start, phase = row.name.split(": ")
        if phase != "total" and not phase.startswith((ACCEPTED, ASKED)):
            bars.setdefault(start, {})[phase] = [row.ms / 1000]
    phases = list(dict.fromkeys(phase for bar in bars.values() for phase in bar))
    fig, [axes] = pictures.figure(9, 1.8 + 0.42 * len(bars))
    pictures.stacked_bars(axes, [*bars.values()], phases)
    axes.set_yticks(range(len(bars)), [*bars])
    axes.set_xlabel("seconds since the process was started, medians of phases")
    fig.legend(loc="outside lower center", ncols=4)
    return pictures.save(fig, folder, stem)


SUITE = Suite(measure_cold_start, cold_table, cold_figures, cold_pictures)
