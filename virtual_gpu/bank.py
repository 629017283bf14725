"""`kernels.launch.KernelBank` on the virtual GPU: the launcher of the product, another libcuda.

Every launch is checked, packed and sized by the launcher itself, and done in each of the bank's
orders, which must agree bit for bit.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.aot.compile import compile_kernels, ptx_path
from kernels.aot.cubin import Cubin
from kernels.arch import Arch
from kernels.launch import DriverError, KernelBank
from kernels.signature import check_launch
from kernels.spec import Argument, KernelError, KernelSpec, Tuning
from virtual_gpu.decode import decode
from virtual_gpu.machine import MISTAKES, Finding, the_machine
from virtual_gpu.orders import ORDERS, Order
from virtual_gpu.program import Program, UnknownPtx


class WrongKernel(Exception):
    """A kernel did what a GPU would not survive, or what has no defined result."""


class VirtualBank(KernelBank):
    """Takes tensors of the CPU. Kernels are compiled into `state` when they are first asked for;
    cubins of a package are loaded with `load`, and their PTX must be in `state`.

    `blocks` replaces tile sizes by name with smaller ones, in the specs that have them.
    """

    def __init__(
        self, arch: Arch, state: Path, orders: Sequence[Order] = ORDERS, **blocks: int
    ) -> None:
        self.machine = the_machine(state)
        super().__init__([], arch, lambda: 0, library=str(self.machine.path))
        self.device = "cpu"
        self.state, self.orders, self.blocks = state, tuple(orders), blocks
        self.launches: Counter[str] = Counter()
        self.notes: list[Finding] = []  # what is worth a look and no mistake
        self.programs: dict[str, Program] = {}
        self._replaced: dict[str, tuple[KernelSpec, KernelSpec]] = {}

    def load(self, cubin: Cubin) -> None:
        path = ptx_path(cubin.sha256, self.state)
        if not path.exists():
            raise KernelError(
                f"there is no PTX of kernel {cubin.name} in {self.state}. Build its package here, "
                f"with SCAIL_STATE as it is now."
            )
        self.load_program(cubin, _decoded(f"{cubin.arch}.{cubin.name}", path))

    def load_program(self, cubin: Cubin, program: Program) -> None:
        """Loads a kernel whose PTX is given, not found."""
        if program.threads != 32 * cubin.warps:
            raise UnknownPtx(f"{program.name} has {program.threads} threads, {cubin.warps} warps")
        self.machine.add(program, cubin.data)
        super().load(cubin)
        self.programs[cubin.name] = program

    def tuning(self, spec: KernelSpec) -> Tuning:
        return super().tuning(self._mine(spec))

    def launch(self, spec: KernelSpec, grid: Sequence[int], *arguments: Argument) -> None:
        mine = self._mine(spec)
        check_launch(mine, self.device, grid, arguments)
        tensors = [value for value in arguments if not isinstance(value, int | float)]
        spans = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
        before = [_bits(t).clone() for t in tensors] if len(self.orders) > 1 else []
        first: list[Tensor] = []
        self.launches[spec.name] += 1
        for number, order in enumerate(self.orders):
            if number:
                for tensor, old in zip(tensors, before):
                    _bits(tensor).copy_(old)
            self._run(mine, order, spans, grid, arguments)
            if not number:
                first = [_bits(tensor).clone() for tensor in tensors] if before else []
            self._compare(spec, order, tensors, first)

    def _run(
        self,
        spec: KernelSpec,
        order: Order,
        spans: Sequence[tuple[int, int]],
        grid: Sequence[int],
        arguments: Sequence[Argument],
    ) -> None:
        self.machine.prepare(order, spans)
        try:
            super().launch(spec, grid, *arguments)
        except DriverError as error:
            self.machine.take_findings()
            raise WrongKernel(self._with_code(spec, self.machine.error())) from error
        found = self.machine.take_findings()
        wrong = [finding for finding in found if finding.name in MISTAKES]
        self.notes += [finding for finding in found if finding.name not in MISTAKES]
        if wrong:
            raise WrongKernel(self._with_code(spec, str(wrong[0])))

    def _compare(
        self, spec: KernelSpec, order: Order, tensors: Sequence[Tensor], first: Sequence[Tensor]
    ) -> None:
        for number, (tensor, want) in enumerate(zip(tensors, first)):
            differs = (_bits(tensor) != want).nonzero()
            if len(differs):
                raise WrongKernel(
                    f"{self.arch.name}.{spec.name}: {len(differs)} of {want.numel()} bytes of "
                    f"tensor {number} differ between the orders {self.orders[0].name} and "
                    f"{order.name}, the first at byte {differs[0].item()}"
                )

    def _with_code(self, spec: KernelSpec, message: str) -> str:
        """Adds the line of PTX that a message names."""
        number = message.partition("PTX line ")[2].partition(":")[0]
        lines = self.programs[spec.name].lines
        is_known = number.isdigit() and 0 < int(number) <= len(lines)
        return f"{message} [{lines[int(number) - 1].strip()[:160]}]" if is_known else message

    def _mine(self, spec: KernelSpec) -> KernelSpec:
        """Returns the spec with this bank's tiles, compiled and loaded."""
        known = self._replaced.get(spec.name)
        if known is not None and known[0] is spec:
            return known[1]
        if self.arch not in spec.tuning:
            raise KernelError(f"{spec.name} is not tuned for {self.arch.name}")
        tuning = spec.tuning[self.arch]
        chosen = {n: min(self.blocks.get(n, size), size) for n, size in tuning.blocks.items()}
        mine = spec
        if chosen != dict(tuning.blocks):
            # what the main loop must be made of is said of the tiles of the product alone
            smaller = {self.arch: replace(tuning, blocks=chosen)}
            mine = replace(spec, tuning=smaller, loop=None)
        if mine.name not in self._loaded:
            self.load(compile_kernels([(mine, self.arch)], self.state)[0])
        self._replaced[spec.name] = spec, mine
        return mine


@cache
def _decoded(name: str, path: Path) -> Program:
    return decode(name, path.read_text("utf-8"))


def _bits(tensor: Tensor) -> Tensor:
    """Returns the bytes of a tensor, in its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)
