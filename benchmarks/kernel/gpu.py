"""One measuring run on a Hopper GPU, from cubins that were made elsewhere.

python benchmarks/kernel/gpu.py build DIR              here, without a GPU: compile and prove
python benchmarks/kernel/gpu.py run DIR --out FILE     there, without a compiler: check, time, table

`run` first loads every cubin through the launcher and holds every kernel against its reference at
small sizes; then it times what was right at the sizes of real clips, and other libraries. FILE
gets a line of JSON after each step, so a run that is cut short has lost one step. `--dry` does the
same in the interpreter on the CPU with tiny sizes, and gives no times.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.kernel.cases import SCAIL_14B, TINY, KernelCase, cases
from benchmarks.kernel.peers import Peer, peers
from benchmarks.kernel.suite import (
    TOKENS,
    KernelPlace,
    KernelRow,
    compile_cases,
    current_stream,
    difference,
    kernel_table,
    median_ms,
    peer_row,
    timed_row,
)
from benchmarks.timing import WrongResult
from kernels.aot.cubin import Cubin, cubin_from_record
from kernels.arch import SM90
from kernels.launch import DriverError, KernelBank
from kernels.spec import KernelError

CHECKED_TOKENS = (1, 77, 300)  # one, odd, past several tiles
RESERVE_S = 30  # of the budget, for a step that has begun


@dataclass(frozen=True, slots=True)
class GpuRun:
    place: KernelPlace
    cases: list[KernelCase]
    tokens: tuple[int, ...]  # that are timed
    peers: Callable[[int], Iterable[Peer]]
    deadline: float  # of time.monotonic()
    out: Path


def build(folder: Path) -> int:
    """Writes every cubin and its record; returns how many bytes there are to carry."""
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    for name, cubin in compile_cases(cases(SM90, SCAIL_14B), SM90).items():
        (folder / f"{name}.cubin").write_bytes(cubin.data)
        (folder / f"{name}.json").write_text(json.dumps(cubin.record()))
        size += len(cubin.data)
    return size


def load(folder: Path) -> dict[str, Cubin]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        found[path.stem] = cubin_from_record(record, path.with_suffix(".cubin").read_bytes())
    if not found:
        sys.exit(
            f"error: no cubins in {folder}. Make them with: python benchmarks/kernel/gpu.py build"
        )
    return found


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[GpuRun]:
    """With a bank of loaded cubins, or of the interpreter."""
    deadline = time.monotonic() + args.budget
    model = TINY if args.dry else SCAIL_14B
    chosen = [case for case in cases(SM90, model) if case.name.startswith(tuple(args.only))]
    if args.dry:
        # makes this process interpret Triton
        from tests.support.interpreter import InterpretedBank

        place = KernelPlace(SM90, InterpretedBank(SM90), torch.device("cpu"), {}, run_once)
        yield GpuRun(place, chosen, (130,), lambda _: (), deadline, args.out)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.zeros(1, device="cuda")  # the context that the launcher shares
    cubins = load(args.folder)
    with KernelBank(cubins.values(), SM90, current_stream) as bank:
        place = KernelPlace(SM90, bank, torch.device("cuda:0"), cubins, median_ms)
        yield GpuRun(place, chosen, TOKENS, peers, deadline, args.out)


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
    """Names of the cases that are wrong at a small size."""
    wrong, place = [], run.place
    for case in run.cases:
        for tokens in CHECKED_TOKENS:
            if _is_late(run):
                _write(run, {"step": "check", "case": case.name, "skipped": "no time left"})
                break
            fact: dict[str, object] = {"step": "check", "case": case.name, "tokens": tokens}
            try:
                error, cosine = difference(
                    *case.prepare(place.bank, tokens, place.device).compare()
                )
                ok = error <= case.limit
                fact |= {"error": error, "cosine": cosine, "limit": case.limit, "ok": ok}
            except (KernelError, DriverError) as error:
                ok, fact = False, fact | {"ok": False, "failed": str(error)}
            _write(run, fact)
            if not ok:
                wrong.append(case.name)
                break
    return wrong


def measure(run: GpuRun, wrong: Sequence[str]) -> list[KernelRow]:
    """Times of the cases that were right, and of other libraries."""
    rows = []
    for tokens in run.tokens:
        for case in run.cases:
            if case.name in wrong:
                continue
            if _is_late(run):
                _write(run, {"step": "time", "case": case.name, "skipped": "no time left"})
                continue
            try:
                row = timed_row(case, run.place, tokens)
            except WrongResult as error:
                row = KernelRow(case.name, SM90.name, tokens=tokens, note=f"WRONG: {error}")
            rows.append(row)
            _write(run, {"step": "time"} | asdict(row))
        for peer in run.peers(tokens):
            if not _is_late(run):
                rows.append(peer_row(peer, SM90, tokens))
                _write(run, {"step": "peer"} | asdict(rows[-1]))
    return rows


def _is_late(run: GpuRun) -> bool:
    return time.monotonic() > run.deadline - RESERVE_S


def _write(run: GpuRun, fact: Mapping[str, object]) -> None:
    line = json.dumps(fact)
    with run.out.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def machine() -> dict[str, object]:
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "step": "machine",
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "gpu": None if gpu is None else gpu.name,
        "capability": None if gpu is None else [gpu.major, gpu.minor],
        "memory_gib": None if gpu is None else round(gpu.total_memory / 2**30),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("build").add_argument("folder", type=Path, metavar="DIR")
    runner = actions.add_parser("run")
    runner.add_argument("folder", type=Path, metavar="DIR")
    runner.add_argument("--out", type=Path, default=Path("gpu.jsonl"), metavar="FILE")
    runner.add_argument("--budget", type=float, default=480.0, metavar="SECONDS")
    runner.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="of cases, by start"
    )
    runner.add_argument("--dry", action="store_true", help="interpret, on the CPU, tiny sizes")
    args = parser.parse_args(argv)
    if args.action == "build":
        size = build(args.folder)
        print(f"{size / 2**20:.1f} MiB of cubins in {args.folder}")
        return
    with prepared(args) as run:
        _write(run, machine())
        with poisoned_memory():
            wrong = check(run)
        rows = measure(run, wrong)
    print(kernel_table(rows))
    wrong += [row.name for row in rows if row.note.startswith("WRONG")]
    if wrong:
        sys.exit(f"error: wrong results: {', '.join(dict.fromkeys(wrong))}")


if __name__ == "__main__":
    main()
