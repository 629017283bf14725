"""Suite `kernels`: every kernel for every architecture, from its machine code, and timed on a GPU.

Without a GPU: registers, shared memory, instructions for each matrix instruction, and an estimate.
On a GPU also its times, after each result was found right, and those of other libraries.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.figures import Figure
from benchmarks.kernel.cases import SCAIL_14B, KernelCase, KernelJob, cases
from benchmarks.kernel.model import GPUS, estimated_tflops, limit_ms
from benchmarks.kernel.peers import (
    ATTENTION,
    OF_KERNELS,
    PRODUCTS,
    Peer,
    PeerTimer,
    PeerWork,
    interleaved,
    lacking,
    peers,
)
from benchmarks.timing import WrongResult
from engine.config import state_dir
from kernels.aot.compile import compile_kernels
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, Arch
from kernels.launch import KernelBank
from kernels.spec import Bank
from kernels.trial import event_ms

TOKENS = (29757, 48832)  # 416x672 and 512x896, 81 frames
RUNS_MS = 200  # of repeated launches for one median
FEWEST, MOST = 5, 50  # runs


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel of one architecture, or another library's; None where nothing is known."""

    name: str
    arch: str
    registers: int | None = None  # a thread's
    shared_kib: float | None = None
    instructions_per_mma: float | None = None
    estimated_tflops: float | None = None  # from the machine code: not measured
    tokens: int | None = None
    error: float | None = None  # relative, against the reference
    cosine: float | None = None
    ms: float | None = None  # median
    tflops: float | None = None
    gigabytes_s: float | None = None
    share: float | None = None  # of what the GPU could do at best
    note: str = ""
    noise_ms: float | None = None  # half of the spread of several medians


@dataclass(frozen=True, slots=True)
class KernelPlace:
    """Where kernels run and are timed."""

    arch: Arch
    bank: Bank
    device: torch.device
    cubins: dict[str, Cubin]  # by the names of specs
    clock: PeerTimer


def measure_kernels() -> tuple[str, list[KernelRow]]:
    """How results were checked, and a row for each kernel. Raises `WrongResult`."""
    rows = []
    for arch in ARCHS:
        everything = cases(arch, SCAIL_14B)
        cubins = compile_cases(everything, arch)
        rows += [static_row(case, arch, cubins) for case in everything]
        if runs_here(arch):
            with KernelBank(cubins.values(), arch, current_stream) as bank:
                place = KernelPlace(arch, bank, torch.device("cuda:0"), cubins, median_ms)
                for tokens in TOKENS:
                    for ours, theirs in rivals(everything, [*peers(tokens)]):
                        rows += rival_rows(ours, theirs, place, tokens)
    if any(runs_here(arch) for arch in ARCHS):
        return "the references beside the kernels", rows
    rows += [KernelRow(one.measures, "", note=lacking((one,), False)) for one in OF_KERNELS]
    return "the proofs of their machine code alone: no GPU here runs them", rows


def compile_cases(everything: Sequence[KernelCase], arch: Arch) -> dict[str, Cubin]:
    """Proven cubins by the names of their specs."""
    specs = {spec.name: spec for case in everything for spec in case.specs}
    made = compile_kernels([(spec, arch) for spec in specs.values()], state_dir())
    return dict(zip(specs, made))


def runs_here(arch: Arch) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == arch.capability


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def static_row(case: KernelCase, arch: Arch, cubins: dict[str, Cubin]) -> KernelRow:
    """Of the kernels of a case the one with the most registers."""
    held = max((cubins[spec.name] for spec in case.specs), key=lambda cubin: cubin.registers)
    mix = held.loop
    return KernelRow(
        case.name,
        arch.name,
        held.registers,
        held.shared_bytes / 1024,
        None if mix is None else mix.instructions / sum(mix.mma.values()),
        None if mix is None else estimated_tflops(held, arch),
    )


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
    """Rows of both, timed in turns. Raises `WrongResult` before any is timed."""
    checked = [_checked(case, place, tokens) for case in ours]
    works: dict[str, PeerWork] = {row.name: job.run for job, row in checked}
    begun = {peer.name: _begun(peer) for peer in theirs}
    works |= {name: work for name, work in begun.items() if not isinstance(work, str)}
    times = interleaved(works, place.clock)
    rows = [
        _with_times(case, row, place, spread(times[row.name]))
        for case, (_, row) in zip(ours, checked, strict=True)
    ]
    for peer in theirs:
        work = begun[peer.name]
        note = work if isinstance(work, str) else ""
        row = KernelRow(peer.name, place.arch.name, tokens=tokens, note=note)
        rows.append(_with_rate(row, peer, spread(times.get(peer.name, []))))
    return rows


def timed_row(case: KernelCase, place: KernelPlace, tokens: int) -> KernelRow:
    """A case alone. Raises `WrongResult` instead of giving the time of a wrong result."""
    return rival_rows([case], [], place, tokens)[0]


