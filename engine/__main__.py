"""Animate a picture with the motion of a dance video.

python -m engine generate --image PICTURE --joints DANCE.npz --out CLIP.mp4
python -m engine COMMAND --help
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch

from engine.command_line import Parser, end_on_signals, path, program, run
from engine.config import models_dir, state_dir
from engine.demo.presets import SHIPPED, Preset, preset_of
from engine.errors import BadRequest, EngineError
from engine.flow import Align, Fit, Motion, Request, Settings, override
from engine.golden.verify import recompute
from engine.load import load_exact, load_package
from engine.machine.device import find_device
from engine.machine.gpu import Gpu, arch_of, find_gpu, require_driver
from engine.machine.heap import keep_freed_memory
from engine.machine.kernel_choice import chosen_sums, known_choices
from engine.media.framing import crop_frames, target_size
from engine.media.mp4 import encode_mp4
from engine.media.picture import load_image
from engine.media.video import probe_video
from engine.models.attention import available
from engine.models.describe import describe
from engine.models.lora import file_and_strength
from engine.package.folder import Package, find_packages, open_package, summary
from engine.pipeline import Pipeline
from engine.pose.capture import capture_motion
from engine.pose.extract import PoseExtractor
from engine.pose.joints import JointClip, save_joints
from engine.pose.networks import Networks
from engine.program import (
    NATIVE,
    PRECISIONS,
    ChosenPackage,
    ModelSettings,
    choose_package,
)
from engine.recipes import RECIPES, check_output, check_settings
from engine.source import check_source
from engine.stage_dump import StageDump
from engine.tensorrt.block_runner import PROGRAMS
from engine.worker.hub import check as check_hub

Add: TypeAlias = Callable[..., Any]  # `add_argument` of a parser or of a group of options

LICENCES = {
    "NLF and SMPL (motion capture)": "non-commercial research use only",
    "TensorRT (optional program)": "its licence restricts offering it as a hosted service",
}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("engine").setLevel(logging.WARNING if args.quiet else logging.INFO)
    run(args.command, args, out_of_memory="Ask for a smaller clip.")


def generate(args: argparse.Namespace) -> None:
    """Makes a clip."""
    _check_models(args)
    demo = SHIPPED if args.checkpoint is None and args.package is None else None
    request = _request(args, demo)
    check_settings(request.settings)
    given = [request.image, request.motion, *(path for path, _ in args.lora)]
    check_output(args.out, ".mp4", *given, *([args.checkpoint] if args.checkpoint else []))
    check_source(request)
    stages = StageDump(args.stages)

    device = find_device()
    chosen = None if args.package is None else choose_package(args.package, device)
    if chosen is not None and (demo := preset_of(chosen.package.manifest.model)) is not None:
        request = _request(args, demo)  # what was not given is as the demo's model was trained
    if device.type == "cpu":
        keep_freed_memory()
    networks = Networks(args.models or models_dir(), device, state_dir())
    if request.kind == "video":
        networks.require()
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    settings = ModelSettings(device, precision, args.attention, state_dir(), args.program)
    pipeline = _load(args, chosen, networks, settings, demo)
    origin = "SCAIL" if demo is None else "DEMO WEIGHTS"
    clip = pipeline.run(request, args.out, f"{origin}, seed {request.settings.seed}", stages)
    print(
        f"{clip.path}: {clip.frames} frames of {clip.width}x{clip.height} at {clip.fps:g} fps, "
        f"seed {clip.seed}, {sum(clip.timings_ms.values()) / 1000:.1f} s"
    )


def _check_models(args: argparse.Namespace) -> None:
    """Refuses options about models that contradict each other."""
    if args.checkpoint is not None and args.package is not None:
        raise BadRequest("Give --checkpoint or --package, not both.")
    idle_models = args.models is not None and args.video is None  # it captures motion too
    if args.checkpoint is None and args.package is None and idle_models:
        raise BadRequest("--models belongs to --checkpoint or --package; neither is given.")
    if args.checkpoint is None and args.lora:
        raise BadRequest("--lora belongs to --checkpoint; a package has its LoRAs merged.")
    if args.package is None and args.program != NATIVE:
        raise BadRequest("--program belongs to --package; none is given.")
    if args.program == "tensorrt" and args.attention is not None:
        raise BadRequest("--attention belongs to --program native or hybrid; tensorrt has its own.")


def _load(
    args: argparse.Namespace,
    chosen: ChosenPackage | None,
    networks: Networks,
    settings: ModelSettings,
    demo: Preset | None,
) -> Pipeline:
    """Loads the package or the checkpoint that was asked for."""
    log = logging.getLogger("engine")
    checkpoint, models = args.checkpoint, args.models or models_dir()
    if demo is not None:
        print(demo.warning, file=sys.stderr)
        shipped = demo.weights(state_dir())
        checkpoint = shipped.checkpoint
        # of a clip without package and checkpoint, --models names the networks of motion capture
        models = args.models if args.models and args.package else shipped.models
    if chosen is not None:
        log.info("package %s on %s", chosen.package.path, settings.device.type)
        return load_package(chosen, models, networks, settings)
    log.info("exact model in %s on %s", settings.precision, settings.device.type)
    return load_exact(checkpoint, args.lora, models, networks, settings)


def pose(args: argparse.Namespace) -> None:
    """Captures the motion of a dance, without a clip."""
    wanted = override(Settings(RECIPES["official"]), args)
    check_settings(wanted)
    inputs = [args.video] if args.image is None else [args.video, args.image]
    check_output(args.out, ".mp4", *inputs)
    if args.joints is not None:
        check_output(args.joints, ".npz", *inputs)
    picture = None if args.image is None else load_image(args.image)
    info = probe_video(args.video)
    if wanted.width is not None and wanted.height is not None:
        size = wanted.height, wanted.width
    else:
        shape = (info.height, info.width) if picture is None else picture.shape[:2]
        size = target_size(shape[0], shape[1])
    networks = Networks(args.models or models_dir(), find_device(), state_dir())
    extractor = PoseExtractor(networks, state_dir())
    motion, fps = capture_motion(extractor, info, size, wanted.fps, wanted.frames, wanted.persons)
    shown = None if picture is None else crop_frames(picture[None], size)[0].numpy()
    frames = extractor.skeleton(motion, shown, *size, wanted.align)
    count = encode_mp4((torch.from_numpy(frame)[None] for frame in frames), fps, args.out)
    print(f"{args.out}: {count} frames of {size[1]}x{size[0]} at {fps:g} fps")
    if args.joints is not None:
        save_joints(args.joints, JointClip(motion.joints, fps, size))
        print(f"{args.joints}: joints of {motion.joints.shape[1]} person(s)")


def verify(args: argparse.Namespace) -> None:
    """Recomputes golden data and prints one JSON line a check."""
    failed = 0
    for check in recompute(args.folder):
        failed += check.ok is False
        print(json.dumps(dataclasses.asdict(check)), flush=True)
    sys.exit(1 if failed else 0)


def info(args: argparse.Namespace) -> None:
    """Prints what this machine has and what would run on it, or what a file of weights is, as one
    JSON object.
    """
    if args.checkpoint is not None:
        if args.package is not None or args.verify:
            raise BadRequest("--checkpoint tells of a file alone; give it without --package.")
        print(json.dumps(describe(args.checkpoint), indent=1))
        return
    if args.verify and args.package is None:
        raise BadRequest("--verify belongs to --package, which is not given.")
    gpu = find_gpu()
    packages = [] if args.package is None else _packages(args.package)
    for package in packages if args.verify else ():
        package.verify()
    found = {
        "gpu": None if gpu is None else dataclasses.asdict(gpu),
        "packages": [summary(package) for package in packages],
        **_choice(gpu, packages),
        "attention": available(),
        "models_dir": str(models_dir()),
        "state_dir": str(state_dir()),
        "licences": LICENCES,
    }
    print(json.dumps(found, indent=1))


def hub_check(args: argparse.Namespace) -> None:
    """Prints where hub.json and tests.json disagree, a line a problem."""
    problems = check_hub(args.folder)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    print("hub.json and tests.json agree with each other, with RunPod and with the image.")


def _packages(path: Path) -> list[Package]:
    """Opens a package, or all of a folder of packages. Raises `BadPackage` if there is none."""
    folders = [folder for _, folder in find_packages(path)]
    return [open_package(folder) for folder in folders or [path]]


def _choice(gpu: Gpu | None, packages: Sequence[Package]) -> dict[str, object]:
    """Tells which package would run here and why, or why none would."""
    untold = {"variants": None, "sums": None}  # nothing was chosen here yet
    if gpu is not None:
        try:
            find_device()
        except EngineError as error:
            return {"runs": f"none: {error}", **untold}
    if not packages:
        where = "the CPU" if gpu is None else "the GPU"
        return {"runs": f"the exact model in plain PyTorch on {where}", **untold}
    if gpu is None:
        names = ", ".join(package.manifest.arch for package in packages)
        return {"runs": f"{names}, by references on the CPU: there is no GPU", **untold}
    try:
        arch = arch_of(gpu, [package.manifest.arch for package in packages])
        package = next(held for held in packages if held.manifest.arch == arch.name)
        require_driver(gpu, package.manifest.driver)
    except EngineError as error:
        return {"runs": f"none: {error}", **untold}
    known = known_choices(package.digest, gpu, state_dir())
    runs = {"runs": f"{package.path}, which is for {gpu.name}"}
    if known is None:
        return {**runs, **untold}
    return {
        **runs,
        "variants": [dataclasses.asdict(op) for op in known.ops],
        "sums": chosen_sums(known),
    }


def _request(args: argparse.Namespace, demo: Preset | None) -> Request:
    kinds: tuple[Motion, ...] = ("video", "pose", "joints")
    kind: Motion = next(kind for kind in kinds if getattr(args, kind) is not None)
    usual = RECIPES["official"] if demo is None else demo.recipe
    recipe = override(RECIPES.get(args.recipe, usual), args)
    settings = dataclasses.replace(override(Settings(recipe), args), recipe=recipe)
    has_size = (settings.height, settings.width) != (None, None)
    if not has_size and demo is not None and demo.size is not None:
        settings = dataclasses.replace(settings, height=demo.size[0], width=demo.size[1])
    return Request(args.image, getattr(args, kind), kind, settings)


# --- options


def _add_generate_options(command: Parser) -> None:
    group = command.add_argument_group("input")
    group.add_argument("--image", type=path, required=True, help="the picture of the character")
    motion = group.add_mutually_exclusive_group(required=True)
    motion.add_argument("--video", type=path, help="a video of somebody dancing")
    motion.add_argument("--pose", type=path, help="a rendered skeleton video")
    motion.add_argument("--joints", type=path, help="an .npz of SMPL joints")
    _add_dancer_options(group.add_argument)

    add = command.add_argument_group("model").add_argument
    add("--package", type=path, metavar="DIR", help="of build_engine.py, or a folder of such")
    add("--checkpoint", type=path, metavar="FILE",
        help="a SCAIL transformer, run exactly; without both: demo weights")  # fmt: skip
    add("--lora", type=file_and_strength, action="append", default=[], metavar="FILE[:STRENGTH]",
        help="merged into the checkpoint; may be repeated")  # fmt: skip
    add("--models", type=path, metavar="DIR", help="VAE, encoders, motion capture ($SCAIL_MODELS)")
    add("--attention", help=f"{' or '.join(available())}; "
        "of a package int8fp8 (its default), int8, fp8 too")  # fmt: skip
    add("--program", choices=(NATIVE, *PROGRAMS), default=NATIVE,
        help="of a package; tensorrt and hybrid (with our attention) are experimental")  # fmt: skip
    add("--precision", choices=PRECISIONS, help="fp32 on a CPU, bf16 on a GPU")

    add = command.add_argument_group("look").add_argument
    add("--prompt", help="what the clip shows")
    add("--negative-prompt", help="what it should not show; seen where the cfg is not 1")
    add("--recipe", choices=RECIPES, help="official if not given")
    add("--sampler", help="in place of the recipe's")
    add("--steps", type=int, help="in place of the recipe's")
    add("--cfg", type=float, help="in place of the recipe's")
    add("--shift", type=float, help="in place of the recipe's")
    add("--seed", type=int, help="0 to 2**64 - 1; default: 0")

    add = command.add_argument_group("size and time").add_argument
    _add_size_options(add)
    add("--fit", choices=get_args(Fit), help="a picture of another shape is cut (crop, the "
        "default), or the clip takes its shape (resize)")  # fmt: skip

    add = command.add_argument_group("output").add_argument
    add("--out", type=path, required=True, metavar="CLIP.mp4")
    add("--no-audio", dest="audio", action="store_false", help="leave the sound of the motion out")
    add("--stages", type=path, metavar="DIR", help="keep skeleton, latents, activations, timings")


def _add_pose_options(command: Parser) -> None:
    add = command.add_argument_group("input").add_argument
    add("--video", type=path, required=True, help="a video of somebody dancing")
    add("--image", type=path, help="fit the skeleton to the person in this picture")
    _add_dancer_options(add)
    add("--models", type=path, metavar="DIR", help="the networks ($SCAIL_MODELS)")
    _add_size_options(command.add_argument_group("size and time").add_argument)
    add = command.add_argument_group("output").add_argument
    add("--out", type=path, required=True, metavar="SKELETON.mp4")
    add("--joints", type=path, metavar="JOINTS.npz", help="keep the joints too")


def _add_dancer_options(add: Add) -> None:
    add("--persons", type=int, help="how many dancers of a video are followed; default: 1")
    add("--align", choices=get_args(Align), help="camera and face: the best fit (exact, the "
        "default), or what the official program finds")  # fmt: skip


def _add_size_options(add: Add) -> None:
    add("--width", type=int, help="multiple of 32; default: 896x512, turned as the picture is")
    add("--height", type=int, help="multiple of 32; given with --width or not at all")
    add("--fps", type=float, help="of the clip; default: that of the motion")
    add("--frames", type=int, help="at most so many")


def _add_info_options(command: Parser) -> None:
    add = command.add_argument
    add("--package", type=path, metavar="DIR", help="a package, or a folder of packages")
    add("--verify", action="store_true", help="hash every file of the packages")
    add("--checkpoint", type=path, metavar="FILE", help="what is this file of weights, or LoRA?")


def _add_verify_options(command: Parser) -> None:
    command.add_argument("folder", type=path, metavar="DIR", help="golden data, at any depth")


def _add_hub_options(command: Parser) -> None:
    command.add_argument("folder", type=path, nargs="?", default=Path(), metavar="DIR",
                         help="the project's root; this folder if not given")  # fmt: skip


# --- commands


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One command of `python -m engine`."""

    name: str
    does: str
    run: Callable[[argparse.Namespace], None]
    add_options: Callable[[Parser], None]


