"""A package whose kernels are checked, timed, chosen and launched on the virtual GPU, as a program
does it on a real one. Models beside the transformer compute on the CPU.
"""

from engine.machine.gpu import Gpu
from engine.machine.kernel_choice import choose_variants
from engine.package.folder import open_package
from engine.program import ChosenPackage, native_program
from tests.support.compiled import STATE
from virtual_gpu.bank import VirtualBank
from virtual_gpu.orders import FORWARD, UNWATCHED

GPU_BYTES = 24 * 10**9
INSTRUCTIONS_MS = 50_000  # of warps, in a millisecond of this GPU


class VirtualProgram:
    """Makes the program of a package; `bank` has its launches, `choices` what was chosen."""

    def __init__(self, arch, orders=(FORWARD,)):
        self.bank = VirtualBank(arch, STATE, orders)
        self.gpu = Gpu(
            f"virtual {arch.name}", f"GPU-{arch.name}", arch.capability, arch.driver, None,
            GPU_BYTES, None,
        )  # fmt: skip
        self.choices, self.timed, self.ms = None, 0, 0.0

    def chosen(self, folder):
        """The package, as `choose_package` finds it on a machine with this GPU."""
        return ChosenPackage(open_package(folder), self.gpu)

    def make(self, chosen, settings):
        """An `engine.program.MakeProgram`."""
        package = chosen.package
        self.choices = choose_variants(
            package.kernels, package.digest, chosen.gpu, self.bank, settings.device,
            settings.state, self.clock, lambda: self.ms / 1000,
        )  # fmt: skip
        return native_program(chosen, settings, self.bank, self.choices, None)

    def clock(self, run):
        """Runs the first block of each launch, and takes its instructions for time."""
        machine, orders = self.bank.machine, self.bank.orders
        before = machine.executed()
        machine.only([0])
        self.bank.orders = (UNWATCHED,)  # a shadow of all operands would cost more than the block
        try:
            run()
        finally:
            machine.only()
            self.bank.orders = orders
        self.timed += 1
        took = (machine.executed() - before) / INSTRUCTIONS_MS
        self.ms += took
        return took
