"""Chooses the fastest of the kernels in a package that do the same work, on this very GPU.

No GPU of most architectures was at hand when the kernels were made, so a package may hold several
for one form of attention, or for the products of one dtype. At start-up each is loaded, held
against its definition on a few tiles, and timed on a small problem. A kernel that cannot be used is
left out with the reason; the form itself is the user's and is never changed here. The choice is
kept, so that the next start on this GPU with this driver and package costs nothing.

Source: docs/reference/kernels.md 2.7 and 8.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from engine.diskcache import DiskCache
from engine.errors import BadPackage, Unavailable, UnsupportedDriver
from engine.machine.gpu import Gpu
from kernels.aot.cubin import Cubin
from kernels.arch import Arch
from kernels.attention import ATTENTION, FORMS, variants
from kernels.gemm import GEMM, Gemm
from kernels.launch import DriverError
from kernels.spec import Bank, KernelError, KernelSpec
from kernels.trial import Way, error_of, specs_of, timed_problem

log = logging.getLogger(__name__)

BUDGET_MS = 300  # for all timing: after the checks, whose definitions the CPU computes
MOST_ROUNDS = 9  # of timing; the best counts
MARGIN = 0.98  # a variant must be faster than a preferred one by 2 %, or noise would choose
ERROR_LIMIT = 1e-2  # relative, against the definition: BF16 alone makes 2e-3

_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_KEPT = "variants 2"  # changes with what is kept, and with how it was measured
_KEPT_BYTES = 2**20

KernelTimer: TypeAlias = Callable[[Callable[[], object]], float]  # ms of one run: `trial.trial_ms`


class LoadingBank(Bank, Protocol):
    """A bank that takes kernels: `kernels.launch.KernelBank`."""

    arch: Arch

    def load(self, cubin: Cubin) -> None: ...


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do the work of an op, and what was found of it."""

    name: str  # key of ATTENTION or GEMM
    ms: float | None = None  # of the timed problem
    fault: str = ""  # why it cannot be used


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The variant that was chosen for one op, among those that were tried."""

    op: str  # "attention.int8fp8", "gemm.int8"
    chosen: str | None  # None: nothing works
    why: str
    variants: tuple[Variant, ...]  # in order of preference


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices for all ops of a package."""

    ops: tuple[KernelChoice, ...]


def choose_variants(
    cubins: Sequence[Cubin],
    digest: str,
    gpu: Gpu,
    bank: LoadingBank,
    device: torch.device,
    state: Path,
    clock: KernelTimer,
    now: Callable[[], float] = time.perf_counter,
) -> Choices:
    """Loads a package's kernels into an empty bank and chooses among those that do the same.

    `digest` names the package. Raises `UnsupportedDriver` if the driver refuses a kernel that has
    no variant or if one breaks the GPU's context, and `BadPackage` for one that no bank can hold.
    """
    begin = now()
    held = _held(bank.arch, cubins)
    refused = _load(bank, cubins, held, gpu)
    kept = known_choices(digest, gpu, state)
    if kept is not None and _fits(kept, held, {*refused}):
        log.info("kernels as chosen before on this %s:", gpu.name)
        _tell(kept)
        return kept
    found = _measure(held, refused, bank, device, clock, now)
    _tell(found)
    log.info("%-12s %8.0f ms", "variants", 1000 * (now() - begin))
    if all(map(_is_settled, found.ops)):
        keep_choices(found, digest, gpu, state)
    return found


def keep_choices(choices: Choices, digest: str, gpu: Gpu, state: Path) -> None:
    """Keeps choices for the next start. A folder that cannot be written is logged."""
    _cache(state).write(_key(digest, gpu), json.dumps(asdict(choices)).encode())


def known_choices(digest: str, gpu: Gpu, state: Path) -> Choices | None:
    """Reads what was chosen before for this GPU, driver and package. None if nothing is kept."""
    data = _cache(state).read(_key(digest, gpu))
    if data is None:
        return None
    try:
        ops = json.loads(data)["ops"]
        return Choices(
            tuple(
                KernelChoice(**op | {"variants": tuple(Variant(**one) for one in op["variants"])})
                for op in ops
            )
        )
    except (ValueError, KeyError, TypeError) as error:
        log.warning("the choice of kernels kept in %s cannot be read: %r", state, error)
        return None


