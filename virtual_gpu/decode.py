"""PTX text of one kernel -> the program that the machine runs.

Whatever is not known, an instruction, a form of one or a directive, raises `UnknownPtx` with its
line.
"""

import re
from collections.abc import Iterator

from virtual_gpu.opcodes import (
    BARE,
    MMA,
    PARAMETERS_32,
    PARAMETERS_64,
    ROWS,
    SPECIAL,
    WGMMA,
    comparison,
    plain,
)
from virtual_gpu.program import SHARED_BASE, WORDS, Instruction, Program, UnknownPtx

_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)\s*((?:\.\w+[^{]*)?)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+\.\w(\d+)\b.*?(\w+)", re.S)
_REGISTERS = re.compile(r"\.reg \.(\w+) (%\w+)<(\d+)>")
_LABEL = re.compile(r"\s*\$?\w+:")
_NUMBER = re.compile(r"(-?)(0x[0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})")
_ADDRESS = re.compile(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+))?\s*\]")
_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
_WGMMA_SHAPE = re.compile(r"m64n(\d+)k(\d+)")
# Kinds of operands, and the types of registers that may be them.
_KINDS = {"w": ("b32", "b16"), "l": ("b64",), "p": ("pred",)}
_GUARDED = ("BRA", "LDG", "STG", "LDS", "STS", "CPASYNC")  # the machine skips lanes in these alone

Decoded = tuple[str, list[int]]  # an operation and its operands


def decode(name: str, text: str) -> Program:
    """Reads the only kernel of `text`; `name` is that in errors."""
    return _Decoder(name, text).program


