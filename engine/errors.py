"""Every exception raised on purpose: what was found, what was expected, what to do.

User input and the world raise an `EngineError`. Its `code` is stable and machine-readable: clients
may switch on it. `fatal` says that this process can no longer be trusted and must be replaced.
"""


class EngineError(Exception):
    code = "internal"
    fatal = False


class BadRequest(EngineError):
    """An option or a field that no clip can be made from."""

    code = "bad_request"


class BadMedia(EngineError):
    """A picture, video or joint file that is not what it should be."""

    code = "bad_media"


class BadCheckpoint(EngineError):
    """Model weights that are damaged, incomplete or of another model."""

    code = "bad_checkpoint"


class BadPackage(EngineError):
    """An engine package that is damaged, incomplete, or made for another engine or GPU."""

    code = "bad_package"


class BuildFailed(EngineError):
    """An engine package could not be built."""

    code = "build_failed"


class TooLarge(EngineError):
    """A clip that does not fit into the GPU's memory."""

    code = "too_large"


class UnsupportedGpu(EngineError):
    """A GPU that no package at hand was built for."""

    code, fatal = "unsupported_gpu", True


class UnsupportedDriver(EngineError):
    """A driver or library below what a package needs, or known to compute wrongly."""

    code, fatal = "unsupported_driver", True


class MissingModel(EngineError):
    """A model file is needed and is not there."""

    code = "missing_model"


class NotFinite(EngineError):
    """A result with infinite numbers or NaN: weights overflow in this precision or are damaged."""

    code = "not_finite"


class BlankFrames(EngineError):
    """A clip with a frame that shows nothing."""

    code = "blank_frames"


class Cancelled(EngineError):
    """The job was called off while it ran."""

    code = "cancelled"


class DeadlineExceeded(EngineError):
    """The job took longer than it may."""

    code = "deadline"


class ResultTooLarge(EngineError):
    """A finished clip that no reply can carry."""

    code = "result_too_large"


class NobodyFound(EngineError):
    """A video or picture in which no person was found."""

    code = "nobody_found"


class Unavailable(EngineError):
    """Something was asked for by name that this build or machine does not have."""

    code = "unavailable"


class OutputError(EngineError):
    """The result could not be written."""

    code = "output_failed"


class Interrupted(EngineError):
    """A program that the engine ran was ended or stopped from outside."""

    code = "interrupted"
