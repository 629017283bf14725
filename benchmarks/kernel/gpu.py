"""Suite `gpu`: every kernel checked and timed on this GPU, from cubins that were made elsewhere.

Every cubin is loaded through the launcher, and every kernel is held against its reference at small
sizes; then what was right is timed at the sizes of real clips, in turns with other libraries. A
file gets lines of JSON after each step, so a run that is cut short has lost one step. `--dry` does
the same in the interpreter on the CPU with tiny sizes, and gives no times.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.kernel.cases import Inputs, KernelCase, cases
from benchmarks.kernel.cubins import compiled, load
from benchmarks.kernel.model import limits_ms
from benchmarks.kernel.peers import Peer, PeerTimer, PeerWork, peers
from benchmarks.kernel.suite import KernelRow, kernel_figures, kernel_table
from benchmarks.kernel.work import LaunchWork
from benchmarks.record import Suite, machine
from benchmarks.timing import WrongResult, interleaved, spread
from engine.config import SCAIL_14B, TINY
from engine.errors import UnsupportedGpu
from engine.machine.gpu import find_gpu
from kernels.arch import ARCHS, SM90, Arch
from kernels.launch import DriverError, KernelBank
from kernels.spec import Bank, KernelError
from kernels.trial import event_ms

TOKENS = (29757, 48832)  # 416x672 and 512x896, 81 frames
BUDGET_S = 330.0  # gpu.sh ends it at 380: what is left then is said, and the table printed
RUNS_MS = 200  # of repeated launches for one median
FEWEST, MOST = 5, 50  # runs
WRONG = "WRONG"  # how the note of a wrong result begins
NO_MEMORY = "out of memory"  # how the note begins of what this GPU is too small for
CHECKED_TOKENS = (1, 77, 300)  # one, odd, past several tiles


@dataclass(frozen=True, slots=True)
class KernelPlace:
    """A device on which kernels run and are timed."""

    arch: Arch
    bank: Bank
    device: torch.device
    clock: PeerTimer


def measure_gpu(
    kernels: Path | None = None,
    out: Path = Path("gpu.jsonl"),
    *,
    dry: bool = False,
    only: Sequence[str] = ("",),
) -> tuple[str, list[KernelRow]]:
    """Checks, then times. `only`: beginnings of names.

    Raises `Unavailable` without cubins, and `WrongResult` after all is measured if anything is
    wrong.
    """
    deadline = time.monotonic() + BUDGET_S
    tokens, others = ((130,), lambda _: ()) if dry else (TOKENS, peers)
    with _place(kernels, dry) as place:
        everything = cases(place.arch, TINY if dry else SCAIL_14B)
        chosen = [case for case in everything if case.name.startswith(tuple(only))]
        say(out, "machine", {"date": time.strftime("%Y-%m-%d"), **machine()})
        checks = [row for case in chosen for row in said(out, "check", check(case, place))]
        wrong = wrong_rows(checks)
        right = [case for case in chosen if case.name not in wrong]
        rows: list[KernelRow] = []
        for count in tokens:
            theirs = [*others(count)]
            for group in dict.fromkeys(case.group for case in right):
                if time.monotonic() > deadline:
                    say(out, "time", {"skipped": group, "tokens": count})
                    continue
                ours = [case for case in right if case.group == group]
                beside = [peer for peer in theirs if peer.beside == group]
                told = partial(said_one, out, "compared")
                rows += said(out, "time", rival_rows(ours, beside, place, count, told))
    wrong |= wrong_rows(rows)
    if wrong:
        print(kernel_table([*checks, *rows]))
        raise WrongResult("wrong results: " + "; ".join(f"{k}, {wrong[k]}" for k in wrong))
    return "the references beside the kernels", rows


def said(out: Path, step: str, rows: list[KernelRow]) -> list[KernelRow]:
    """Writes rows as soon as they are known, and returns them."""
    for row in rows:
        said_one(out, step, row)
    return rows


def said_one(out: Path, step: str, row: KernelRow) -> None:
    say(out, step, asdict(row))


def say(out: Path, step: str, facts: Mapping[str, object]) -> None:
    """Adds a line of JSON to a file, and prints it."""
    line = json.dumps({"step": step, **facts})
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


@contextmanager
def _place(kernels: Path | None, dry: bool) -> Iterator[KernelPlace]:
    """A bank of loaded cubins, or of the interpreter."""
    if dry:
        # makes this process interpret Triton
        from tests.support.interpreter import InterpretedBank

        yield KernelPlace(SM90, InterpretedBank(SM90), torch.device("cpu"), run_once)
        return
    arch = here()
    cubins = compiled(arch) if kernels is None else load(kernels)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.zeros(1, device="cuda")  # the context that the launcher shares
    with KernelBank(cubins.values(), arch, current_stream) as bank:
        yield KernelPlace(arch, bank, torch.device("cuda:0"), median_ms)


def here() -> Arch:
    """The architecture of the GPU of this machine. Raises `UnsupportedGpu`."""
    gpu = find_gpu()
    arch = next((a for a in ARCHS if gpu is not None and a.capability == gpu.capability), None)
    if arch is None:
        has = "There is no GPU" if gpu is None else f"{gpu.name} is of no architecture known"
        raise UnsupportedGpu(f"{has} here. Use --dry to try the steps without.")
    return arch


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def run_once(work: Callable[[], object]) -> None:
    """The clock of a machine whose times mean nothing."""
    work()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is filled with NaN, so an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case: KernelCase, place: KernelPlace) -> list[KernelRow]:
    """Rows of the small sizes, until one is wrong."""
    rows = []
    with poisoned_memory():
        for tokens in CHECKED_TOKENS:
            rows.append(checked(case, place, Inputs(tokens, place.device), tokens)[1])
            if rows[-1].note:
                break
    return rows


def checked(
    case: KernelCase, place: KernelPlace, inputs: Inputs, tokens: int
) -> tuple[PeerWork | None, KernelRow]:
    """A case to be timed, and its row. If it is wrong or fails, a note says so in place of work."""
    row = KernelRow(case.name, place.arch.name, tokens=tokens)
    try:
        job = case.prepare(place.bank, inputs, tokens)
        error = relative_error(*job.compare())
    except (KernelError, DriverError, RuntimeError) as failure:
        return None, replace(row, note=_failed(failure, tokens))
    if error <= case.limit:
        return job.run, replace(row, error=error)
    off = f"{WRONG}, {tokens} tokens: relative error {error:.2e}, limit {case.limit:.0e}"
    return None, replace(row, error=error, note=off)  # NaN too


def _failed(failure: Exception, tokens: int) -> str:
    """Words the note of a case that did not run: wrong, or too large for this GPU."""
    reason = str(failure).strip().partition("\n")[0][:200]
    if isinstance(failure, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return f"{NO_MEMORY}, {tokens} tokens: {reason}"
    return f"{WRONG}, {tokens} tokens: {reason}"


def wrong_rows(rows: Sequence[KernelRow]) -> dict[str, str]:
    """What is wrong with the result of each kernel whose result is wrong."""
    return {row.name: row.note for row in rows if row.note.startswith(WRONG)}


def rival_rows(
    ours: Sequence[KernelCase],
    theirs: Sequence[Peer],
    place: KernelPlace,
    tokens: int,
    told: Callable[[KernelRow], None] = lambda _: None,
) -> list[KernelRow]:
    """Rows of both, timed in turns. A case that is wrong or fails gets a note in place of a time.

    `told` is given each row as soon as its result was compared. Inputs are shared by the cases and
    let go of at the end.
    """
    inputs = Inputs(tokens, place.device)
    runs: dict[str, PeerWork] = {}
    made: dict[str, tuple[KernelRow, LaunchWork]] = {}
    for rival in (*ours, *theirs):
        if isinstance(rival, KernelCase):
            (run, row), work = checked(rival, place, inputs, tokens), rival.work(tokens)
        else:
            (run, row), work = begun(rival, place, tokens), rival.work
        told(row)
        made[row.name] = row, work
        if run is not None:
            runs[row.name] = run
    failed: dict[str, str] = {}

    def timed(name: str) -> float | None:
        try:
            return None if name in failed else place.clock(runs[name])
        except (KernelError, DriverError, RuntimeError) as failure:
            failed[name] = _failed(failure, tokens)
            return None

    times = interleaved({name: name for name in runs}, timed)
    return [
        replace(row, note=failed[name])
        if name in failed
        else _with_times(row, times.get(name, []), work, place.arch)
        for name, (row, work) in made.items()
    ]


def begun(peer: Peer, place: KernelPlace, tokens: int) -> tuple[PeerWork | None, KernelRow]:
    """A peer that has done its work once, and its row. If it cannot, a note says why."""
    row = KernelRow(peer.name, place.arch.name, tokens=tokens)
    try:
        work = peer.run()
        work()
    except (RuntimeError, NotImplementedError, ValueError, ImportError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        return None, replace(row, note=f"failed: {reason[:100]}")
    return work, row


def _with_times(row: KernelRow, times: Sequence[float], work: LaunchWork, arch: Arch) -> KernelRow:
    """The row with its median, its rate and its share of the limit, if there are times."""
    timed = spread(times)
    if timed is None:
        return row
    ms, noise = timed
    rate = work.flop / ms / 1e9 if work.flop else None
    share = max(limits_ms(work, arch).values()) / ms
    return replace(row, ms=ms, noise_ms=noise, tflops=rate, share=share)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Sums in FP64, without a copy of gigabytes in FP64."""
    got, want = got.float(), want.float()
    off, size = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (got - want, want))
    return (off / size.clamp_min(1e-300)).item()


def median_ms(run: Callable[[], object]) -> float:
    """The median between CUDA events, after a first run."""
    run()
    first = event_ms(run)
    count = max(FEWEST, min(MOST, round(RUNS_MS / max(first, 1e-3))))
    return statistics.median(event_ms(run) for _ in range(count))


SUITE = Suite(measure_gpu, kernel_table, kernel_figures)
