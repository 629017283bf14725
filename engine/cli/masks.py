"""Makes or reads the masks of a clip, and shows who becomes whom before a clip is rendered.

python -m engine masks --video DANCE.mp4 --image ME.png --out MASKS.npz --preview LOOK.mp4
python -m engine generate --video DANCE.mp4 --image ME.png --mask MASKS.npz --out CLIP.mp4
"""

import argparse
import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import get_args

import torch
from PIL import Image
from torch import Tensor

from engine.cli.generate import add_size_options, who
from engine.command_line import Parser, path
from engine.config import models_dir, state_dir
from engine.errors import BadMedia, BadRequest, OutputError
from engine.flow import Framing, Mode, Request, Settings, Source, Warned, override
from engine.machine.device import find_device
from engine.masks.corrections import Correction, read_corrections
from engine.masks.looked import Look
from engine.masks.made import MadeMasks
from engine.masks.making import Segment, no_segmenter, read_masks
from engine.masks.preview import preview_frames, stills
from engine.masks.reader import DRIVING, REFERENCE
from engine.masks.saved import FORMS, save_masks, save_reference
from engine.masks.segment import segment_with
from engine.media.mp4 import encode_mp4
from engine.pose.networks import Networks
from engine.recipes import RECIPES, check_output, check_settings
from engine.source import load_source, told, wanted_masks, with_masks
from kernels.whole_file import whole_file

log = logging.getLogger(__name__)

_GROWN = 16


def make(args: argparse.Namespace) -> str:
    """Writes the masks of a video and its picture, and a preview; says what was written."""
    request, mode = _request(args)
    check_settings(request.settings, "scail2")
    _check_outputs(args)
    device = find_device()
    wanted = wanted_masks(request, args.persons, args.grow, is_patient=args.slow)
    if args.mask is not None:
        _check_unread(args)
        made = read_masks(wanted, args.mask)
    else:
        corrections = () if args.corrections is None else read_corrections(args.corrections)
        segment = segmenter(args.models or models_dir(), device, args.segmenter, corrections)
        if segment is None:
            raise no_segmenter(args.models or models_dir(), "--mask")
        made = segment(wanted, lambda: None)
    with tempfile.TemporaryDirectory(prefix="masks-") as folder:
        kept = Path(folder, "masks.npz")
        save_masks(kept, made, DRIVING[mode])
        networks = Networks(args.models or models_dir(), device, state_dir())
        source = _source(request, kept, networks.look)
    warned = _all_warnings(made, source)
    for one in warned:
        log.warning("%s", one)
    for standing in source.standing:
        log.info("%s", told(standing))
    if args.strict and warned:
        raise BadMedia(f"Strict: a warning is an error here. {warned[0]}")
    _save(args.out, made, mode)
    if args.preview is not None:
        _show(
            args.preview, dataclasses.replace(source, warned=_once([*made.warned, *source.warned]))
        )
    persons = made.boxes.shape[1]
    return f"{args.out}: {len(made.labels)} frames, persons: {persons}, warnings: {len(warned)}"


def segmenter(
    models: Path,
    device: torch.device,
    chosen: Path | None = None,
    corrections: tuple[Correction, ...] = (),
) -> Segment | None:
    """What makes masks of a video: SAM 2 of the folder of models, or the `chosen` one; None without
    any.
    """
    return segment_with(models, device, state_dir(), chosen, corrections)


def with_own_masks(
    request: Request, persons: int | None, segment: Segment | None, folder: Path
) -> Request:
    """Makes the masks of a clip in replacement that has none, if something makes them."""
    if request.mask is not None or request.settings.mode != "replacement" or segment is None:
        return request
    made, warned = with_masks(request, segment, folder, persons)
    for one in warned:
        log.warning("%s", one.said)
    return made


def _request(args: argparse.Namespace) -> tuple[Request, Mode]:
    mode: Mode = args.mode
    settings = override(Settings(RECIPES["scail2"]["turbo"], segments="even"), args)
    settings = dataclasses.replace(settings, mode=mode, audio=False)
    request = Request(args.image, args.video, "video", settings, reference_mask=args.reference_mask)
    return request, mode


def _check_outputs(args: argparse.Namespace) -> None:
    given = [args.video, args.image, args.mask, args.reference_mask]
    inputs = [file for file in given if file is not None]
    suffix = args.out.suffix.lower()
    if suffix not in FORMS:
        raise OutputError(f"{args.out.name} should end in {', '.join(FORMS)}.")
    check_output(args.out, suffix, *inputs)
    if args.preview is not None:
        check_output(args.preview, ".mp4", *inputs)


