"""Suite `twins`: does this GPU compute what the virtual one does, kernel by kernel?

Every kernel of the 14B model is launched at odd sizes on the GPU, more than once, and on the
virtual GPU from the same memory (`virtual_gpu/twin.py`): bit for bit where the model is exact,
else within a limit. Needs a C++ compiler or the `ziglang` wheel, and the PTX that
`benchmarks/run.py cubins` puts beside the cubins. `--dry` lets another order of warps and blocks of
the virtual GPU stand in for the real one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.kernel.cubins import compiled, load
from benchmarks.kernel.gpu import current_stream, here, say
from benchmarks.record import Figure, Suite, machine
from benchmarks.timing import WrongResult, columns
from engine.config import state_dir
from kernels.arch import SM89, Arch
from kernels.launch import KernelBank
from kernels.spec import Bank, KernelSpec
from virtual_gpu.bank import VirtualBank
from virtual_gpu.orders import BACKWARD, FORWARD
from virtual_gpu.twin import TOKENS, Difference, differences, worst

REPEATS = 20  # of each launch, which must give the same bits: products may be fed too early
DRY_TOKENS = (17,)


@dataclass(frozen=True, slots=True)
class TwinRow:
    """One kernel, by the launch that says most of it."""

    kernel: str
    arch: str
    model: str  # "exact", or the instructions whose last bits are open
    launches: int
    values: int
    others: int  # values that are not the same bits
    error: float
    limit: float
    farthest: int  # places between codes
    note: str  # empty: it is as it must be


@dataclass(frozen=True, slots=True)
class TwinPlace:
    """A GPU and the virtual one for the same architecture, with the same machine code."""

    arch: Arch
    real: Bank
    device: torch.device
    virtual: VirtualBank


def measure_twins(
    kernels: Path | None = None,
    out: Path = Path("gpu.jsonl"),
    *,
    dry: bool = False,
    only: Sequence[str] = ("",),
) -> tuple[str, list[TwinRow]]:
    """Compares. `only`: beginnings of names.

    Raises `Unavailable` without cubins, `BuildError` without a compiler, `KernelError` without PTX,
    and `WrongResult` after all is compared if anything differs that must not.
    """
    with _place(kernels, dry) as place:
        say(out, "machine", machine())
        tokens, repeats = (DRY_TOKENS, 1) if dry else (TOKENS, REPEATS)
        rows = compare(place, only, tokens, repeats)
    for row in rows:
        say(out, "twin", asdict(row))
    wrong = [f"{row.kernel}, {row.note}" for row in rows if row.note]
    if wrong:
        print(twin_table(rows))
        raise WrongResult("not as the virtual GPU computes it: " + "; ".join(wrong))
    return "the virtual GPU", rows


def compare(
    place: TwinPlace, only: Sequence[str], tokens: Sequence[int], repeats: int
) -> list[TwinRow]:
    """Rows of all kernels whose names begin so."""

    def wanted(spec: KernelSpec) -> bool:
        return spec.name.startswith(tuple(only))

    by_kernel: dict[str, list[Difference]] = {}
    given = place.real, place.device, place.virtual, wanted, tokens, repeats
    for one in differences(*given):
        by_kernel.setdefault(one.kernel, []).append(one)
    return [
        _row(place.arch, found)
        for name, found in sorted(by_kernel.items())
        if name.startswith(tuple(only))
    ]


def _row(arch: Arch, found: Sequence[Difference]) -> TwinRow:
    one = worst(found)
    model = ", ".join(one.approximations) or "exact"
    note = "" if one.holds else f"DIFFERS: {one}"
    return TwinRow(
        one.kernel, arch.name, model, len(found), one.values, one.others, one.error, one.limit,
        one.farthest, note,
    )  # fmt: skip


@contextmanager
def _place(kernels: Path | None, dry: bool) -> Iterator[TwinPlace]:
    if dry:
        real, virtual = (VirtualBank(SM89, state_dir(), [one]) for one in (BACKWARD, FORWARD))
        yield TwinPlace(SM89, real, torch.device("cpu"), virtual)
        return
    arch = here()
    cubins = compiled(arch) if kernels is None else load(kernels)
    virtual = VirtualBank(arch, state_dir() if kernels is None else kernels, [FORWARD])
    for cubin in cubins.values():
        virtual.load(cubin)
    torch.zeros(1, device="cuda")  # the context that the launcher shares
    with KernelBank(cubins.values(), arch, current_stream) as real:
        yield TwinPlace(arch, real, torch.device("cuda:0"), virtual)


def twin_table(rows: Sequence[TwinRow]) -> str:
    """Columns for a terminal."""
    heads = {"arch": "", "model": "", "launches": "d", "values": "d", "others": "d", "error": ".1e",
        "limit": ".0e", "codes": "d", "note": ""}  # fmt: skip
    lines = [
        (row.kernel, row.arch, row.model, row.launches, row.values, row.others, row.error,
         row.limit, row.farthest, row.note)
        for row in rows
    ]  # fmt: skip
    return columns(heads, lines)


def twin_figures(rows: Sequence[TwinRow]) -> list[Figure]:
    """None: nothing is timed."""
    return []


SUITE = Suite(measure_twins, twin_table, twin_figures)
