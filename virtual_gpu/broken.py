"""Kernels that are wrong in one place, on purpose: does the virtual GPU see it?

Every barrier, wait, commit, fence, swizzle, field of a descriptor, index of a fragment and lane of
an exchange in a kernel's PTX is a place, and each place can be broken in one or two ways. A break
that is not seen must change nothing, and `Kind.harmless` says when that can be.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Instead = Callable[[re.Match[str]], str]


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    pattern: re.Pattern[str]
    instead: Instead
    harmless: str  # when such a break changes nothing


@dataclass(frozen=True, slots=True)
class Break:
    kind: Kind
    line: int
    begin: int  # in the text
    end: int
    instead: str

    def applied(self, text: str) -> str:
        return text[: self.begin] + self.instead + text[self.end :]


def _swapped(first: int, second: int) -> Instead:
    """Exchanges two groups of a match, the first of which comes before the second."""

    def instead(match: re.Match[str]) -> str:
        whole, start = match[0], match.start()
        a, b = match.span(first), match.span(second)
        return (
            whole[: a[0] - start] + match[second] + whole[a[1] - start : b[0] - start]
            + match[first] + whole[b[1] - start :]
        )  # fmt: skip

    return instead


def _changed(group: int, change: Callable[[str], str]) -> Instead:
    def instead(match: re.Match[str]) -> str:
        begin, end = (place - match.start() for place in match.span(group))
        return match[0][:begin] + change(match[group]) + match[0][end:]

    return instead


def _added(amount: int) -> Callable[[str], str]:
    """Adds to a number of 64 bits, modulo 2^64, keeping its sign's form."""

    def change(number: str) -> str:
        bits = (int(number) + amount) % 2**64
        return str(bits - 2**64 if bits >= 2**63 else bits)

    return change


def _gone(match: re.Match[str]) -> str:
    return ""


def _kind(name: str, pattern: str, instead: Instead, harmless: str) -> Kind:
    return Kind(name, re.compile(pattern, re.M), instead, harmless)


_R = r"(%r\d+)"
_DESCRIPTOR = r"(?:or\.b64|add\.s64)[ \t]+%rd\d+, %rd\d+, (-?\d{15,});"
_FEWER = "no group is under way there, or what it copies or computes is waited for again before use"
KINDS = (
    _kind(
        "no barrier", r"^\tbar\.sync[ \t]+0;\n", _gone,
        "no two warps touch a byte between the barriers around it, one of them writing",
    ),
    _kind("no wait for copies", r"^\tcp\.async\.wait_group[ \t]+\d+;\n", _gone, _FEWER),
    _kind(
        "waits for one group of copies fewer", r"cp\.async\.wait_group[ \t]+(\d+);",
        _changed(1, lambda n: str(int(n) + 1)), _FEWER,
    ),
    _kind("no wait for wgmma", r"^\twgmma\.wait_group\.sync\.aligned \d+;\n", _gone, _FEWER),
    _kind(
        "waits for one wgmma fewer", r"wgmma\.wait_group\.sync\.aligned (\d+);",
        _changed(1, lambda n: str(int(n) + 1)), _FEWER,
    ),
    _kind(
        "no fence of registers", r"^\twgmma\.fence\.sync\.aligned;\n", _gone,
        "no register of the product was touched since the fence before",
    ),
    _kind(
        "no fence between proxies", r"^\tfence\.proxy\.async\.shared::cta;\n", _gone,
        "nothing was written since another fence, or the product waits for a later copy too",
    ),
    _kind(
        "another swizzle", r"xor\.b32[ \t]+%r\d+, %r\d+, (16|32|48|64|80|96|112);",
        _changed(1, lambda n: str(int(n) ^ 16)),
        "rows and columns of a tile are exchanged on both sides alike",
    ),
    _kind(
        "descriptor: the tile begins 32 bytes later", _DESCRIPTOR, _changed(1, _added(2)),
        "the sum of a product is over the same bytes in both operands",
    ),
    _kind(
        "descriptor: another stride", _DESCRIPTOR, _changed(1, _added(1 << 32)),
        "a tile of 8 rows has no stride",
    ),
    _kind(
        "descriptor: another swizzle", _DESCRIPTOR, _changed(1, _added(1 << 62)),
        "rows of 16 bytes are not swizzled",
    ),
    _kind(
        "fragments of A exchanged", rf"mma\.sync\S+ \{{[^}}]*\}}, \{{ *{_R}, *{_R}", _swapped(1, 2),
        "both rows are the same: past the end the last row is repeated",
    ),
    _kind(
        "fragments of B exchanged", rf"mma\.sync\S+ \{{[^}}]*\}}, \{{[^}}]*\}}, \{{ *{_R}, *{_R}",
        _swapped(1, 2), "the fragments of A are exchanged too",
    ),
    _kind(
        "fragments of A of wgmma exchanged", rf"wgmma\S+ \{{[^}}]*\}}, *\{{ *{_R}, *{_R}",
        _swapped(1, 2), "both rows are the same",
    ),
    _kind(
        "sums exchanged", rf"mma\.sync\S+ \{{ *{_R}, *{_R}", _swapped(1, 2), "both are the same"
    ),
    _kind(
        "matrices of ldmatrix exchanged", rf"ldmatrix\S+[ \t]+\{{{_R}, {_R}", _swapped(1, 2),
        "both matrices are the same",
    ),
    _kind(
        "matrices of stmatrix exchanged", rf"stmatrix\S+[ \t]+\[[^]]*\], \{{{_R}, {_R}",
        _swapped(1, 2), "both matrices are the same",
    ),
    _kind(
        "another lane", r"shfl\.sync\.bfly\.b32[ \t]+%r\d+, %r\d+, (\d+)",
        _changed(1, lambda n: str(int(n) * 2 % 31)),
        "the values of both lanes are the same: they were reduced over these lanes before",
    ),
    _kind(
        "other bytes", r"prmt\.b32[ \t]+%r\d+, %r\d+, %r\d+, 0x\w\w(\w)(\w)U", _swapped(1, 2),
        "both bytes are the same, or lie past the end and are not stored",
    ),
    _kind(
        "a copy of 8 bytes less",
        r"cp\.async\.c[ag]\S+ \[ *%r\d+ \+ 0 *\], \[ *%rd\d+ \+ 0 *\], 0x10, (%r\d+)",
        _changed(1, lambda _: "8"), "what is copied lies past the end and is zero",
    ),
    _kind(
        "wgmma forgets the sum before, or keeps it",
        r"wgmma\.mma_async\S+ \{[^}]*\}, *(?:\{[^}]*\}|%rd\d+), *%rd\d+, *(%p\d+|[01])\b",
        _changed(1, lambda p: "1" if p == "0" else "0"), "the sum before is zero",
    ),
)  # fmt: skip


def breaks(text: str) -> Iterator[Break]:
    """Yields every way to break a kernel's PTX in one place."""
    for kind in KINDS:
        for found in kind.pattern.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            instead = kind.instead(found)
            if instead != found[0]:
                yield Break(kind, line, found.start(), found.end(), instead)
