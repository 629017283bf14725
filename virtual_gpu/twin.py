"""Does a real GPU compute what the virtual one does? Launch by launch, from the same memory.

The model is exact where PTX says what comes out to the last bit: `approximations` lists the
instructions of a kernel that are not of this kind. Without any, every bit must be the same; ptxas
may still fuse a product and a sum that PTX leaves apart, and then the difference is worth a look.
With some, values may differ within `limit`, and codes of 8 bits by one place, few of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8 import LIMITS
from kernels.launch import DriverError
from kernels.spec import Argument, Bank, KernelError, KernelSpec, Tuning
from virtual_gpu.bank import VirtualBank
from virtual_gpu.cases import OPS, Wanted, every
from virtual_gpu.measure import places, relative_error
from virtual_gpu.program import Program

TOKENS = (129, 300)  # several at once: odd sizes of each operation too
OTHER_CODES = 1e-3  # of codes may lie beside those of the virtual GPU, where a tie was tipped over

# Beginnings of instructions whose last bits PTX leaves open: two or three units of FP32.
_APPROXIMATE = ("div.full", "ex2.approx", "rsqrt.approx", "sqrt.approx")
_FLOATING_SUMS = " with floating sums"
# Relative errors that a tensor may have for them. Some values of 16 bits are tipped over, by 2^-8.
_OF_FUNCTIONS = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}
# Tensor cores of Ada and Hopper keep about 14 bits of sums of E4M3 (docs/reference/performance.md
# A); of none it is known in what order they round.
_OF_SUMS = 1e-2


@dataclass(frozen=True, slots=True)
class Difference:
    """What a real GPU made of one launch, beside the virtual one."""

    kernel: str
    approximations: tuple[str, ...]  # none: the model is exact
    values: int  # of all tensors that the kernel was given
    others: int  # values that are not the same bits
    error: float  # relative, of the tensor whose error is nearest to its limit
    limit: float  # of that tensor
    farthest: int  # places between codes of 8 bits
    fault: str = ""  # why there is no result, or how it contradicts itself

    @property
    def holds(self) -> bool:
        if self.fault:
            return False
        if not self.approximations:
            return self.others == 0
        return self.error <= self.limit and self.farthest <= 1  # NaN does not

    def __str__(self) -> str:
        if self.fault:
            return f"{self.kernel}: {self.fault}"
        must = f"limit {self.limit:.0e}" if self.approximations else "every bit must be the same"
        return (
            f"{self.kernel}: {self.others} of {self.values} values differ from the virtual GPU's, "
            f"relative error {self.error:.2e}, codes by {self.farthest} places; {must}"
        )


def approximations(program: Program) -> tuple[str, ...]:
    """Returns the instructions of a kernel whose last bits are open; none if the model is exact."""
    found = set()
    for opcode in program.opcodes:
        found |= {begin for begin in _APPROXIMATE if opcode.startswith(begin)}
        if _is_floating_product(opcode):
            found.add(opcode.partition(".")[0] + _FLOATING_SUMS)
    return tuple(sorted(found))


def limit_of(open_bits: Sequence[str], dtype: torch.dtype) -> float:
    """Returns the relative error that a tensor may have where a kernel has such instructions. That
    of codes of 8 bits is 0 where few differ, and 1 where many do.
    """
    if any(one.endswith(_FLOATING_SUMS) for one in open_bits):
        return _OF_SUMS
    return _OF_FUNCTIONS.get(dtype, 0.0) if open_bits else 0.0


def _is_floating_product(opcode: str) -> bool:
    kind, *parts = opcode.split(".")
    return kind in ("mma", "wgmma") and any(part in ("f32", "f16") for part in parts)


class TwinBank:
    """Launches each kernel on a real GPU and on the virtual one. A `kernels.spec.Bank` for tensors
    of the CPU, which go on with what the virtual GPU made: one difference is told once.
    """

    def __init__(
        self,
        real: Bank,
        device: torch.device,
        virtual: VirtualBank,
        told: Callable[[Difference], object],
        repeats: int = 1,
    ) -> None:
        """`real` launches on tensors of `device`, each launch so many times more: a GPU must give
        the same bits whenever it is asked.
        """
        self.arch = virtual.arch
        self._real, self._device, self._virtual = real, device, virtual
        self._told, self._repeats = told, repeats

    def tuning(self, spec: KernelSpec) -> Tuning:
        return self._virtual.tuning(spec)

    def launch(self, spec: KernelSpec, grid: Sequence[int], *arguments: Argument) -> None:
        self._virtual.tuning(spec)  # loads it
        open_bits = approximations(self._virtual.programs[spec.name])
        fault, made = "", list[Tensor]()
        try:
            made = self._run(spec, grid, arguments)
            for _ in range(self._repeats):
                again = self._run(spec, grid, arguments)
                if not all(map(torch.equal, map(_bits, made), map(_bits, again))):
                    fault = "the same launch gives other bits the next time"
        except (DriverError, KernelError, torch.AcceleratorError) as error:
            fault = f"it does not run: {str(error).partition(chr(10))[0]}"
        self._virtual.launch(spec, grid, *arguments)
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        pairs = list(zip(made, tensors)) if made else []
        errors = [(_error(*pair), limit_of(open_bits, pair[1].dtype)) for pair in pairs]
        error, limit = max(errors, key=_share, default=(0.0, 0.0))
        self._told(
            Difference(
                spec.name,
                open_bits,
                values=sum(want.numel() for want in tensors),
                others=sum(_others(*pair) for pair in pairs),
                error=error,
                limit=limit,
                farthest=max((_farthest(*pair) for pair in pairs), default=0),
                fault=fault,
            )
        )

    def _run(
        self, spec: KernelSpec, grid: Sequence[int], arguments: Sequence[Argument]
    ) -> list[Tensor]:
        """Returns all tensors after a launch on the real GPU."""
        there = [
            value.to(self._device, copy=True) if isinstance(value, Tensor) else value
            for value in arguments
        ]
        self._real.launch(spec, grid, *there)
        return [value.cpu() for value in there if isinstance(value, Tensor)]


def differences(
    real: Bank,
    device: torch.device,
    virtual: VirtualBank,
    wanted: Wanted = every,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 1,
) -> Iterator[Difference]:
    """Yields what was found of every launch of the kernels of the 14B model, at odd sizes."""
    for op in OPS.values():
        if any(map(wanted, op.specs(virtual.arch))):
            found: list[Difference] = []
            bank = TwinBank(real, device, virtual, found.append, repeats)
            for _ in op.run(bank, virtual.arch, tokens, wanted):
                yield from found
                found.clear()
            yield from found


def worst(found: Iterable[Difference]) -> Difference:
    """Returns that of one kernel's launches which is the most worth knowing."""
    return max(found, key=lambda one: (not one.holds, one.farthest, one.error, one.others))


def _share(found: tuple[float, float]) -> float:
    """Returns how much of its limit an error takes; of NaN more than any."""
    error, limit = found
    return math.inf if math.isnan(error) else error / max(limit, 1e-30)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _others(got: Tensor, want: Tensor) -> int:
    size = want.element_size()
    apart = (_bits(got) != _bits(want)).view(-1, size).any(1)
    return int(apart.sum())


def _error(got: Tensor, want: Tensor) -> float:
    """Returns 0 for the same bits, which may be those of NaN: memory that nobody wrote."""
    if torch.equal(_bits(got), _bits(want)):
        return 0.0
    same = (_bits(got) == _bits(want)).view(-1, want.element_size()).all(1).view(want.shape)
    if want.dtype in LIMITS:
        return 0.0 if int((~same).sum()) <= max(2, OTHER_CODES * want.numel()) else 1.0
    got, want = (side.masked_fill(same & want.isnan(), 0) for side in (got, want))
    return relative_error(got, want)


def _farthest(got: Tensor, want: Tensor) -> int:
    if want.dtype not in LIMITS:
        return 0
    return int((places(got) - places(want)).abs().max())
