"""Ends the worker within seconds of being told to, whatever it does, and leaves nothing of it.

`docker stop` allows ten seconds. Left to themselves, the platform's library and its web server wait
for the job at hand and for their own long requests. So the signals are blocked in every thread,
where no handler of theirs is called, and one thread waits for them while all others are busy.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, Protocol

log = logging.getLogger(__name__)

GRACE_S = 5.0  # for the job at hand to end by itself, out of eight for everything
_CHILDREN_S = 1.0


class Ended(Protocol):
    """What is to end with the process. Both methods are called from a thread of their own."""

    def call_off(self, patience_s: float, /) -> None:
        """Ends what is being done, or leaves it alone after so many seconds."""
        ...

    def leave(self) -> None:
        """Removes what would be left."""
        ...


def end_on_signals(ended: Sequence[Ended]) -> None:
    """Has SIGTERM, SIGINT and SIGHUP end this process from now on; told twice, it ends at once.

    `ended` is looked at when a signal comes, and may be filled until then. To be called before any
    other thread is started: threads block the signals that whoever starts them blocks.
    """
    heard = {signal.SIGTERM}
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell or nohup wants it
            heard.add(number)
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)

    def wait() -> None:
        number = signal.sigwait(heard)
        log.info("%s: the worker ends", signal.Signals(number).name)
        threading.Thread(target=leave, args=(number, GRACE_S), name="end", daemon=True).start()
        leave(signal.sigwait(heard), 0.0)

    def leave(number: int, patience_s: float) -> NoReturn:
        try:
            for one in ended:
                one.call_off(patience_s)
            end_children()
            for one in ended:
                one.leave()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
        finally:
            os._exit(128 + number)  # threads that are busy are not waited for

    threading.Thread(target=wait, name="signals", daemon=True).start()


def end_children() -> None:
    """Ends the processes that this one started, and theirs: they block signals as it does."""
    import psutil  # comes with the platform's library

    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(children, timeout=_CHILDREN_S)