def attention_kernel(choices: Choices, form: str) -> KernelSpec:
    """Finds the kernel for a form of attention, one of `FORMS`. Raises `Unavailable` for a form
    that the package does not have, and `UnsupportedDriver` if none of its kernels works here.
    """
    offered = [choice.op for choice in choices.ops if choice.op.startswith("attention.")]
    choice = _find(choices, f"attention.{form}")
    if choice is None:
        has = ", ".join(op.partition(".")[2] for op in offered) or "none"
        raise Unavailable(
            f"Attention of the form {form} is not in this package, which has {has}. Ask for one "
            f"of these, or build the package with it."
        )
    return ATTENTION[_chosen(choice)]


def gemm_ways(choices: Choices, dtypes: Collection[torch.dtype]) -> tuple[Gemm, ...]:
    """Finds the kernels for products of these weights, for `kernels.ops.native_ops`. Raises
    `BadPackage` if the package has none for one of them, `UnsupportedDriver` if none works here.
    """
    found = []
    for name, dtype in _DTYPES.items():
        if dtype in dtypes:
            choice = _find(choices, f"gemm.{name}")
            if choice is None:
                raise BadPackage(
                    f"The package has {name} weights and no kernels that multiply them. Build it "
                    f"again."
                )
            found.append(GEMM[_chosen(choice)])
    return tuple(found)


def chosen_sums(choices: Choices) -> dict[str, str]:
    """Tells, by op, in what the chosen products keep their sums: speed alone chose, and on some
    GPUs the fastest has short ones (docs/reference/performance.md A).
    """
    return {
        choice.op: f"{choice.chosen}: {GEMM[choice.chosen].sums}"
        for choice in choices.ops
        if choice.chosen is not None and choice.op.startswith("gemm.")
    }


def _held(arch: Arch, cubins: Sequence[Cubin]) -> dict[str, dict[str, Way]]:
    """Groups the variants in the package by op, then by name, in order of preference."""
    names = {cubin.name for cubin in cubins}
    ops: dict[str, dict[str, Way]] = {}
    for form in FORMS:
        mine = variants(form, arch)
        ops[f"attention.{form}"] = {n: spec for n, spec in ATTENTION.items() if spec in mine}
    for name, dtype in _DTYPES.items():
        ops[f"gemm.{name}"] = {
            n: way for n, way in GEMM.items() if way.dtype == dtype and arch in way.bias.tuning
        }
    ops = {
        op: {n: way for n, way in ways.items() if names & {spec.name for spec in specs_of(way)}}
        for op, ways in ops.items()
    }
    return {op: ways for op, ways in ops.items() if ways}


def _load(
    bank: LoadingBank, cubins: Sequence[Cubin], held: Mapping[str, Mapping[str, Way]], gpu: Gpu
) -> dict[str, str]:
    """Loads all kernels. Returns the variants that the driver refused, with its reasons."""
    replaceable = {
        spec.name for ways in held.values() for way in ways.values() for spec in specs_of(way)
    }
    refused = {}
    for cubin in cubins:
        try:
            bank.load(cubin)
        except KernelError as error:
            raise BadPackage(f"{error}. Build the package again.") from error
        except DriverError as error:
            if cubin.name not in replaceable:
                cuda = ".".join(map(str, gpu.cuda))
                raise UnsupportedDriver(
                    f"The driver of {gpu.name} (CUDA {cuda}) refuses a kernel that was built with "
                    f"CUDA {cubin.toolkit}: {error}. Update the driver."
                ) from error
            refused[cubin.name] = str(error)
    return refused


def _measure(
    held: Mapping[str, Mapping[str, Way]],
    refused: Mapping[str, str],
    bank: Bank,
    device: torch.device,
    clock: KernelTimer,
    now: Callable[[], float],
) -> Choices:
    """Checks all variants, then shares `BUDGET_MS` among the ops that have a choice."""
    faults = {
        op: {name: _fault(bank, way, refused, device) for name, way in ways.items()}
        for op, ways in held.items()
    }
    end = now() + BUDGET_MS / 1000
    choices, left = [], sum(map(_must_be_timed, faults.values()))
    for op, ways in held.items():
        times: dict[str, float] = {}
        if _must_be_timed(faults[op]):
            sound = {name: way for name, way in ways.items() if not faults[op][name]}
            times = _time(bank, sound, device, clock, now, now() + (end - now()) / left)
            left -= 1
        choices.append(_choice(op, faults[op], times))
    return Choices(tuple(choices))


def _fault(bank: Bank, way: Way, refused: Mapping[str, str], device: torch.device) -> str:
    """Says why a variant cannot be used; empty if it can."""
    for spec in specs_of(way):
        if spec.name in refused:
            return refused[spec.name]
    try:
        error = error_of(bank, way, device)
    except (DriverError, KernelError) as refusal:
        return str(refusal)
    except torch.AcceleratorError as error:
        raise _broken(way, error) from error
    return "" if error <= ERROR_LIMIT else f"wrong by {error:.1e} on a few tiles"  # NaN too


