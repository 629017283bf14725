"""Checks what a machine must have before it takes jobs, beside what loading has found to be there.

A check that fails raises an `EngineError`; the platform then replaces the machine. GPU, driver and
package are loading's to judge: what another machine would mend is fatal, and all else, a missing
package say, is told to each job by a worker that serves (docs/reference/runpod.md B.2).
"""

from collections.abc import Callable

from engine.errors import OutputError
from engine.worker.scratch import Scratch

FREE_BYTES = 2 * 2**30  # room for the media of a job, its clip, and that clip encoded again


def fitness_checks(scratch: Scratch) -> list[Callable[[], None]]:
    """Lists the checks in their order; the platform reports them by their names."""

    def disk() -> None:
        free = scratch.free_bytes
        if free < FREE_BYTES:
            raise OutputError(
                f"{free / 1e9:.1f} GB of disk are free for jobs; {FREE_BYTES / 1e9:.1f} GB are "
                "needed."
            )

    return [disk]
