"""The frame of every command line: an error is one sentence, a signal runs the `finally` blocks.

A program ends in the status that it should, whatever became of its standard streams: a message that
nobody can be told changes nothing, and a result that cannot be written is an error.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from engine.errors import EngineError

REFUSED = 2  # exit status of a command that could not do what was asked


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"error: {message}. See {self.prog} --help.\n")


def path(text: str) -> Path:
    """Reads the name of a file or folder, as an option's type."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("the name of a file or folder is expected")
    return Path(text)


def run(
    command: Callable[[argparse.Namespace], None], args: argparse.Namespace, *, out_of_memory: str
) -> None:
    """Runs a command. What went wrong is one sentence on standard error and exit status 2.

    `out_of_memory`: what to do when memory runs out, as a sentence.
    """
    try:
        command(args)
    except EngineError as error:
        sys.exit(_refusal(str(error)))
    except (RuntimeError, MemoryError) as error:
        # PyTorch's is known by its name: importing it takes seconds, and the worker starts here too
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        reason = str(error).partition(".")[0] or type(error).__name__
        sys.exit(_refusal(f"Out of memory: {reason}. {out_of_memory}"))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:  # what no stage foresaw: a vanished folder, a full disk
        if _is_of_output(error):
            raise  # for `program` to tell
        sys.exit(_refusal(f"{error.filename or 'The system'}: {error.strerror or error}."))


def end_on_signals() -> None:
    """Lets SIGTERM and SIGHUP end the process through its `finally` blocks: nothing half-written
    stays.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def program(main: Callable[[], None], *, output_matters: bool = True) -> None:
    """Runs the `main` of a program, to be called once, as the last thing that it does.

    Without `output_matters` a full disk is no reason to end: a service only logs.
    """
    output = _open_streams(output_matters)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if not _is_of_output(error):
            raise
    finally:
        _flush(output)


class _Stream(io.RawIOBase):
    """A standard stream. If it `matters`, failing is told to whoever writes, and remembered."""

    def __init__(self, descriptor: int, *, matters: bool) -> None:
        self._descriptor, self._matters = descriptor, matters
        self.failed: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes, /) -> int:  # pyright: ignore
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if self._matters:
                self.failed = error
                raise
            return len(data)


def _open_streams(output_matters: bool) -> _Stream:
    """Puts streams of ours in the places of output and errors, closed ones too."""
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(nowhere, True)  # or a file of ours would get the number
    encoding, unknown = "utf-8", "strict"
    if sys.stdout is not None:  # as the locale has them
        encoding, unknown = sys.stdout.encoding, sys.stdout.errors or unknown
    if unknown == "strict":  # the name of a file may have letters that a terminal has not
        unknown = "backslashreplace"
    # of a closed one the number may belong to a library's file by now
    output = _Stream(1 if sys.stdout is not None else nowhere, matters=output_matters)
    errors = _Stream(2 if sys.stderr is not None else nowhere, matters=False)
    is_live = output.isatty() or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout = _text(output, encoding, unknown, is_live=is_live)
    sys.stderr = _text(errors, encoding, "backslashreplace", is_live=True)
    return output


def _is_of_output(error: OSError) -> bool:
    stream = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(stream, _Stream) and stream.failed is error


def _text(stream: _Stream, encoding: str, errors: str, *, is_live: bool) -> io.TextIOWrapper:
    buffered = io.BufferedWriter(stream)  # pyright: ignore[reportArgumentType]
    return io.TextIOWrapper(buffered, encoding, errors, line_buffering=is_live)


def _flush(output: _Stream) -> None:
    """Writes what is left. A result that cannot be written is an error, unless nobody reads it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        output.failed = error
    if output.failed is None:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes when it ends
    if not isinstance(output.failed, BrokenPipeError):
        reason = output.failed.strerror
        sys.exit(_refusal(f"Standard output cannot be written: {reason}. Send it elsewhere."))


def _refusal(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return REFUSED
