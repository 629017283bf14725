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
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

import torch

from engine.capture import capture_motion
from engine.config import models_dir, state_dir
from engine.demo.weights import demo_weights
from engine.errors import BadRequest, EngineError
from engine.flow import Align, Motion, Request
from engine.golden.verify import recompute
from engine.gpu import find_gpu
from engine.heap import keep_freed_memory
from engine.load import PRECISIONS, Settings, load_exact
from engine.media.framing import crop_frames, target_size
from engine.media.mp4 import encode_mp4
from engine.media.picture import load_image
from engine.media.video import probe_video
from engine.models.attention import available
from engine.pose.extract import PoseExtractor
from engine.pose.joints import JointClip, save_joints
from engine.pose.networks import Networks
from engine.request import RECIPES, check_output, check_request, check_shape
from engine.source import check_source
from engine.stages import Stages

LICENCES = {
    "NLF and SMPL (motion capture)": "non-commercial research use only",
    "TensorRT (optional program)": "its licence restricts offering it as a hosted service",
}
DEMO_RECIPE = dataclasses.replace(RECIPES["official"], steps=4, cfg=1.0)


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
    request = _request(args)
    check_request(request)
    given = [request.image, request.motion, *(path for path, _ in args.lora)]
    check_output(args.out, ".mp4", *given, *([args.checkpoint] if args.checkpoint else []))
    idle_models = args.models is not None and request.kind != "video"  # it captures motion too
    if args.checkpoint is None and (idle_models or args.lora):
        raise BadRequest("--models and --lora belong to --checkpoint, which is not given.")

    check_source(request)
    stages = Stages(args.stages)

    device = _device()
    if device.type == "cpu":
        keep_freed_memory()
    networks = Networks(args.models or models_dir(), device, state_dir())
    if request.kind == "video":
        networks.require()
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    settings = Settings(device, precision, args.attention, state_dir())
    logging.getLogger("engine").info("exact model in %s on %s", precision, device.type)
    if args.checkpoint is None:
        print("DEMO WEIGHTS: random numbers, not a trained model", file=sys.stderr)
        demo = demo_weights(state_dir())
        comment, checkpoint, models = "DEMO WEIGHTS", demo.checkpoint, demo.models
    else:
        comment, checkpoint, models = "SCAIL", args.checkpoint, args.models or models_dir()
    pipeline = load_exact(checkpoint, args.lora, models, networks, settings)
    clip = pipeline.run(request, args.out, f"{comment}, seed {request.seed}", stages)
    print(
        f"{clip.path}: {clip.frames} frames of {clip.width}x{clip.height} at {clip.fps:g} fps, "
        f"seed {clip.seed}, {sum(clip.timings_ms.values()) / 1000:.1f} s"
    )


def pose(args: argparse.Namespace) -> None:
    """Motion capture alone."""
    check_shape(args.width, args.height, args.fps, args.frames, args.persons)
    inputs = [args.video] if args.image is None else [args.video, args.image]
    check_output(args.out, ".mp4", *inputs)
    if args.joints is not None:
        check_output(args.joints, ".npz", *inputs)
    picture = None if args.image is None else load_image(args.image)
    info = probe_video(args.video)
    if args.width is not None and args.height is not None:
        size = args.height, args.width
    else:
        shape = (info.height, info.width) if picture is None else picture.shape[:2]
        size = target_size(shape[0], shape[1])
    networks = Networks(args.models or models_dir(), _device(), state_dir())
    extractor = PoseExtractor(networks, state_dir())
    motion, fps = capture_motion(extractor, args.video, size, args.fps, args.frames, args.persons)
    shown = None if picture is None else crop_frames(picture[None], size)[0].numpy()
    frames = extractor.skeleton(motion, shown, *size, args.align)
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
    gpu = find_gpu()
    found = {
        "gpu": None if gpu is None else dataclasses.asdict(gpu),
        "packages": [],
        "runs": "the exact model in plain PyTorch on " + ("the GPU" if gpu else "the CPU"),
        "attention": available(),
        "models_dir": str(models_dir()),
        "state_dir": str(state_dir()),
        "licences": LICENCES,
    }
    print(json.dumps(found, indent=1))


