"""A model that is on its device always, or only while it is used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def nothing() -> None:
    """Does nothing, for a model that never moves."""


class Resident:
    """Knows if a model is on its device. The functions `arrive` and `leave` move it."""

    def __init__(
        self, arrive: Callable[[], object] = nothing, leave: Callable[[], object] = nothing
    ) -> None:
        """The model is on its device to begin with. Without functions it stays there."""
        self._arrive, self._leave = arrive, leave
        self._stays, self._is_here = True, True

    def settle(self, *, stays: bool) -> None:
        """Decides if the model stays on its device between uses, and moves it there or away."""
        self._stays = stays
        if stays:
            self._come()
        else:
            self._go()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Keeps the model on its device while it is used."""
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
                self._leave()  # the part that arrived would stay for nothing
                raise
            self._is_here = True

    def _go(self) -> None:
        if self._is_here:
            self._is_here = False
            self._leave()