def _check_unread(args: argparse.Namespace) -> None:
    """Raises `BadRequest` for options of making masks beside masks that are only read."""
    given = {
        "--persons": args.persons, "--segmenter": args.segmenter,
        "--corrections": args.corrections, "--slow": args.slow or None,
    }  # fmt: skip
    if named := [name for name, value in given.items() if value is not None]:
        raise BadRequest(
            f"{', '.join(named)} would change nothing: --mask gives masks, which are read as they "
            "are. Leave out one or the other."
        )


def _source(request: Request, mask: Path, look: Look) -> Source:
    """The media of a job with masks whose persons have their places already."""

    def nobody(*_: object) -> tuple[Tensor, float]:
        raise AssertionError("masks need no skeleton")

    settings = dataclasses.replace(request.settings, who=(), strict=False)
    kept = dataclasses.replace(request, settings=settings, mask=mask, reference_mask=None)
    return load_source(kept, nobody, look=look)


def _all_warnings(made: MadeMasks, source: Source) -> list[str]:
    return list(dict.fromkeys([*(one.said for one in made.warned), *source.notes]))


def _once(warned: list[Warned]) -> tuple[Warned, ...]:
    return tuple({one.said: one for one in warned}.values())


def _save(out: Path, made: MadeMasks, mode: Mode) -> None:
    """Writes the masks, and beside a form without it the mask of the picture."""
    save_masks(out, made, DRIVING[mode])
    if out.suffix.lower() != ".npz" and made.reference is not None:
        save_reference(out.with_name(f"{out.stem}-reference.png"), made.reference, REFERENCE[mode])


def _show(out: Path, source: Source) -> None:
    """Writes the preview, and three pictures of it beside it."""
    encode_mp4(preview_frames(source), source.fps, out)
    for number, frame in enumerate(stills(source), start=1):
        _save_picture(out.with_name(f"{out.stem}-{number}.png"), frame)


def _save_picture(place: Path, frame: Tensor) -> None:
    assert frame.dtype == torch.uint8
    try:
        with whole_file(place) as draft:
            Image.fromarray(frame.numpy()).save(draft, "PNG")
    except OSError as error:
        raise OutputError(f"{place} cannot be written: {error.strerror}.") from error


# --- options


def add_masks_options(command: Parser) -> None:
    add = command.add_argument_group("input").add_argument
    add("--video", type=path, required=True, help="a video of somebody dancing")
    add("--image", type=path, required=True, help="the picture of the character")
    add("--mask", type=path, metavar="FILE", help="who is who in the video, to be read, looked at "
        "and kept in another form; else it is made")  # fmt: skip
    add("--reference-mask", type=path, metavar="FILE", help="who is who in the picture")
    add("--models", type=path, metavar="DIR", help="with SAM 2.1 in sam2 ($SCAIL_MODELS)")
    add("--segmenter", type=path, metavar="FILE", help="another SAM 2: a file, or a folder of "
        "transformers")  # fmt: skip
    add("--corrections", type=path, metavar="FILE.json", help="what is wrong in masks made before: "
        "a list of frame, person, and box, points or mask")  # fmt: skip

    add = command.add_argument_group("who is who").add_argument
    add("--mode", choices=get_args(Mode), default="animation",
        help="what the masks are for; default: animation")  # fmt: skip
    add("--who", type=who, metavar="2,1", help="who of the video takes the looks of the "
        "picture's persons 1, 2, by number or colour; default: as both appear")  # fmt: skip
    add("--persons", type=int, help="how many are followed; default: as many as the picture has")
    add("--grow", type=int, default=0, metavar="PIXELS",
        help=f"-{_GROWN} to {_GROWN}, of a clip 512 high; 4 to 8 for wide clothes")  # fmt: skip
    add("--framing", choices=get_args(Framing), help="as of generate; default: auto")
    add("--slow", action="store_true", help="make them on a CPU, however long it takes")
    add("--strict", action="store_true", help="a warning is an error")

    add_size_options(command.add_argument_group("size and time").add_argument)

    add = command.add_argument_group("output").add_argument
    add("--out", type=path, required=True, metavar="MASKS.npz",
        help="or .mkv, .zip (of pictures)")  # fmt: skip
    add("--preview", type=path, metavar="LOOK.mp4", help="who becomes whom, and three pictures")
