"""A model that is on its device always, or only while it is used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Resident:
    """Where a model is. Moving it is somebody else's work: `arrive` and `leave`."""

    def __init__(
        self, arrive: Callable[[], object] = bool, leave: Callable[[], object] = bool
    ) -> None:
        """It is there. Without functions it never moves."""
        self._arrive, self._leave = arrive, leave
        self._stays, self._is_here = True, True

    def settle(self, *, stays: bool) -> None:
        self._stays = stays
        if stays:
            self._come()
        else:
            self._go()

    @contextmanager
    def present(self) -> Iterator[None]:
        self._come()
        try:
            yield
        finally:
            if not self._stays:
                self._go()

    def _come(self) -> None:
        if not self._is_here:
            try:
                self._arrive()
            except BaseException:
                self._leave()  # what arrived of it would stay for nothing
                raise
            self._is_here = True

    def _go(self) -> None:
        if self._is_here:
            self._is_here = False
            self._leave()
