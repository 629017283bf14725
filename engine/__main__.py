"""Animate a picture with the motion of a dance video.

python -m engine generate --image PICTURE --pose SKELETON.mp4 --out CLIP.mp4
python -m engine verify ../shared/golden
"""

import argparse
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, get_args

import torch

from engine.config import models_dir, state_dir
from engine.demo.presets import SHIPPED, Preset, preset_of
from engine.errors import BadRequest, EngineError
from engine.flow import Align, Motion, Request, Settings, override
from engine.golden.verify import recompute
from engine.load import load_exact, load_package
from engine.machine.gpu import Gpu, arch_of, find_gpu, require_driver
from engine.machine.heap import keep_freed_memory
from engine.machine.kernel_choice import known_choices
from engine.media.framing import crop_frames, target_size
from engine.media.mp4 import encode_mp4
from engine.media.picture import load_image
from engine.media.video import probe_video
from engine.models.attention import available
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

LICENCES = {
    "NLF and SMPL (motion capture)": "non-commercial research use only",
    "TensorRT (optional program)": "its licence restricts offering it as a hosted service",
}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("engine").setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        args.run(args)
    except EngineError as error:
        sys.exit(_fail(str(error)))
    except (torch.OutOfMemoryError, MemoryError) as error:
        sys.exit(_fail(f"Out of memory: {str(error).partition('.')[0]}. Ask for a smaller clip."))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has enough
    except OSError as error:  # what no stage foresaw: a vanished folder, a full terminal
        sys.exit(_fail(f"{error.filename or 'The system'}: {error.strerror}."))


def generate(args: argparse.Namespace) -> None:
    """The main job."""
    device = _device()
    chosen = None if args.package is None else choose_package(args.package, device)
    demo = _demo(args, chosen)
    request = _request(args, demo)
    check_settings(request.settings)
    given = [request.image, request.motion, *(path for path, _ in args.lora)]
    check_output(args.out, ".mp4", *given, *([args.checkpoint] if args.checkpoint else []))
    _check_models(args, request)
    check_source(request)
    stages = StageDump(args.stages)

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


def _check_models(args: argparse.Namespace, request: Request) -> None:
    """That options about models do not contradict each other."""
    if args.checkpoint is not None and args.package is not None:
        raise BadRequest("Give --checkpoint or --package, not both.")
    idle_models = args.models is not None and request.kind != "video"  # it captures motion too
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


def _demo(args: argparse.Namespace, chosen: ChosenPackage | None) -> Preset | None:
    """The demo model that is meant: the shipped one where nothing is named, or the package's."""
    if args.checkpoint is not None:
        return None
    return SHIPPED if chosen is None else preset_of(chosen.package.manifest.model)


def pose(args: argparse.Namespace) -> None:
    """Motion capture alone."""
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
    networks = Networks(args.models or models_dir(), _device(), state_dir())
    extractor = PoseExtractor(networks, state_dir())
    motion, fps = capture_motion(
        extractor, args.video, size, wanted.fps, wanted.frames, wanted.persons
    )
    shown = None if picture is None else crop_frames(picture[None], size)[0].numpy()
    frames = extractor.skeleton(motion, shown, *size, wanted.align)
    count = encode_mp4((torch.from_numpy(frame)[None] for frame in frames), fps, args.out)
    print(f"{args.out}: {count} frames of {size[1]}x{size[0]} at {fps:g} fps")
    if args.joints is not None:
        save_joints(args.joints, JointClip(motion.joints, fps, size))
        print(f"{args.joints}: joints of {motion.joints.shape[1]} person(s)")


def verify(args: argparse.Namespace) -> None:
    """Recompute golden data, one JSON line a check."""
    failed = 0
    for check in recompute(args.folder):
        failed += check.ok is False
        print(json.dumps(dataclasses.asdict(check)), flush=True)
    sys.exit(1 if failed else 0)


def info(args: argparse.Namespace) -> None:
    """What this machine has and what would run on it, as one JSON object."""
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
    """Whether hub.json and tests.json agree, a line a problem."""
    problems = check_hub(args.folder)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    print("hub.json and tests.json agree with each other, with RunPod and with the image.")


def _packages(path: Path) -> list[Package]:
    """A package, or all of a folder of packages. Raises `BadPackage` if there is none."""
    folders = [folder for _, folder in find_packages(path)]
    return [open_package(folder) for folder in folders or [path]]