def split(text: str) -> list[str]:
    """Returns operands: the parts between commas that are in no braces or brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


def statements(body: str, line: int) -> Iterator[tuple[int, str]]:
    """Yields line number and text of each statement, label and scope ("{" or "}")."""
    pending, first = "", line
    for character in re.sub(r"//[^\n]*", "", body):
        line += character == "\n"
        if not pending.strip():
            pending, first = "", line
            if character in "{}":
                yield line, character
                continue
        if character == ";":
            yield first, " ".join(pending.split())
            pending = ""
            continue
        pending += character
        if character == ":" and _LABEL.fullmatch(pending):
            yield first, pending.strip()
            pending = ""
    if pending.strip():
        yield first, " ".join(pending.split())


class _Decoder:
    def __init__(self, name: str, text: str) -> None:
        entries = list(_ENTRY.finditer(text))
        threads = re.search(r"\.reqntid\s+(\d+)", entries[0][2]) if len(entries) == 1 else None
        if threads is None:
            raise UnknownPtx(f"{name}: not one kernel with .reqntid, but {len(entries)} kernels")
        self.program = Program(name, int(threads[1]), text.splitlines())
        self._parameters = self._read_parameters(entries[0][1])
        self._shared = set(re.findall(r"\.extern \.shared .*? (\w+)\[\]", text))
        self._scopes: list[dict[str, tuple[str, int]]] = []  # registers: type and place
        self._constants: dict[tuple[str, int], int] = {}
        self._labels: dict[str, int] = {}
        self._widened: list[tuple[int, int]] = []  # of the instruction at hand: to, from
        begin = entries[0].end() - 1  # the brace
        for line, statement in statements(text[begin:], text.count("\n", 0, begin) + 1):
            try:
                self._read(line, statement)
            except (UnknownPtx, ValueError, LookupError, TypeError) as error:
                raise UnknownPtx(f"{name}, PTX line {line}: {statement[:160]}: {error}") from error
        self._link()

    def _read_parameters(self, text: str) -> dict[str, int]:
        """Returns the offset of each parameter by name."""
        offsets, offset = {}, 0
        for part in text.split(","):
            found = _PARAMETER.fullmatch(part.strip())
            if found is None:
                raise UnknownPtx(f"{self.program.name}: parameter {part.strip()}")
            size = int(found[1]) // 8
            offset = -(-offset // size) * size
            offsets[found[2]] = offset
            self.program.parameters.append((offset, size))
            offset += size
        return offsets

    def _link(self) -> None:
        """Turns the numbers of labels into places in the code."""
        names = list(self._labels)
        for at, made in enumerate(self.program.code):
            if made.operation == "BRA":
                target = self._labels[names[made.operands[0]]]
                if target < 0:
                    raise UnknownPtx(f"{self.program.name}: no label {names[made.operands[0]]}")
                self.program.code[at] = Instruction("BRA", made.guard, (target,), made.line)

    # statements

    def _read(self, line: int, text: str) -> None:
        if text == "{":
            self._scopes.append({})
        elif text == "}":
            self._scopes.pop()
        elif text.endswith(":"):
            self._labels[text[:-1]] = len(self.program.code)
        elif text.startswith("."):
            self._directive(text)
        elif text:
            self._instruction(line, text)

    def _directive(self, text: str) -> None:
        if text.startswith((".pragma ", ".loc ", ".file ")):
            return
        found = _REGISTERS.fullmatch(text)
        if found is None:
            raise UnknownPtx("an unknown directive")
        kind, prefix, count = found.groups()
        for number in range(int(count)):
            place = self.program.reserve(WORDS[kind])
            self._scopes[-1][f"{prefix}{number}"] = kind, place

    def _instruction(self, line: int, text: str) -> None:
        guard = 0
        if text.startswith("@"):
            condition, text = text.split(None, 1)
            place = self._place("p", condition.lstrip("@!"))
            guard = -place - 1 if condition[1] == "!" else place + 1
        opcode, _, rest = text.partition(" ")
        opcode = plain(opcode)
        operation, operands = self._decode(opcode, split(rest))
        if guard and (operation not in _GUARDED or self._widened):
            raise UnknownPtx(f"a guarded {opcode}")
        self.program.opcodes.add(opcode)
        self.program.code.append(Instruction(operation, guard, tuple(operands), line))
        for places in self._widened:
            self.program.code.append(Instruction("CVT_U64_U32", 0, places, line))
        self._widened.clear()

    def _decode(self, opcode: str, given: list[str]) -> Decoded:
        if opcode in BARE and not given:
            return BARE[opcode], []
        if opcode == "mov.u32" and given[1] in SPECIAL:
            return "SREG", [self._place("w", given[0]), SPECIAL[given[1]]]
        if opcode in ("mov.b32", "mov.b64") and any("{" in part for part in given):
            return self._pack(opcode, *given)
        if opcode in ROWS:
            operation, kinds = ROWS[opcode]
            return operation, self._places(kinds, given)
        if opcode == "bar.sync" and given == ["0"]:
            return "BAR", []
        if opcode in ("bra", "bra.uni"):
            self._labels.setdefault(given[0], -1)
            return "BRA", [list(self._labels).index(given[0])]
        first, second = (*opcode.split("."), "")[:2]
        forms = {
            "setp": self._setp, "mma": self._mma, "wgmma": self._wgmma, "ldmatrix": self._matrix,
            "stmatrix": self._matrix, "cp": self._copy,
        }  # fmt: skip
        if first in forms:
            return forms[first](opcode, given)
        if (first, second) == ("ld", "param"):
            return self._parameter(opcode, given)
        if first in ("ld", "st") and second in ("global", "shared"):
            return self._access(opcode, given)
        raise UnknownPtx("an unknown instruction")

    # operands

    def _places(self, kinds: str, given: list[str]) -> list[int]:
        return [self._place(kind, text) for kind, text in zip(kinds, given, strict=True)]

    def _register(self, name: str) -> tuple[str, int]:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise UnknownPtx(f"no register {name}")

    def _place(self, kind: str, text: str) -> int:
        """Returns the place of a register or a constant of this kind."""
        if text.startswith("%"):
            type_, place = self._register(text)
            if type_ not in _KINDS[kind]:
                raise UnknownPtx(f"{text} has {type_}, not one of {_KINDS[kind]}")
            return place
        if text in self._shared:
            return self._constant(kind, SHARED_BASE)
        if real := _FLOAT.fullmatch(text):
            return self._constant(kind, int(real[1], 16))
        number = _NUMBER.fullmatch(text)
        if number is None:
            raise UnknownPtx(f"operand {text}")
        value = int(number[2], 0) * (-1 if number[1] else 1)
        return self._constant(kind, -1 if kind == "p" and value else value)

    def _constant(self, kind: str, bits: int) -> int:
        key = ("l" if kind == "l" else "w"), bits
        if key not in self._constants:
            is_wide = kind == "l"
            place = self._constants[key] = self.program.reserve(WORDS["b64" if is_wide else "b32"])
            held = self.program.constants64 if is_wide else self.program.constants32
            held[place] = bits & (2 ** (64 if is_wide else 32) - 1)
        return self._constants[key]

    def _address(self, kind: str, text: str) -> list[int]:
        """Returns the place of the register, and the offset."""
        inside = _ADDRESS.fullmatch(text)
        if inside is None:
            raise UnknownPtx(f"address {text}")
        return [self._place(kind, inside[1]), int(inside[2] or "0", 0)]

    def _vector(self, kind: str, text: str, count: int) -> list[int]:
        parts = split(text.strip("{} "))
        if len(parts) != count:
            raise UnknownPtx(f"{len(parts)} registers, not {count}")
        return [self._place(kind, part) for part in parts]

    # forms

    def _pack(self, opcode: str, to: str, source: str) -> Decoded:
        whole, size = ("l", "32") if opcode.endswith("64") else ("w", "16")
        if "{" in source:
            return f"PACK{size}", [self._place(whole, to), *self._vector("w", source, 2)]
        low, high = split(to.strip("{} "))
        places = [-1 if part == "_" else self._place("w", part) for part in (low, high)]
        return f"UNPACK{size}", [*places, self._place(whole, source)]

    def _setp(self, opcode: str, given: list[str]) -> Decoded:
        operation = comparison(opcode)
        if operation is None:
            raise UnknownPtx("an unknown comparison")
        kind = "l" if opcode.endswith("64") else "w"
        return operation, self._places(f"p{kind}{kind}", given)

    def _parameter(self, opcode: str, given: list[str]) -> Decoded:
        register, address = given
        offset = self._parameters[address.strip("[]")]
        is_wide = self._register(register)[0] == "b64"
        operation = (PARAMETERS_64 if is_wide else PARAMETERS_32)[opcode]
        return operation, [self._place("l" if is_wide else "w", register), offset]

    def _access(self, opcode: str, given: list[str]) -> Decoded:
        which, space, *rest = opcode.split(".")
        count = int(rest.pop(0)[1]) if rest[0] in ("v2", "v4") else 1
        if len(rest) != 1 or rest[0] not in ("b8", "b16", "b32", "b64"):
            raise UnknownPtx("an unknown access")
        size = int(rest[0][1:]) // 8
        where, values = given if which == "st" else given[::-1]
        address = self._address("l" if space == "global" else "w", where)
        if (which, size) == ("ld", 4):
            registers = [self._narrow(part) for part in split(values.strip("{} "))]
        else:
            registers = self._vector("l" if size == 8 else "w", values, count)
        if len(registers) != count:
            raise UnknownPtx(f"{len(registers)} registers, not {count}")
        return f"{which}{space[0]}".upper(), [size, count, *address, *registers]

    def _narrow(self, text: str) -> int:
        """Returns the place that 32 bits are loaded to. A register of 64, which PTX allows, gets
        them afterwards, with zeros above them.
        """
        type_, place = self._register(text)
        if type_ != "b64":
            return self._place("w", text)
        loaded = self.program.reserve(WORDS["b32"])
        self._widened.append((place, loaded))
        return loaded

    def _copy(self, opcode: str, given: list[str]) -> Decoded:
        if opcode == "cp.async.wait_group":
            return "CPWAIT", [int(given[0])]
        if opcode not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
            raise UnknownPtx("an unknown copy")
        to, source, size, *rest = given
        bytes_ = self._place("w", rest[0]) if rest else -1
        if len(rest) > 1:
            raise UnknownPtx("a copy with a cache policy")
        addresses = [*self._address("w", to), *self._address("l", source)]
        return "CPASYNC", [*addresses, int(size, 0), bytes_]

    def _matrix(self, opcode: str, given: list[str]) -> Decoded:
        form = _MATRIX.fullmatch(opcode)
        if form is None:
            raise UnknownPtx("an unknown matrix")
        where, values = given if form[1] == "st" else given[::-1]
        registers = self._vector("w", values, int(form[2]))
        address = self._address("w", where)
        return f"{form[1]}matrix".upper(), [
            len(registers),
            int(bool(form[3])),
            *address,
            *registers,
        ]

    def _mma(self, opcode: str, given: list[str]) -> Decoded:
        form = MMA[opcode.removeprefix("mma.sync.aligned.")]
        sums = 2 if form[1] == 2 else 4
        counts = (sums, 4, 2, sums)
        fragments = [self._vector("w", part, count) for part, count in zip(given, counts)]
        scales: list[int] = []
        for value, chosen in zip(given[4::2], given[5::2], strict=True):
            byte, thread = (int(part) for part in split(chosen.strip("{} ")))
            if byte > 3 or thread > (3 if scales else 1):
                raise UnknownPtx(f"scales by {chosen}")
            scales += [*self._vector("w", value, 1), byte, thread]
        if len(scales) != 6 * form[3]:
            raise UnknownPtx("a product with scales, or without")
        return "MMA", [*form, *(place for part in fragments for place in part), *scales]

    def _wgmma(self, opcode: str, given: list[str]) -> Decoded:
        if opcode == "wgmma.wait_group.sync.aligned":
            return "WGWAIT", [int(given[0])]
        shape_and_types = opcode.removeprefix("wgmma.mma_async.sync.aligned.")
        shape, _, types = shape_and_types.partition(".")
        size, (kind, sums, depth) = _WGMMA_SHAPE.fullmatch(shape), WGMMA[types]
        if size is None or int(size[2]) != depth:
            raise UnknownPtx("an unknown product")
        n = int(size[1])
        d, a, b, scale_d, *rest = given
        in_registers = a.startswith("{")
        signs = 0 if kind == 0 else 2  # factors of A and B, of which 1 is known
        if rest[:signs] != ["1"] * signs:
            raise UnknownPtx("factors of operands")
        turned = [int(part) for part in rest[signs:]]  # which operands lie by rows
        if len(turned) != (0 if kind != 2 else 1 if in_registers else 2):
            raise UnknownPtx("operands that lie otherwise")
        by_rows = [0, 0, *turned][-2:]
        left = self._vector("w", a, 4) if in_registers else [self._place("l", a)]
        operands = [*left, self._place("l", b), *self._vector("w", d, n // 2)]
        numbers = [kind, sums, n, int(in_registers), *by_rows, self._place("p", scale_d)]
        return "WGMMA", [*numbers, *operands]
