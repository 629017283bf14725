"""How much memory the host gives this process: the machine's, or less where a container is limited.

WSL2 is a machine of its own here: it has half of the host's memory unless told otherwise, and its
driver pins no more than a part of that (docs/deploy.md, "Small GPUs").
"""

from dataclasses import dataclass
from pathlib import Path

MEMINFO, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
# by release of control groups: the limit, what is used, statistics, the cache among what is used
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
        "total_inactive_file",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory that can be had now, the page cache counted as free."""

    available_bytes: int
    owner: str  # who sets the limit: "the machine", "the container's limit"


def host_memory(meminfo: Path = MEMINFO, cgroups: Path = CGROUPS) -> HostMemory:
    """Reads what is available: the least of what machine and container allow."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
    machine = HostMemory(int(lines["MemAvailable"].split()[0]) * 1024, "the machine")
    limited = [_in_container(cgroups, *names) for names in _FILES]
    found = [HostMemory(left, "the container's limit") for left in limited if left is not None]
    return min([machine, *found], key=lambda one: one.available_bytes)


def _in_container(cgroups: Path, limit: str, used: str, stat: str, cache: str) -> int | None:
    """Counts what the container's limit leaves; None where it has none."""
    try:
        told = (cgroups / limit).read_text("ascii").strip()
        in_use = int((cgroups / used).read_text("ascii"))
        stats = dict(
            line.split(" ", 1) for line in (cgroups / stat).read_text("ascii").splitlines()
        )
    except OSError:  # another release of control groups, or none
        return None
    if told == "max":
        return None
    return max(0, int(told) - in_use + int(stats.get(cache, "0")))