def _choice(gpu: Gpu | None, packages: Sequence[Package]) -> dict[str, object]:
    """Which package would run here and why, or why none would."""
    if not packages:
        where = "the CPU" if gpu is None else "the GPU"
        return {"runs": f"the exact model in plain PyTorch on {where}", "variants": None}
    if gpu is None:
        names = ", ".join(package.manifest.arch for package in packages)
        return {"runs": f"{names}, by references on the CPU: there is no GPU", "variants": None}
    try:
        arch = arch_of(gpu, [package.manifest.arch for package in packages])
        package = next(held for held in packages if held.manifest.arch == arch.name)
        require_driver(gpu, package.manifest.driver)
    except EngineError as error:
        return {"runs": f"none: {error}", "variants": None}
    known = known_choices(package.digest, gpu, state_dir())
    return {
        "runs": f"{package.path}, which is for {gpu.name}",
        "variants": None if known is None else [dataclasses.asdict(op) for op in known.ops],
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


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Its errors are one sentence, as all of ours."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. See {self.prog} --help.\n")


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("the name of a file or folder is expected")
    return Path(text)


def _stop(number: int, _: object) -> NoReturn:
    """Ends the process through its `finally` blocks, so that nothing half-written stays."""
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m engine", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None], name: str, what: str) -> _Parser:
        made = commands.add_parser(name, help=what)
        made.set_defaults(run=run)
        return made

    _add_generate_options(command(generate, "generate", "make a clip"))
    _add_pose_options(command(pose, "pose", "motion capture alone"))
    add = command(verify, "verify", "recompute golden data").add_argument
    add("folder", type=_path, metavar="DIR")
    add = command(info, "info", "what this machine has").add_argument
    add("--package", type=_path, metavar="DIR", help="a package, or a folder of packages")
    add("--verify", action="store_true", help="hash every file of the packages")
    add = command(hub_check, "hub-check", "do hub.json and tests.json agree").add_argument
    add("folder", type=_path, nargs="?", default=Path(), metavar="DIR")
    for made in commands.choices.values():
        made.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return parser


def _add_generate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--image", type=_path, required=True, help="the picture of the character")
    motion = command.add_mutually_exclusive_group(required=True)
    motion.add_argument("--video", type=_path, help="a video of somebody dancing")
    motion.add_argument("--pose", type=_path, help="a rendered skeleton video")
    motion.add_argument("--joints", type=_path, help="an .npz of SMPL joints")
    add("--out", type=_path, required=True, metavar="CLIP.mp4")
    add("--package", type=_path, metavar="DIR", help="of build_engine.py, or a folder of such")
    add(
        "--checkpoint",
        type=_path,
        help="a SCAIL transformer, run exactly; without both: demo weights",
    )
    add("--lora", type=file_and_strength, action="append", default=[], metavar="FILE[:STRENGTH]")
    add("--models", type=_path, metavar="DIR", help="VAE, encoders, motion capture ($SCAIL_MODELS)")
    add("--prompt")
    add("--negative-prompt")
    add("--recipe", choices=RECIPES, help="official if not given")
    add("--sampler", help="in place of the recipe's")
    add("--steps", type=int, help="in place of the recipe's")
    add("--cfg", type=float, help="in place of the recipe's")
    add("--shift", type=float, help="in place of the recipe's")
    add("--seed", type=int, help="0 to 2**64 - 1; default: 0")
    _add_motion_options(command)
    add("--no-audio", dest="audio", action="store_false", help="leave the sound of the motion out")
    add("--attention", help="sdpa or xformers; of a package int8fp8 (its default), int8, fp8 too")
    add("--program", choices=(NATIVE, *PROGRAMS), default=NATIVE, help="of a package; tensorrt and "
        "hybrid (with our attention) are experimental")  # fmt: skip
    add("--precision", choices=PRECISIONS, help="fp32 on a CPU, bf16 on a GPU")
    add("--stages", type=_path, metavar="DIR", help="keep skeleton, latents, activations, timings")


def _add_pose_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--video", type=_path, required=True, help="a video of somebody dancing")
    add("--image", type=_path, help="fit the skeleton to the person in this picture")
    add("--out", type=_path, required=True, metavar="SKELETON.mp4")
    add("--joints", type=_path, metavar="JOINTS.npz", help="keep the joints too")
    add("--models", type=_path, metavar="DIR", help="the networks ($SCAIL_MODELS)")
    _add_motion_options(command)


def _add_motion_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--width", type=int, help="multiple of 32; default: 896x512, turned as the picture is")
    add("--height", type=int)
    add("--fps", type=float, help="of the clip; default: that of the motion")
    add("--frames", type=int, help="at most so many")
    add("--persons", type=int, help="how many dancers of a video are followed; default: 1")
    add("--align", choices=get_args(Align),
        help="camera and face: the best fit (exact, the default), or what the official program "
        "finds")  # fmt: skip


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    main()
