"""Suite `gpu`: every kernel checked and timed on this GPU, from cubins that were made elsewhere.

Every cubin is loaded through the launcher, and every kernel is held against its reference at small
sizes; then what was right is timed at the sizes of real clips, in turns with other libraries. A
file gets a line of JSON after each step, so a run that is cut short has lost one step. `--dry` does
the same in the interpreter on the CPU with tiny sizes, and gives no times.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.kernel.cases import KernelCase, KernelJob, cases
from benchmarks.kernel.cubins import compiled, load
from benchmarks.kernel.model import GPUS, limit_ms
from benchmarks.kernel.peers import ATTENTION, PRODUCTS, Peer, PeerTimer, PeerWork, peers
from benchmarks.kernel.suite import KernelRow, kernel_figures, kernel_table
from benchmarks.record import Suite
from benchmarks.timing import WrongResult, interleaved, spread
from engine.config import SCAIL_14B, TINY
from engine.errors import UnsupportedGpu
from engine.machine.gpu import find_gpu
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, SM90, Arch
from kernels.launch import DriverError, KernelBank
from kernels.spec import Bank, KernelError
from kernels.trial import event_ms

TOKENS = (29757, 48832)  # 416x672 and 512x896, 81 frames
RUNS_MS = 200  # of repeated launches for one median
FEWEST, MOST = 5, 50  # runs
WRONG = "WRONG"  # how the note of a wrong result begins
CHECKED_TOKENS = (1, 77, 300)  # one, odd, past several tiles
RESERVE_S = 30  # of the budget, for a step that has begun


@dataclass(frozen=True, slots=True)
class KernelPlace:
    """A device on which kernels run and are timed."""

    arch: Arch
    bank: Bank
    device: torch.device
    cubins: dict[str, Cubin]  # by the names of specs
    clock: PeerTimer


@dataclass(frozen=True, slots=True)
class GpuRun:
    place: KernelPlace
    cases: list[KernelCase]
    tokens: tuple[int, ...]  # that are timed
    peers: Callable[[int], Iterable[Peer]]
    deadline: float  # of time.monotonic()
    out: Path

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline - RESERVE_S

    def say(self, step: str, facts: Mapping[str, object]) -> None:
        say(self.out, step, facts)


def say(out: Path, step: str, facts: Mapping[str, object]) -> None:
    """Adds a line of JSON to a file, and prints it."""
    line = json.dumps({"step": step, **facts})
    with out.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def measure_gpu(
    kernels: Path | None = None,
    out: Path = Path("gpu.jsonl"),
    *,
    dry: bool = False,
    only: Sequence[str] = ("",),
    budget: float = 480.0,
) -> tuple[str, list[KernelRow]]:
    """Checks, then times. `only`: beginnings of names; `budget`: seconds.

    Raises `Unavailable` without cubins, and `WrongResult` after all is measured if anything is
    wrong.
    """
    deadline = time.monotonic() + budget
    with _place(kernels, dry) as place:
        everything = cases(place.arch, TINY if dry else SCAIL_14B)
        chosen = [case for case in everything if case.name.startswith(tuple(only))]
        tokens, others = ((130,), lambda _: ()) if dry else (TOKENS, peers)
        run = GpuRun(place, chosen, tokens, others, deadline, out)
        run.say("machine", gpu_facts())
        with poisoned_memory():
            wrong = check(run)
        rows = time_all(run, wrong)
    wrong += wrong_rows(rows)
    if wrong:
        print(kernel_table(rows))
        raise WrongResult(f"wrong results: {'; '.join(wrong)}")
    return "the references beside the kernels", rows


@contextmanager
def _place(kernels: Path | None, dry: bool) -> Iterator[KernelPlace]:
    """A bank of loaded cubins, or of the interpreter."""
    if dry:
        # makes this process interpret Triton
        from tests.support.interpreter import InterpretedBank

        yield KernelPlace(SM90, InterpretedBank(SM90), torch.device("cpu"), {}, run_once)
        return
    arch = here()
    cubins = compiled(arch) if kernels is None else load(kernels)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.zeros(1, device="cuda")  # the context that the launcher shares
    with KernelBank(cubins.values(), arch, current_stream) as bank:
        yield KernelPlace(arch, bank, torch.device("cuda:0"), cubins, median_ms)


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


def check(run: GpuRun) -> list[str]:
    """Names of the cases that differ from their reference at a small size."""
    wrong = []
    for case in run.cases:
        for tokens in CHECKED_TOKENS:
            if run.is_late:
                run.say("check", {"case": case.name, "skipped": "no time left"})
                break
            fact = {"case": case.name, "tokens": tokens} | _compared(run.place, case, tokens)
            run.say("check", fact)
            if not fact["ok"]:
                wrong.append(case.name)
                break
    return wrong


def _compared(place: KernelPlace, case: KernelCase, tokens: int) -> dict[str, object]:
    try:
        error, cosine = difference(*case.prepare(place.bank, tokens, place.device).compare())
    except (KernelError, DriverError) as error:
        return {"ok": False, "failed": str(error)}
    ok = error <= case.limit
    return {"error": error, "cosine": cosine, "limit": case.limit, "ok": ok}


def time_all(run: GpuRun, wrong: Sequence[str]) -> list[KernelRow]:
    """Times the cases that were right, in turns with other libraries that do the same work."""
    rows = []
    right = [case for case in run.cases if case.name not in wrong]
    for tokens in run.tokens:
        for ours, theirs in rivals(right, [*run.peers(tokens)]):
            if run.is_late:
                for case in ours:
                    run.say("time", {"case": case.name, "skipped": "no time left"})
            elif ours:  # else nothing of ours stands beside these peers
                found = rival_rows(ours, theirs, run.place, tokens)
                for row in found:
                    run.say("time", asdict(row))
                rows += found
    return rows


def rivals(
    everything: Sequence[KernelCase], others: Sequence[Peer]
) -> list[tuple[list[KernelCase], list[Peer]]]:
    """Cases and peers that do the same work; every one of both is in one group."""
    groups: dict[str, tuple[list[KernelCase], list[Peer]]] = {}
    for case in everything:
        groups.setdefault(_work_of(case), ([], []))[0].append(case)
    for peer in others:
        groups.setdefault(peer.beside, ([], []))[1].append(peer)
    return [*groups.values()]


def _work_of(case: KernelCase) -> str:
    if case.name.startswith(ATTENTION):
        return ATTENTION
    words = case.name.split()
    return words[1] if case.name.startswith("gemm") and words[1] in PRODUCTS else case.name


def rival_rows(
    ours: Sequence[KernelCase], theirs: Sequence[Peer], place: KernelPlace, tokens: int
) -> list[KernelRow]:
    """Rows of both, timed in turns. A case that is wrong gets a note in place of a time."""
    checked = [_checked(case, place, tokens) for case in ours]
    works: dict[str, PeerWork] = {row.name: job.run for job, row in checked if not row.note}
    begun = {peer.name: _begun(peer) for peer in theirs}
    works |= {name: work for name, work in begun.items() if not isinstance(work, str)}
    times = interleaved(works, place.clock)
    rows = []
    for case, (_, row) in zip(ours, checked, strict=True):
        spec, work, moved = case.specs[0], case.flop(tokens), case.moved(tokens)
        loop = place.cubins[spec.name].loop if spec.name in place.cubins else None
        best = limit_ms(work, moved, loop, GPUS[place.arch])
        rows.append(_with_times(row, times.get(row.name, []), work, moved, best))
    for peer in theirs:
        work = begun[peer.name]
        note = work if isinstance(work, str) else ""
        row = KernelRow(peer.name, place.arch.name, tokens=tokens, note=note)
        rows.append(_with_times(row, times.get(peer.name, []), peer.flop))
    return rows


def wrong_rows(rows: Sequence[KernelRow]) -> list[str]:
    """A sentence for each kernel whose result is wrong."""
    return [f"{row.name}, {row.note}" for row in rows if row.note.startswith(WRONG)]


def _checked(case: KernelCase, place: KernelPlace, tokens: int) -> tuple[KernelJob, KernelRow]:
    job = case.prepare(place.bank, tokens, place.device)
    error, cosine = difference(*job.compare())
    row = KernelRow(case.name, place.arch.name, tokens=tokens, error=error, cosine=cosine)
    if not error <= case.limit:  # NaN too
        off = f"{WRONG}, {tokens} tokens: relative error {error:.2e}, limit {case.limit:.0e}"
        row = replace(row, note=off)
    return job, row


def _begun(peer: Peer) -> PeerWork | str:
    """The peer's work, which has been done once, or why there is none."""
    try:
        work = peer.run()
        work()
    except (RuntimeError, NotImplementedError, ValueError, ImportError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"failed: {reason[:100]}"
    return work


def _with_times(
    row: KernelRow,
    times: Sequence[float],
    flop: float,
    moved: float = 0.0,
    best_ms: float | None = None,
) -> KernelRow:
    """The row with its median and rates, if there are times."""
    timed = spread(times)
    if timed is None:
        return row
    ms, noise = timed
    return replace(
        row,
        ms=ms,
        tflops=flop / ms / 1e9 if flop else None,
        gigabytes_s=None if flop else moved / ms / 1e6,
        share=None if best_ms is None else best_ms / ms,
        noise_ms=noise,
    )


def difference(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Relative error and cosine. Sums in FP64, without a copy of gigabytes in FP64."""
    got, want = got.float(), want.float()
    error, size, own = _norm(got - want), _norm(want), _norm(got)
    size, own = size.clamp_min(1e-300), own.clamp_min(1e-300)
    cosine = (got * want).sum(dtype=torch.float64) / (own * size)
    return (error / size).item(), cosine.item()


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def median_ms(run: Callable[[], object]) -> float:
    """The median between CUDA events, after a first run."""
    run()
    first = event_ms(run)
    count = max(FEWEST, min(MOST, round(RUNS_MS / max(first, 1e-3))))
    return statistics.median(event_ms(run) for _ in range(count))


def gpu_facts() -> dict[str, object]:
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "gpu": None if gpu is None else gpu.name,
        "capability": None if gpu is None else [gpu.major, gpu.minor],
        "memory_gib": None if gpu is None else round(gpu.total_memory / 2**30),
    }


SUITE = Suite(measure_gpu, kernel_table, kernel_figures)