COMMANDS = {
    "make a clip": (
        Command("generate", "a picture and a motion become an MP4", generate,
                _add_generate_options),
    ),
    "prepare": (
        Command("pose", "motion capture alone: a skeleton video, and joints", pose,
                _add_pose_options),
    ),
    "check": (
        Command("info", "what this machine has, and what would run on it", info,
                _add_info_options),
        Command("verify", "recompute golden data of the reference programs", verify,
                _add_verify_options),
        Command("hub-check", "do hub.json, tests.json and the image agree", hub_check,
                _add_hub_options),
    ),
}  # fmt: skip
# Programs of their own, told beside the commands.
PROGRAMS_BESIDE = {
    "prepare": ("python build_engine.py", "a checkpoint becomes an engine package"),
    "serve": ("python handler.py", "the RunPod worker; docs/deploy.md"),
}
EXAMPLES = """\
examples:
  make demo
  python -m engine generate --image engine/demo/nano/dancer.png \\
      --joints engine/demo/nano/dance.npz --out clip.mp4
  python -m engine generate --image me.jpg --video dance.mp4 --out clip.mp4 \\
      --package packages --models models --recipe production
"""


def _overview() -> str:
    """Lists the commands by what a person wants to do, and examples that can be copied."""
    lines = [str(__doc__).partition("\n")[0]]
    for purpose in dict.fromkeys([*COMMANDS, *PROGRAMS_BESIDE]):
        rows = [(command.name, command.does) for command in COMMANDS.get(purpose, ())]
        rows += [PROGRAMS_BESIDE[purpose]] if purpose in PROGRAMS_BESIDE else []
        lines += ["", f"{purpose}:", *(f"  {name:<26}{does}" for name, does in rows)]
    return "\n".join([*lines, "", EXAMPLES])


def _parser() -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m engine", description=_overview(), formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help="one of those above")
    for command in (command for group in COMMANDS.values() for command in group):
        made = commands.add_parser(
            command.name, description=f"{command.does[0].upper()}{command.does[1:]}."
        )
        made.set_defaults(command=command.run)
        command.add_options(made)
        made.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return parser


if __name__ == "__main__":
    end_on_signals()
    program(main)
