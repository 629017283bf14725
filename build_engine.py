"""Build an engine package: from a checkpoint to what one GPU architecture runs. Needs no GPU.

python build_engine.py --arch sm89 --checkpoint SCAIL.safetensors --lora STEPS.safetensors --out packages
python build_engine.py --arch sm120 --preset tiny --programs native,tensorrt --out packages
"""  # noqa: E501 - a usage line is copied whole

import argparse
import logging
from collections.abc import Sequence

from engine.build.make import PROGRAMS, Order, make_package
from engine.build.native import build_native
from engine.command_line import Parser, end_on_signals, path, program, run
from engine.config import SCAIL_14B, models_dir, state_dir
from engine.demo.presets import PRESETS
from engine.errors import BadRequest
from engine.models.locate import VAE, search
from engine.models.lora import file_and_strength
from kernels.arch import ARCHS, Arch
from kernels.fp8 import FORMS


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run(build, args, out_of_memory="Free some and build again: it goes on where it stopped.")


def build(args: argparse.Namespace) -> None:
    """Builds a package, or compiles the kernels alone; prints what was made."""
    print(
        _compile(args) if args.kernels_only else make_package(_order(args), args.out, state_dir())
    )


def _compile(args: argparse.Namespace) -> str:
    """All kernels that a package of the 14B model may hold, for builds without a compiler."""
    given = (args.checkpoint, args.preset, args.out, args.calibration, args.prompts, *args.lora)
    if any(given):
        raise BadRequest("--kernels-only takes --arch alone.")
    made = build_native(SCAIL_14B, FORMS, _arch(args), state_dir())
    return f"{len(made)} kernels for {args.arch} in {state_dir()}"


def _arch(args: argparse.Namespace) -> Arch:
    return next(arch for arch in ARCHS if arch.name == args.arch)


def _order(args: argparse.Namespace) -> Order:
    if (args.checkpoint is None) == (args.preset is None):
        raise BadRequest("Give either --checkpoint or --preset.")
    if args.out is None:
        raise BadRequest("Give --out: the folder that the package is written to.")
    checkpoint, models = args.checkpoint, args.models or models_dir()
    if args.preset is not None:
        demo = PRESETS[args.preset].weights(state_dir())
        checkpoint, models = demo.checkpoint, args.models or demo.models
    return Order(
        arch=_arch(args),
        checkpoint=checkpoint,
        loras=tuple(args.lora),
        programs=tuple(args.programs.split(",")),
        weights=args.weights,
        calibration=args.calibration,
        prompts=args.prompts,
        models=models,
        vae=None if args.models is None else search(args.models, VAE),
    )


def _parser() -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="build_engine.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--arch", required=True, choices=[arch.name for arch in ARCHS])
    add("--checkpoint", type=path, metavar="FILE", help="a transformer of SCAIL, any layout")
    add("--preset", choices=[*PRESETS], help="in place of a checkpoint: a demo model")
    add("--kernels-only", action="store_true", help="compile the 14B model's into $SCAIL_STATE")
    add("--out", type=path, metavar="DIR", help="the package becomes DIR/KIND/ARCH")
    add("--lora", type=file_and_strength, action="append", default=[], metavar="FILE[:STRENGTH]")
    add("--programs", default="native", metavar=",".join(PROGRAMS), help="native if not given")
    add(
        "--weights",
        choices=["int8", "fp8"],
        help="rotated INT8, or E4M3; int8 if native alone is built, else fp8",
    )
    add("--calibration", type=path, metavar="DIR", help="of generate --stages")
    add("--prompts", type=path, metavar="FILE", help="a prompt a line, embedded into the package")
    add(
        "--models",
        type=path,
        metavar="DIR",
        help="text encoder for --prompts ($SCAIL_MODELS); its VAE gives previews their colours",
    )
    return parser


if __name__ == "__main__":
    end_on_signals()
    program(main)
