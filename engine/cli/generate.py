"""The options of `python -m engine generate`, and the request that they make."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

from engine.cli.plans import gigabytes
from engine.command_line import Parser, path
from engine.config import KINDS, ModelConfig
from engine.demo.presets import SHIPPED, Preset, preset_of
from engine.errors import BadRequest
from engine.flow import (
    Align,
    Drift,
    Fit,
    Framing,
    KindName,
    Mode,
    Motion,
    RecipeName,
    Reference,
    Request,
    SegmentPlan,
    Settings,
    override,
)
from engine.jobs.like import Like, like, require_same_kind
from engine.jobs.served import (
    Served,
    check_mode,
    check_recipe,
    check_references,
    mode_of,
    refuse_foreign,
    told_of_persons,
)
from engine.masks.making import FILES, FOLDER
from engine.masks.order import read_who
from engine.models.attention import available
from engine.models.checkpoint import Checkpoint
from engine.models.lora import file_and_strength
from engine.program import NATIVE, PRECISIONS, ChosenPackage
from engine.recipes import check_output, check_settings, recipe_of
from engine.tensorrt.block_runner import PROGRAMS
from engine.worker.serving import served_by, served_of

Add: TypeAlias = Callable[..., Any]  # `add_argument` of a parser or of a group of options

# The recipe where none is named: of a checkpoint as it was released, and of a package.
_OF_CHECKPOINT: RecipeName = "official"
_OF_PACKAGE: Mapping[KindName, RecipeName] = {"preview": "official", "scail2": "turbo"}
# What brings a driving mask, as a sentence says it.
_ASK = f"--mask, or put SAM 2.1, as {FILES}, into {FOLDER} in the folder of models"
# The options that one kind of model alone may understand, and their values that say nothing.
_ROLES = (
    "mask", "reference_mask", "reference", "reference_mask_of", "segments", "framing", "who",
    "strict", "drift", "align",
)  # fmt: skip


# What a clip may say of itself and options call otherwise; the rest has one name here and there.
_CALLED = {"context_frames": "window_frames", "context_overlap": "overlap_frames"}
_OF_RECIPE = ("recipe", "sampler", "steps", "cfg", "shift", *_CALLED)
_SIZE = ("width", "height")
_LEFT_OUT = {"audio": True, "strict": False}  # what flags are unless they are given


def take_settings(args: argparse.Namespace) -> Like | None:
    """Reads the settings of the clip that --like names, for all options that are not given.

    A recipe that is given takes the place of all that the clip says of its own, and a side of the
    frame that of both. Raises as `like` does.
    """
    if args.like is None:
        return None
    args.alike = found = like(args.like, args.like.name)
    left = {name for name in found.given if _is_open(args, _CALLED.get(name, name))}
    if args.recipe is not None:
        left -= {*_OF_RECIPE}
    if any(getattr(args, side) is not None for side in _SIZE):
        left -= {*_SIZE}
    for name in left:
        setattr(args, _CALLED.get(name, name), getattr(found.fields, name))
    return found


def _is_open(args: argparse.Namespace, option: str) -> bool:
    """Tells whether an option was left out."""
    return getattr(args, option, None) in (None, _LEFT_OUT.get(option))


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What the options ask for, of the model that they name."""

    request: Request
    served: Served
    demo: Preset | None  # whose weights run; None: those of a real model
    notes: tuple[str, ...]  # what is called otherwise here, or changes nothing


def read_options(
    args: argparse.Namespace, chosen: ChosenPackage | None, *, makes_masks: bool = False
) -> Asked:
    """Makes the request. Of a checkpoint the headers are read, of a package its manifest.

    With `makes_masks` masks are made where replacement has none.

    Raises `BadRequest` for options that the model does not understand, for a clip to be like of
    another kind of model, and what opening a checkpoint raises.
    """
    demo, shape, served, usual = _model(args, chosen)
    if args.alike is not None:  # before its settings are taken for options of this model
        require_same_kind(args.alike, served)
    served = dataclasses.replace(served, makes_masks=makes_masks)
    given = [name for name in _ROLES if getattr(args, name)]
    refuse_foreign((f"--{name.replace('_', '-')}" for name in given), served)
    request, note = _request(args, shape, served, usual)
    mode = request.settings.mode
    check_mode(mode, request.kind, request.mask, _ASK, served)
    if demo is None:
        check_recipe(args.recipe or usual, served)
    notes = () if note is None else (note,)
    return Asked(request, served, demo, (*notes, *told_of_persons(args.persons, served)))


