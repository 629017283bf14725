"""Copies to a device beside its kernels, and the events that order the two.

Copies are issued one after another by a thread of their own, as some are read from a disk first: a
program that launches kernels goes on meanwhile. On a GPU they run on a stream of their own.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

import torch

Mark: TypeAlias = Any  # a place among kernels or copies, of whoever made it


class Transfers(Protocol):
    """Two queues of a device: kernels, as they are launched, and copies."""

    def mark(self) -> Mark:
        """Marks the kernels that have been launched so far."""
        ...

    def start(self, copy: Callable[[], object], after: Mark) -> Mark:
        """Issues a copy that waits for the kernels before `after`, and marks its end."""
        ...

    def wait(self, copied: Mark) -> None:
        """Lets the kernels that are launched from now on wait for a copy. Raises what it raised."""
        ...

    def finish(self) -> None:
        """Returns when all copies that were started are done, or have failed."""
        ...


class CudaTransfers:
    """The `Transfers` of a GPU: kernels are those of PyTorch's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = ThreadPoolExecutor(1, "copies")

    def mark(self) -> torch.cuda.Event:
        launched = torch.cuda.Event()
        launched.record()
        return launched

    def start(self, copy: Callable[[], object], after: torch.cuda.Event) -> Future[Any]:
        return self._pool.submit(self._issue, copy, after)

    def wait(self, copied: Future[Any]) -> None:
        torch.cuda.current_stream().wait_event(copied.result())

    def finish(self) -> None:
        self._pool.submit(self._stream.synchronize).result()

    @torch.inference_mode()
    def _issue(self, copy: Callable[[], object], after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            copy()
            done = torch.cuda.Event()
            done.record()
        return done


class HostTransfers:
    """The `Transfers` of a CPU, where a kernel has run when it was launched. Copies are made by
    their thread while others compute.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "copies")

    def mark(self) -> None:
        pass

    def start(self, copy: Callable[[], object], after: None) -> Future[object]:
        return self._pool.submit(_inferring, copy)

    def wait(self, copied: Future[object]) -> None:
        copied.result()

    def finish(self) -> None:
        self._pool.submit(lambda: None).result()


@torch.inference_mode()
def _inferring(copy: Callable[[], object]) -> object:
    return copy()


def transfers_of(device: torch.device) -> Transfers:
    return CudaTransfers(device) if device.type == "cuda" else HostTransfers()