def _must_be_timed(faults: Mapping[str, str]) -> bool:
    return [*faults.values()].count("") > 1


def _time(
    bank: Bank,
    ways: Mapping[str, Way],
    device: torch.device,
    clock: KernelTimer,
    now: Callable[[], float],
    end: float,
) -> dict[str, float]:
    """Times each way once a round, so that all meet the same clock rates, and returns the best ms
    of each. Nothing is begun that would end after `end`, as far as is known; empty if there was no
    time to run each of them once.
    """
    times, lasted_s = dict.fromkeys(ways, math.inf), dict.fromkeys(ways, 0.0)
    if now() >= end:
        return {}
    launch = timed_problem(bank, next(iter(ways.values())), device)
    for _ in range(MOST_ROUNDS):
        for name, way in ways.items():
            begin = now()
            if begin >= end or begin + lasted_s[name] > end:
                return {} if math.inf in times.values() else times
            try:
                times[name] = min(times[name], clock(partial(launch, way)))
                lasted_s[name] = now() - begin
            except (DriverError, torch.AcceleratorError) as error:
                raise _broken(way, error) from error
    return times


def _broken(way: Way, error: Exception) -> UnsupportedDriver:
    """Makes the error for a GPU on which no call works any more, so no variant can be tried."""
    names, reason = ", ".join(spec.name for spec in specs_of(way)), str(error).partition("\n")[0]
    return UnsupportedDriver(
        f"{names} broke the GPU's context: {reason}. Build the package again, or take another GPU "
        f"or driver."
    )


def _choice(op: str, faults: Mapping[str, str], times: Mapping[str, float]) -> KernelChoice:
    sound = [name for name, fault in faults.items() if not fault]
    chosen = sound[0] if sound else None
    for name in sound:
        if times and chosen and times[name] < MARGIN * times[chosen]:
            chosen = name
    if not sound:
        why = "none works"
    elif len(sound) == 1:
        why = "the only one" if len(faults) == 1 else "the only one that works"
    else:
        why = "the fastest" if times else "the first: there was no time to measure"
    tried = (Variant(name, times.get(name), fault) for name, fault in faults.items())
    return KernelChoice(op, chosen, why, tuple(tried))


def _is_settled(choice: KernelChoice) -> bool:
    """Tells if another start on the same GPU would choose the same."""
    sound = [variant for variant in choice.variants if not variant.fault]
    return len(sound) == 1 or bool(sound and sound[0].ms is not None)


def _tell(choices: Choices) -> None:
    for choice in choices.ops:
        times = ", ".join(f"{one.name} {one.ms:.2f} ms" for one in choice.variants if one.ms)
        log.info("%s: %s, %s%s", choice.op, choice.chosen, choice.why, times and f" ({times})")
        for one in choice.variants:
            if one.fault:
                log.warning("%s: %s is left out: %s", choice.op, one.name, one.fault)


def _find(choices: Choices, op: str) -> KernelChoice | None:
    return next((choice for choice in choices.ops if choice.op == op), None)


def _chosen(choice: KernelChoice) -> str:
    if choice.chosen is None:
        reasons = "; ".join(f"{one.name}: {one.fault}" for one in choice.variants)
        op = choice.op.replace(".", " of the form ", 1)
        raise UnsupportedDriver(
            f"No kernel for {op} works on this GPU: {reasons}. Update the driver, or build the "
            f"package again."
        )
    return choice.chosen


def _cache(state: Path) -> DiskCache:
    return DiskCache(state / "variants", _KEPT_BYTES)


def _key(digest: str, gpu: Gpu) -> str:
    return json.dumps([_KEPT, gpu.uuid, gpu.name, gpu.cuda, gpu.driver, digest])


def _fits(kept: Choices, held: Mapping[str, Mapping[str, Way]], refused: set[str]) -> bool:
    """Tells if a kept choice is among the kernels of the package, and of those that load."""
    names = {choice.op: [one.name for one in choice.variants] for choice in kept.ops}
    ways = [held.get(choice.op, {}).get(choice.chosen or "") for choice in kept.ops]
    works = names == {op: [*ways] for op, ways in held.items()} and not any(
        way is None or refused & {spec.name for spec in specs_of(way)} for way in ways
    )
    if not works:
        log.warning("the choice of kernels that was kept does not fit this package: measured again")
    return works