def _model(
    args: argparse.Namespace, chosen: ChosenPackage | None
) -> tuple[Preset | None, Preset | None, Served, RecipeName]:
    """Finds the model that runs: the demo whose weights it has, the one whose shape it has, what it
    serves, and its usual recipe.
    """
    if chosen is not None:
        served = served_by(chosen.package.manifest, "this package")
        demo = preset_of(chosen.package.manifest.model)
        return demo, demo, served, _OF_PACKAGE[served.kind.name]
    if args.checkpoint is not None:
        config: ModelConfig = Checkpoint(args.checkpoint).config
        served = served_of(config, "this checkpoint")
        return None, preset_of(config), served, _OF_CHECKPOINT
    return SHIPPED, SHIPPED, served_of(SHIPPED.config, "the demo model"), _OF_CHECKPOINT


def _request(
    args: argparse.Namespace, shape: Preset | None, served: Served, usual: RecipeName
) -> tuple[Request, str | None]:
    """Makes the request, and a sentence if its recipe has another name."""
    kinds: tuple[Motion, ...] = ("video", "pose", "joints")
    kind: Motion = next(kind for kind in kinds if getattr(args, kind) is not None)
    recipe, note = recipe_of(served.kind.name, args.recipe or usual)
    if shape is not None and args.recipe is None:  # as a model of this shape was trained
        recipe = shape.recipe
    recipe = override(recipe, args)
    settings = override(Settings(recipe, segments=served.kind.segments[0]), args)
    settings = dataclasses.replace(settings, recipe=recipe, mode=mode_of(settings.mode, served))
    has_size = (settings.height, settings.width) != (None, None)
    if not has_size and shape is not None and shape.size is not None:
        settings = dataclasses.replace(settings, height=shape.size[0], width=shape.size[1])
    request = Request(
        args.image,
        getattr(args, kind),
        kind,
        settings,
        args.mask,
        args.reference_mask,
        _references(args.reference, args.reference_mask_of),
        args.preview,
    )
    return request, note


def _references(pictures: list[Path], masks: list[tuple[int, Path]]) -> tuple[Reference, ...]:
    check_references(len(pictures))
    of = dict(masks)
    if len(of) != len(masks):
        raise BadRequest("--reference-mask-of names a picture twice; each has one mask.")
    for number in of:
        if not 1 <= number <= len(pictures):
            raise BadRequest(
                f"--reference-mask-of names picture {number}; --reference is given "
                f"{len(pictures)} times, and the first is 1."
            )
    return tuple(Reference(one, of.get(n)) for n, one in enumerate(pictures, start=1))


def check_options(args: argparse.Namespace) -> None:
    """Refuses what no model takes, before one is opened: figures out of range, a bad output."""
    recipe, _ = recipe_of("preview", _OF_CHECKPOINT)
    recipe = override(recipe, args)
    check_settings(dataclasses.replace(override(Settings(recipe), args), recipe=recipe))
    named = [
        args.image, args.video, args.pose, args.joints, args.mask, args.reference_mask,
        args.checkpoint, *args.reference, *(file for _, file in args.reference_mask_of),
        *(file for file, _ in args.lora),
    ]  # fmt: skip
    inputs = [file for file in (*named, args.like) if file is not None]
    check_output(args.out, ".mp4", *inputs)
    if args.preview is not None:
        check_output(args.preview, ".png", *inputs)


def numbered_file(text: str) -> tuple[int, Path]:
    """Parses N=FILE, as an option's type."""
    number, equals, name = text.partition("=")
    if not equals or not name or not (number.isascii() and number.isdigit() and len(number) < 4):
        raise argparse.ArgumentTypeError("N=FILE is expected: the mask of picture N")
    return int(number), path(name)


def who(text: str) -> tuple[int, ...]:
    """Parses persons such as 2,1, as an option's type."""
    try:
        return read_who(text)
    except BadRequest as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_models(args: argparse.Namespace) -> None:
    """Refuses options about models that contradict each other."""
    if args.checkpoint is not None and args.package is not None:
        raise BadRequest("Give --checkpoint or --package, not both.")
    idle_models = args.models is not None and args.video is None  # it captures motion too
    if args.checkpoint is None and args.package is None and idle_models:
        raise BadRequest("--models belongs to --checkpoint or --package; neither is given.")
    if args.checkpoint is None and args.lora:
        raise BadRequest("--lora belongs to --checkpoint; a package has its LoRAs merged.")
    if args.package is None and args.gpu_memory is not None:
        raise BadRequest("--gpu-memory belongs to --package; the exact model is not planned.")
    if args.package is None and args.program != NATIVE:
        raise BadRequest("--program belongs to --package; none is given.")
    if args.program == "tensorrt" and args.attention is not None:
        raise BadRequest("--attention belongs to --program native or hybrid; tensorrt has its own.")


# --- options