def peer_row(peer: Peer, arch: Arch, tokens: int) -> KernelRow:
    """A peer alone."""
    work = _begun(peer)
    if isinstance(work, str):
        return KernelRow(peer.name, arch.name, tokens=tokens, note=work)
    row = KernelRow(peer.name, arch.name, tokens=tokens)
    return _with_rate(row, peer, spread_ms(median_ms, work))


def _checked(case: KernelCase, place: KernelPlace, tokens: int) -> tuple[KernelJob, KernelRow]:
    job = case.prepare(place.bank, tokens, place.device)
    error, cosine = difference(*job.compare())
    if not error <= case.limit:  # NaN too
        raise WrongResult(
            f"{case.name}, {tokens} tokens: relative error {error:.2e}, limit {case.limit:.0e}"
        )
    return job, KernelRow(case.name, place.arch.name, tokens=tokens, error=error, cosine=cosine)


def _begun(peer: Peer) -> PeerWork | str:
    """Its work, which has been done once, or why there is none."""
    if peer.run is None:
        return peer.missing
    try:
        work = peer.run()
        work()
    except (RuntimeError, NotImplementedError, ValueError, ImportError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"failed: {reason[:100]}"
    return work


def _with_times(
    case: KernelCase, row: KernelRow, place: KernelPlace, timed: tuple[float, float] | None
) -> KernelRow:
    if timed is None:
        return row
    (ms, noise), tokens = timed, row.tokens or 0
    work, moved = case.flop(tokens), case.moved(tokens)
    best = limit_ms(work, moved, place.cubins[case.specs[0].name].loop, GPUS[place.arch])
    return replace(
        row,
        ms=ms,
        tflops=work / ms / 1e9 if work else None,
        gigabytes_s=None if work else moved / ms / 1e6,
        share=best / ms,
        noise_ms=noise,
    )


def _with_rate(row: KernelRow, peer: Peer, timed: tuple[float, float] | None) -> KernelRow:
    if timed is None:
        return row
    ms, noise = timed
    return replace(row, ms=ms, tflops=peer.flop / ms / 1e9, noise_ms=noise)


def difference(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Relative error and cosine. Sums in FP64, without a copy of gigabytes in FP64."""
    got, want = got.float(), want.float()
    error, size, own = _norm(got - want), _norm(want), _norm(got)
    size, own = size.clamp_min(1e-300), own.clamp_min(1e-300)
    cosine = (got * want).sum(dtype=torch.float64) / (own * size)
    return (error / size).item(), cosine.item()


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def spread_ms(clock: PeerTimer, run: PeerWork) -> tuple[float, float] | None:
    """The median of several times and half of their spread; None: the clock gives no times."""
    return spread(interleaved({"alone": run}, clock)["alone"])


def spread(times: Sequence[float]) -> tuple[float, float] | None:
    """Their median, and half of what lies between the best and the worst; None: there are none."""
    return (statistics.median(times), (max(times) - min(times)) / 2) if times else None


def median_ms(run: Callable[[], object]) -> float:
    """Between CUDA events, after a first run."""
    run()
    first = event_ms(run)
    count = max(FEWEST, min(MOST, round(RUNS_MS / max(first, 1e-3))))
    return statistics.median(event_ms(run) for _ in range(count))


def kernel_table(rows: Sequence[KernelRow]) -> str:
    """Columns for a terminal; "est" is an estimate and no measurement."""
    heads = (
        f"{'':34}{'arch':>6}{'regs':>5}{'KiB':>6}{'i/mma':>7}{'est TF':>8}"
        f"{'tokens':>8}{'error':>9}{'cosine':>9}{'ms':>9}{'TF':>7}{'GB/s':>7}{'share':>7}"
    )
    lines = [heads]
    for row in rows:
        cells = (
            (row.registers, 5, "d"), (row.shared_kib, 6, ".0f"),
            (row.instructions_per_mma, 7, ".2f"), (row.estimated_tflops, 8, ".0f"),
            (row.tokens, 8, "d"), (row.error, 9, ".1e"), (row.cosine, 9, ".5f"),
            (row.ms, 9, ".3f"), (row.tflops, 7, ".0f"), (row.gigabytes_s, 7, ".0f"),
            (row.share, 7, ".0%"),
        )  # fmt: skip
        shown = "".join(
            f"{'' if value is None else format(value, style):>{width}}"
            for value, width, style in cells
        )
        lines.append(f"{row.name:34}{row.arch:>6}{shown}  {row.note}".rstrip())
    return "\n".join(lines)


def kernel_figures(rows: Sequence[KernelRow]) -> list[Figure]:
    """Times that were measured, and rates that machine code allows: never one for the other."""
    found = []
    for row in rows:
        name = f"{row.arch} {row.name}"
        if row.ms is not None:
            timed = f"{name}, {row.tokens} tokens"
            found.append(Figure(timed, row.ms, "ms", row.noise_ms or 0.0, "lower", "measured"))
        if row.estimated_tflops is not None:
            rate = row.estimated_tflops
            found.append(Figure(name, rate, "TFLOPS", 0.0, "higher", "estimate"))
    return found
