"""Is a kernel that was broken on purpose found out?"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.aot.compile import compile_kernels, ptx_path
from kernels.aot.cubin import Cubin
from kernels.arch import Arch
from kernels.spec import KernelSpec
from virtual_gpu.bank import VirtualBank, WrongKernel
from virtual_gpu.broken import KINDS, Break, breaks
from virtual_gpu.cases import ODD, QUICK, op_of, table
from virtual_gpu.decode import decode
from virtual_gpu.orders import FORWARD, ORDERS

# Where the number of a broken kernel is written in its code: bytes that an ELF file leaves free.
_FREE = slice(9, 15)
# Lanes and bytes that are exchanged: most of such places are in the rows' kernels, which have more
# lanes than a row has values.
_MAKES_A_WORD = re.compile(r"\t(?:shfl\.sync\.bfly|prmt)\.b32[ \t]+(?P<word>%r\d+),.*")


@dataclass(frozen=True, slots=True)
class Broken:
    spec: KernelSpec
    arch: Arch
    cubin: Cubin
    text: str  # PTX before it is broken
    place: Break

    def __str__(self) -> str:
        name = f"{self.arch.name}.{self.spec.name}"
        return f"{name}, PTX line {self.place.line}: {self.place.kind.name}"


def every_break(archs: Sequence[Arch], state: Path) -> list[Broken]:
    """Returns every kernel of the table, broken in every place in every way."""
    wanted = [(spec, arch) for arch in archs for spec in table(arch)]
    found = []
    for (spec, arch), cubin in zip(wanted, compile_kernels(wanted, state)):
        text = ptx_path(cubin.sha256, state).read_text("utf-8")
        found += [Broken(spec, arch, cubin, text, place) for place in breaks(text)]
    return found


def sample(found: Sequence[Broken], count: int, seed: int) -> list[Broken]:
    """Draws `count` of them: some of each kind, however rare it is, and the rest of all."""
    draw = random.Random(seed)
    each = max(1, count // 40)
    chosen: list[Broken] = []
    for kind in KINDS:
        ones = [one for one in found if one.place.kind is kind]
        chosen += draw.sample(ones, min(each, len(ones)))
    known = {id(one) for one in chosen}
    others = [one for one in found if id(one) not in known]
    return [*chosen, *draw.sample(others, count - len(chosen))][:count]


def found_out(broken: Broken, state: Path, number: int) -> str | None:
    """Returns what is wrong with a broken kernel, None if nothing is. `number` is another one for
    each kernel of this process, and even: `is_unread` takes the odd ones.
    """
    return _fault(broken, broken.place.applied(broken.text), state, 2 * number)


def is_unread(broken: Broken, state: Path, number: int) -> bool:
    """Tells whether the value that a broken instruction makes decides about nothing: it was NaN,
    and 255 as a byte, and no result was another. So it is past the end of rows, whose last lanes
    hold zeros that are exchanged and not stored. Breaking it is no test of anything.
    """
    first = broken.text.rfind("\n", 0, broken.place.begin) + 1
    last = broken.text.find("\n", broken.place.end)
    made = _MAKES_A_WORD.fullmatch(broken.text[first:last])
    if made is None:
        return False
    poisoned = f"\tmov.b32 \t{made['word']}, -1;"
    return (
        _fault(broken, broken.text[:first] + poisoned + broken.text[last:], state, 2 * number + 1)
        is None
    )


def _fault(broken: Broken, text: str, state: Path, number: int) -> str | None:
    program = decode(f"{broken.arch.name}.{broken.spec.name} broken", text)
    image = bytearray(broken.cubin.data)
    image[_FREE] = number.to_bytes(6, "little")
    cubin = replace(broken.cubin, data=bytes(image))
    op = op_of(broken.spec, broken.arch)
    for orders, tokens in (((FORWARD,), QUICK), (ORDERS, ODD)):
        bank = VirtualBank(broken.arch, state, orders)
        bank.load_program(cubin, program)
        try:
            for check in op.run(bank, broken.arch, tokens, lambda spec: spec is broken.spec):
                if not check.holds:
                    return str(check)
        except WrongKernel as error:
            return str(error)
    return None
