"""What was proven, as a document: docs/proof.md. It names no times, so that it changes when the
kernels or what is known of them do.
"""

from collections.abc import Sequence

from virtual_gpu.proof import Breaks, Proven, Row

_HEAD = """# What is proven of the compiled kernels

`make proof` wrote this: it compiles every kernel of the 14B model for every architecture, proves
its machine code, and runs its PTX on the virtual GPU (`virtual_gpu/README.md`), launched as the
product launches it: at odd sizes, in three orders of warps and blocks that must agree bit for bit,
and at the last blocks of launches of 48,832 tokens. Then it breaks kernels in one place each.

Not shown here: what ptxas makes of the PTX, the last bits of approximate functions (`ex2.approx`,
`rsqrt.approx`, `div.full`), sums inside a tensor core that keep fewer bits than FP32, and speed.

"Worst error" is that which comes nearest to its limit; codes are wrong if they are the nearest to
no value that sums in another order can give.
"""


def report(proven: Sequence[Proven], breaks: Breaks) -> str:
    parts = [_HEAD, *(_architecture(one) for one in proven), _broken(breaks)]
    return "\n".join(parts)


def _architecture(one: Proven) -> str:
    launches = sum(row.launches for row in one.rows.values())
    checks = sum(row.checks for row in one.rows.values())
    lines = [
        f"## {one.arch}",
        "",
        f"{len(one.rows)} kernels, {launches} launches, {checks} comparisons, "
        f"{len(one.failures)} failures.",
        "",
        "| kernel | registers | shared memory, KiB | instructions of the loop | launches "
        "| worst error | its limit | wrong codes |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, row) for name, row in sorted(one.rows.items())),
        "",
    ]
    lines += [f"- FAILED: {failure}" for failure in one.failures]
    lines += [f"- note: {note}" for note in one.notes]
    return "\n".join([*lines, ""] if one.failures or one.notes else lines)


def _row(name: str, row: Row) -> str:
    cubin, worst = row.cubin, row.worst
    cells = [
        name, cubin.registers, f"{cubin.shared_bytes / 1024:.0f}",
        cubin.loop.instructions if cubin.loop else "", row.launches,
        f"{worst.found:.1e}" if worst else "", f"{worst.limit:.0e}" if worst else "",
        "" if row.wrong_codes is None else row.wrong_codes,
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _broken(breaks: Breaks) -> str:
    found, count = breaks.count()
    kinds = [f"| {kind} | {seen} of {of} |" for kind, (seen, of) in sorted(breaks.by_kind.items())]
    lines = [
        "## Broken kernels",
        "",
        f"{breaks.places:,} places can be broken; {count + breaks.unread} were, some of each kind "
        f"and the rest drawn from all. In {breaks.unread} nobody reads what is made: NaN in its "
        f"place changes nothing either. Of the other {count}, {found} were found out.",
        "",
        "| what was broken | found out |",
        "|---|---|",
        *kinds,
        "",
        *(f"- not found out: {survivor}." for survivor in breaks.survivors),
    ]
    return "\n".join(lines).rstrip() + "\n"
