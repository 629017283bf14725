"""The options of `python -m engine serve` and `playground`."""

import argparse
import logging

from engine.command_line import Parser, path
from engine.errors import BadRequest, Unavailable

_PORT = 8188
_PORTS = 65535


def add_serve_options(command: Parser) -> None:
    add = command.add_argument
    add("--host", default="127.0.0.1", metavar="H",
        help="where to listen; beyond this machine SCAIL_TOKEN must be set")  # fmt: skip
    add("--port", type=int, default=_PORT, metavar="P", help=f"{_PORT} if not given")
    add("--package", type=path, metavar="DIR",
        help="a package, or a folder of packages; without: the demo models")  # fmt: skip
    add("--models", type=path, metavar="DIR", help="the other models ($SCAIL_MODELS)")


def serve(args: argparse.Namespace) -> None:
    """Serves jobs over HTTP until it is told to end."""
    _serve(args, opens_page=False)


def playground(args: argparse.Namespace) -> None:
    """Serves, and opens the page."""
    _serve(args, opens_page=True)


def _serve(args: argparse.Namespace, *, opens_page: bool) -> None:
    if not 0 <= args.port <= _PORTS:
        raise BadRequest(f"--port is {args.port}; 1 to {_PORTS} is expected.")
    try:  # here, so that no other command waits for it
        from engine.server.house import read_house
        from engine.server.run import serve as run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn", "h11"):
            raise
        raise Unavailable(
            f"The service needs {error.name}, which is not installed: "
            "pip install 'scail-engine[serve]'."
        ) from error
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    run(read_house(args.host, args.port), args.package, args.models, opens_page=opens_page)
