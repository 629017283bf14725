"""Animate a picture with the motion of a dance video.

python -m engine generate --image PICTURE --joints DANCE.npz --out CLIP.mp4
python -m engine COMMAND --help
"""

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine.cli.generate import (
    Asked,
    add_dancer_options,
    add_generate_options,
    add_size_options,
    check_models,
    check_options,
    read_options,
    take_settings,
)
from engine.cli.masks import add_masks_options, make, segmenter, with_own_masks
from engine.cli.plans import gigabytes, memory_plans
from engine.cli.serve import add_serve_options, playground, serve
from engine.command_line import Parser, end_on_signals, path, program, run
from engine.config import models_dir, state_dir
from engine.demo.presets import Preset
from engine.errors import BadRequest, EngineError
from engine.flow import Settings, override
from engine.golden.verify import recompute
from engine.jobs.like import comment_of
from engine.load import load_exact, load_package
from engine.machine.device import find_device
from engine.machine.gpu import Gpu, arch_of, find_gpu, require_driver
from engine.machine.heap import keep_freed_memory
from engine.machine.kernel_choice import chosen_sums, known_choices
from engine.masks.person_boxes import YOLO10_LICENCE
from engine.media.framing import crop_frames, target_size
from engine.media.mp4 import encode_mp4
from engine.media.picture import load_image
from engine.media.video import probe_video
from engine.models.attention import available
from engine.models.describe import describe
from engine.package.folder import Package, open_package, summary
from engine.package.search import Held, find_packages, several
from engine.pipeline import Pipeline
from engine.pose.capture import capture_motion
from engine.pose.extract import PoseExtractor
from engine.pose.joints import JointClip, save_joints
from engine.pose.networks import Networks
from engine.program import (
    ChosenPackage,
    ModelSettings,
    choose_package,
)
from engine.recipes import RECIPES, check_output, check_settings
from engine.source import check_source
from engine.stage_dump import StageDump
from engine.worker.hub import check as check_hub

log = logging.getLogger("engine")

LICENCES = {
    "NLF and SMPL (motion capture)": "non-commercial research use only",
    "YOLOv10 (boxes of persons, where you have put it)": YOLO10_LICENCE,
    "TensorRT (optional program)": "its licence restricts offering it as a hosted service",
}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("engine").setLevel(logging.WARNING if args.quiet else logging.INFO)
    run(args.command, args, out_of_memory="Ask for a smaller clip.")


def generate(args: argparse.Namespace) -> None:
    """Makes a clip."""
    check_models(args)
    alike = take_settings(args)
    check_options(args)
    device = find_device()
    chosen = None if args.package is None else choose_package(args.package, device)
    segment = segmenter(args.models or models_dir(), device)
    asked = read_options(args, chosen, makes_masks=segment is not None)
    if alike is not None:
        asked = dataclasses.replace(asked, notes=(*asked.notes, *alike.told))
    check_settings(asked.request.settings, asked.served.kind.name)
    with tempfile.TemporaryDirectory(prefix="masks-") as folder:
        request = with_own_masks(asked.request, args.persons, segment, Path(folder))
        _generate(args, chosen, dataclasses.replace(asked, request=request), device)


def _generate(
    args: argparse.Namespace, chosen: ChosenPackage | None, asked: Asked, device: torch.device
) -> None:
    """Makes the clip that was asked for, whose masks are there."""
    request, demo = asked.request, asked.demo
    networks = Networks(args.models or models_dir(), device, state_dir())
    source = check_source(request, networks.look)
    for note in asked.notes:
        log.warning("%s", note)
    stages = StageDump(args.stages)

    if device.type == "cpu":
        keep_freed_memory()
    if request.kind == "video" and request.settings.mode is None:
        networks.require()
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    settings = ModelSettings(
        device, precision, args.attention, state_dir(), args.program, args.gpu_memory
    )
    pipeline = _load(args, chosen, networks, settings, demo)
    origin = "SCAIL" if demo is None else "DEMO WEIGHTS"
    comment = comment_of(request.settings, asked.served.kind.name, origin)
    clip = pipeline.run(request, args.out, comment, stages, source=source)
    print(
        f"{clip.path}: {clip.frames} frames of {clip.width}x{clip.height} at {clip.fps:g} fps, "
        f"seed {clip.seed}, {sum(clip.timings_ms.values()) / 1000:.1f} s"
    )


def _load(
    args: argparse.Namespace,
    chosen: ChosenPackage | None,
    networks: Networks,
    settings: ModelSettings,
    demo: Preset | None,
) -> Pipeline:
    """Loads the package or the checkpoint that was asked for."""
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
    wanted = override(Settings(RECIPES["preview"]["official"]), args)
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


