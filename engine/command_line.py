"""The frame of every command line: an error is one sentence, a signal runs the `finally` blocks."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

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
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).partition(".")[0] or type(error).__name__
        sys.exit(_refusal(f"Out of memory: {reason}. {out_of_memory}"))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has enough
    except OSError as error:  # what no stage foresaw: a vanished folder, a full terminal
        sys.exit(_refusal(f"{error.filename or 'The system'}: {error.strerror or error}."))


def end_on_signals() -> None:
    """Lets SIGTERM and SIGHUP end the process through its `finally` blocks: nothing half-written
    stays.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _refusal(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return REFUSED
