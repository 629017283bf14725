"""Small kernels written in PTX, run on the virtual GPU."""

from itertools import count

from kernels.aot.cubin import Cubin, spec_digest
from kernels.arch import SM90
from kernels.spec import KernelSpec, Tuning
from tests.support.compiled import STATE
from virtual_gpu.bank import VirtualBank
from virtual_gpu.decode import decode
from virtual_gpu.orders import ORDERS

_NUMBERS = count()
HEAD = """
.version 8.5
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
\t.reg .pred \t%p<9>;
\t.reg .b16 \t%rs<9>;
\t.reg .b32 \t%r<99>;
\t.reg .b64 \t%rd<99>;
\tld.param.b64 \t%rd0, [kernel_param_0];
\tmov.u32 \t%r0, %tid.x;
\tmul.wide.u32 \t%rd1, %r0, 4;
\tadd.s64 \t%rd1, %rd0, %rd1;
{body}
\tret;
}}
"""


def ptx(body, threads=64):
    """Returns a kernel whose %rd0 is its tensor, %r0 the thread and %rd1 the thread's word."""
    return HEAD.format(body=body, threads=threads)


def run(body, tensor, threads=64, grid=(1,), shared_bytes=1024, orders=ORDERS):
    """Runs it on a tensor of the CPU, which it changes, and returns the bank."""
    number = next(_NUMBERS)
    spec = KernelSpec(
        f"small.{number}", "none:kernel", "*i32", {}, {SM90: Tuning(threads // 32, 1, {}, "12.6")}
    )
    cubin = Cubin(
        name=spec.name, arch="sm90", spec=spec_digest(spec, SM90), sha256="", entry="kernel",
        warps=threads // 32, shared_bytes=shared_bytes, scratch_bytes=0, registers=0, text_bytes=0,
        toolkit="12.6", loop=None, data=b"\x7fELF" + number.to_bytes(8, "little") + bytes(64),
    )  # fmt: skip
    bank = VirtualBank(SM90, STATE, orders)
    bank.load_program(cubin, decode(spec.name, ptx(body, threads)))
    bank.launch(spec, grid, tensor)
    return bank
