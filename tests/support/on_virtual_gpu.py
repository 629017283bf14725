"""A plugin of pytest: tests that run kernels in the interpreter run what was compiled of them.

python -m pytest -p tests.support.on_virtual_gpu tests/kernels/test_gemm.py
"""

from tests.support import interpreter
from tests.support.compiled import STATE
from virtual_gpu.bank import VirtualBank
from virtual_gpu.orders import FORWARD


class BankOfTests(VirtualBank):
    """Takes the arguments of `InterpretedBank`."""

    def __init__(self, arch, **blocks):
        super().__init__(arch, STATE, [FORWARD], **blocks)


interpreter.InterpretedBank = BankOfTests