def add_generate_options(command: Parser) -> None:
    command.set_defaults(alike=None)
    group = command.add_argument_group("input")
    group.add_argument("--image", type=path, required=True, help="the picture of the character")
    motion = group.add_mutually_exclusive_group(required=True)
    motion.add_argument("--video", type=path, help="a video of somebody dancing")
    motion.add_argument("--pose", type=path, help="a rendered skeleton video")
    motion.add_argument("--joints", type=path, help="an .npz of SMPL joints")
    add_dancer_options(group.add_argument)

    _add_role_options(command.add_argument_group("who is who (SCAIL-2)").add_argument)

    add = command.add_argument_group("model").add_argument
    add("--package", type=path, metavar="DIR", help="of build_engine.py, or a folder of such")
    add("--checkpoint", type=path, metavar="FILE",
        help="a SCAIL transformer, run exactly; without both: demo weights")  # fmt: skip
    add("--lora", type=file_and_strength, action="append", default=[], metavar="FILE[:STRENGTH]",
        help="merged into the checkpoint; may be repeated")  # fmt: skip
    add("--models", type=path, metavar="DIR", help="VAE, encoders, motion capture ($SCAIL_MODELS)")
    add("--attention", help=f"{' or '.join(available())}; "
        "of a package int8fp8, int8, fp8 too (default: the first that its GPU has)")  # fmt: skip
    add("--program", choices=(NATIVE, *PROGRAMS), default=NATIVE,
        help="of a package; tensorrt and hybrid (with our attention) are experimental")  # fmt: skip
    add("--gpu-memory", type=gigabytes, metavar="GB",
        help="of a package: plan with no more; what does not fit is streamed")  # fmt: skip
    add("--precision", choices=PRECISIONS, help="fp32 on a CPU, bf16 on a GPU")

    add = command.add_argument_group("look").add_argument
    add("--like", type=path, metavar="CLIP.mp4", help="the settings of a clip of this engine, for "
        "all options that are not given")  # fmt: skip
    add("--prompt", help="what the clip shows")
    add("--negative-prompt", help="what it should not show; seen where the cfg is not 1")
    add("--recipe", choices=get_args(RecipeName), help="official if not given; of a package of "
        "SCAIL-2 turbo")  # fmt: skip
    add("--sampler", help="in place of the recipe's")
    add("--steps", type=int, help="in place of the recipe's")
    add("--cfg", type=float, help="in place of the recipe's")
    add("--shift", type=float, help="in place of the recipe's")
    add("--seed", type=int, help="0 to 2**64 - 1; default: 0")

    add = command.add_argument_group("size and time").add_argument
    add_size_options(add)
    add("--fit", choices=get_args(Fit), help="a picture of another shape is cut (crop, the "
        "default), or the clip takes its shape (resize)")  # fmt: skip

    add = command.add_argument_group("output").add_argument
    add("--out", type=path, required=True, metavar="CLIP.mp4")
    add("--no-audio", dest="audio", action="store_false", help="leave the sound of the motion out")
    add("--preview", type=path, metavar="FILE.png", help="what the clip will be, written anew at "
        "every step")  # fmt: skip
    add("--stages", type=path, metavar="DIR", help="keep skeleton, latents, activations, timings")


def _add_role_options(add: Add) -> None:
    titles = " and ".join(kind.title for kind in KINDS.values() if kind.modes)
    add("--mode", choices=get_args(Mode), help=f"of {titles}: the picture dances (animation, the "
        "default), or takes the place of the person in the --video")  # fmt: skip
    add("--mask", type=path, metavar="FILE", help="who is who in the motion: a video, a ZIP of "
        "pictures or an .npz, each person in a colour")  # fmt: skip
    add("--reference-mask", type=path, metavar="FILE", help="who is who in the picture; else its "
        "transparency, else all of it")  # fmt: skip
    add("--reference", type=path, action="append", default=[], metavar="FILE",
        help="a further picture of the character or the scene; up to 4 times")  # fmt: skip
    add("--reference-mask-of", type=numbered_file, action="append", default=[], metavar="N=FILE",
        help="the mask of further picture N, counted from 1")  # fmt: skip
    add("--who", type=who, metavar="2,1", help="who of the mask takes the looks of persons 1, 2, "
        "by number or colour; default: who has their colours")  # fmt: skip
    add("--framing", choices=get_args(Framing), help="auto (the default): in replacement the "
        "person of the picture is placed; as-is; driving: in animation the motion is")  # fmt: skip
    add("--strict", action="store_true", help="a warning about the media is an error")
    add("--segments", choices=get_args(SegmentPlan), help="how a long clip is cut; default: even")
    add("--drift", choices=get_args(Drift), help="what the colours of later segments are brought "
        "back to, where masks show who is who; default: first")  # fmt: skip


def add_dancer_options(add: Add) -> None:
    add("--persons", type=int, help="how many dancers of a video are followed; default: 1")
    add("--align", choices=get_args(Align), help="camera and face: the best fit (exact, the "
        "default), or what the official program finds")  # fmt: skip


def add_size_options(add: Add) -> None:
    add("--width", type=int, help="multiple of 32; default: 896x512, turned as the picture is")
    add("--height", type=int, help="multiple of 32; given with --width or not at all")
    add("--fps", type=float, help="of the clip; default: that of the motion")
    add("--frames", type=int, help="at most so many")