def masks(args: argparse.Namespace) -> None:
    """Makes or reads masks, and shows who becomes whom."""
    print(make(args))


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
    if args.gpu_memory is not None and args.package is None:
        raise BadRequest("--gpu-memory belongs to --package, which is not given.")
    gpu = find_gpu()
    packages = [] if args.package is None else _packages(args.package)
    for package in packages if args.verify else ():
        package.verify()
    found = {
        "gpu": None if gpu is None else dataclasses.asdict(gpu),
        "packages": [summary(package) for package in packages],
        **_choice(gpu, packages, args.package),
        "memory": _memory(gpu, packages, args.gpu_memory),
        "attention": available(),
        "models_dir": str(models_dir()),
        "state_dir": str(state_dir()),
        "licences": LICENCES,
    }
    print(json.dumps(found, indent=1))


def _memory(
    gpu: Gpu | None, packages: Sequence[Package], cap: int | None
) -> dict[str, object] | None:
    """Tells how clips would share the GPU here, or one with so much memory; None without either."""
    free = [] if gpu is None else [gpu.free_bytes or gpu.memory_bytes]
    free += [] if cap is None else [cap]
    if not free or not packages:
        return None
    return {str(package.path): memory_plans(package.manifest, min(free)) for package in packages}


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
    folders = [held.path for held in find_packages(path)]
    return [open_package(folder) for folder in folders or [path]]


def _choice(gpu: Gpu | None, packages: Sequence[Package], folder: Path | None) -> dict[str, object]:
    """Tells which package of `folder` would run here and why, or why none would."""
    untold = {"variants": None, "sums": None}  # nothing was chosen here yet
    if gpu is not None:
        try:
            find_device()
        except EngineError as error:
            return {"runs": f"none: {error}", **untold}
    if not packages or folder is None:
        where = "the CPU" if gpu is None else "the GPU"
        return {"runs": f"the exact model in plain PyTorch on {where}", **untold}
    if gpu is None:
        kinds = [f"{one.manifest.model_kind}/{one.manifest.arch}" for one in packages]
        return {"runs": f"{', '.join(kinds)}, by references on the CPU: there is no GPU", **untold}
    try:
        arch = arch_of(gpu, {package.manifest.arch for package in packages})
        fitting = [held for held in packages if held.manifest.arch == arch.name]
        if len(fitting) > 1:
            held = [Held(one.manifest.model_kind, arch.name, one.path) for one in fitting]
            raise BadRequest(several(folder, held))
        (package,) = fitting
        require_driver(gpu, package.manifest.driver)
    except EngineError as error:
        return {"runs": f"none: {error}", **untold}
    known = known_choices(package.digest, gpu, state_dir())
    title = package.manifest.model.kind.title
    runs = {"runs": f"{package.path}, which is of {title} and for {gpu.name}"}
    if known is None:
        return {**runs, **untold}
    return {
        **runs,
        "variants": [dataclasses.asdict(op) for op in known.ops],
        "sums": chosen_sums(known),
    }


# --- options


def _add_pose_options(command: Parser) -> None:
    add = command.add_argument_group("input").add_argument
    add("--video", type=path, required=True, help="a video of somebody dancing")
    add("--image", type=path, help="fit the skeleton to the person in this picture")
    add_dancer_options(add)
    add("--models", type=path, metavar="DIR", help="the networks ($SCAIL_MODELS)")
    add_size_options(command.add_argument_group("size and time").add_argument)
    add = command.add_argument_group("output").add_argument
    add("--out", type=path, required=True, metavar="SKELETON.mp4")
    add("--joints", type=path, metavar="JOINTS.npz", help="keep the joints too")


def _add_info_options(command: Parser) -> None:
    add = command.add_argument
    add("--package", type=path, metavar="DIR", help="a package, or a folder of packages")
    add("--verify", action="store_true", help="hash every file of the packages")
    add("--checkpoint", type=path, metavar="FILE", help="what is this file of weights, or LoRA?")
    add("--gpu-memory", type=gigabytes, metavar="GB",
        help="plan for a GPU with so much free; with --package")  # fmt: skip


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
                add_generate_options),
    ),
    "prepare": (
        Command("pose", "motion capture alone: a skeleton video, and joints", pose,
                _add_pose_options),
        Command("masks", "who is who in a video and a picture, and a preview", masks,
                add_masks_options),
    ),
    "check": (
        Command("info", "what this machine has, and what would run on it", info,
                _add_info_options),
        Command("verify", "recompute golden data of the reference programs", verify,
                _add_verify_options),
        Command("hub-check", "do hub.json, tests.json and the image agree", hub_check,
                _add_hub_options),
    ),
    "serve": (
        Command("serve", "jobs over HTTP on this machine's own GPU; docs/serve.md", serve,
                add_serve_options),
        Command("playground", "the same, and its page is opened", playground, add_serve_options),
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
