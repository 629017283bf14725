"""What a request over HTTP is refused with: a status, a word for programs, and a sentence."""

from collections.abc import Mapping

from engine.errors import EngineError

# The status of a reply that tells an error of the engine; any other is a mistake of the request.
_STATUS: Mapping[str, int] = {"output_failed": 507, "unavailable": 503, "internal": 500}
_MISTAKE = 400


class Refused(EngineError):
    """A request that is answered with an error. `status` is that of HTTP."""

    def __init__(self, status: int, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.code = status, code


def status_of(error: EngineError) -> int:
    return error.status if isinstance(error, Refused) else _STATUS.get(error.code, _MISTAKE)


def unknown(what: str) -> Refused:
    """Makes the refusal of an id or an address that is not there, or not anymore."""
    return Refused(404, "unknown", f"There is no {what} here; it may have been forgotten by now.")