def _request(args: argparse.Namespace) -> Request:
    kinds: tuple[Motion, ...] = ("video", "pose", "joints")
    kind: Motion = next(kind for kind in kinds if getattr(args, kind) is not None)
    demo = args.checkpoint is None and args.recipe is None
    recipe = DEMO_RECIPE if demo else RECIPES[args.recipe or "official"]
    changes = {
        name: getattr(args, name)
        for name in ("sampler", "steps", "cfg", "shift")
        if getattr(args, name) is not None
    }
    return Request(
        image=args.image,
        motion=getattr(args, kind),
        kind=kind,
        recipe=dataclasses.replace(recipe, **changes),
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        width=args.width,
        height=args.height,
        fps=args.fps,
        frames=args.frames,
        audio=not args.no_audio,
        persons=args.persons,
        align=args.align,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH."""
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


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

    command = commands.add_parser("generate", help="make a clip")
    command.set_defaults(run=generate)
    add = command.add_argument
    add("--image", type=_path, required=True, help="the picture of the character")
    motion = command.add_mutually_exclusive_group(required=True)
    motion.add_argument("--video", type=_path, help="a video of somebody dancing")
    motion.add_argument("--pose", type=_path, help="a rendered skeleton video")
    motion.add_argument("--joints", type=_path, help="an .npz of SMPL joints")
    add("--out", type=_path, required=True, metavar="CLIP.mp4")
    add("--checkpoint", type=_path, help="a SCAIL transformer; without it, demo weights")
    add("--lora", type=_lora, action="append", default=[], metavar="FILE[:STRENGTH]")
    add("--models", type=_path, metavar="DIR", help="VAE, encoders, motion capture ($SCAIL_MODELS)")
    add("--prompt", default="")
    add("--negative-prompt", default="")
    add("--recipe", choices=RECIPES, help="official if not given")
    add("--sampler", help="in place of the recipe's")
    add("--steps", type=int, help="in place of the recipe's")
    add("--cfg", type=float, help="in place of the recipe's")
    add("--shift", type=float, help="in place of the recipe's")
    add("--seed", type=int, default=0, help="0 to 2**64 - 1")
    _add_motion_options(command)
    add("--no-audio", action="store_true", help="leave the sound of the motion out")
    add("--attention", default="sdpa", help="sdpa or xformers")
    add("--precision", choices=PRECISIONS, help="fp32 on a CPU, bf16 on a GPU")
    add("--stages", type=_path, metavar="DIR", help="keep skeleton, latents, activations, timings")

    command = commands.add_parser("pose", help="motion capture alone")
    command.set_defaults(run=pose)
    add = command.add_argument
    add("--video", type=_path, required=True, help="a video of somebody dancing")
    add("--image", type=_path, help="fit the skeleton to the person in this picture")
    add("--out", type=_path, required=True, metavar="SKELETON.mp4")
    add("--joints", type=_path, metavar="JOINTS.npz", help="keep the joints too")
    add("--models", type=_path, metavar="DIR", help="the networks ($SCAIL_MODELS)")
    _add_motion_options(command)

    command = commands.add_parser("verify", help="recompute golden data")
    command.set_defaults(run=verify)
    command.add_argument("folder", type=_path, metavar="DIR")

    command = commands.add_parser("info", help="what this machine has")
    command.set_defaults(run=info)

    for command in commands.choices.values():
        command.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return parser


def _add_motion_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--width", type=int, help="multiple of 32; default: 896x512, turned as the picture is")
    add("--height", type=int)
    add("--fps", type=float, help="of the clip; default: that of the motion")
    add("--frames", type=int, help="at most so many")
    add("--persons", type=int, default=1, help="how many dancers of a video are followed")
    add("--align", choices=get_args(Align), default="exact",
        help="camera and face: the best fit, or what the official program finds")  # fmt: skip


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    main()
