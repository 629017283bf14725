"""Makes a small clip large, alone and beside the picture and the motion that it was made from.

python -m engine.demo.show --image I.png --stages DIR --clip C.mp4 --out LARGE.mp4 --beside B.mp4
python -m engine.demo.show --image I.png --driving V.mp4 --clip C.mp4 --beside B.mp4
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import EngineError
from engine.media.framing import Size, crop_frames
from engine.media.mp4 import encode_mp4
from engine.media.picture import load_image
from engine.media.video import VideoInfo, frame_count, probe_video, read_video
from engine.stage_dump import SKELETON, TIMINGS

TIMES = 4  # as high and as wide
COMMENT = "DEMO WEIGHTS"  # in the file, as in the clip that it shows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=Path, required=True, help="the reference picture")
    motion = parser.add_mutually_exclusive_group(required=True)
    motion.add_argument("--stages", type=Path, help="as generate kept them: shows the skeleton")
    motion.add_argument("--driving", type=Path, help="the driving video of SCAIL-2")
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the clip alone, with --stages")
    parser.add_argument("--beside", type=Path, required=True)
    args = parser.parse_args(argv)
    if (args.stages is None) != (args.out is None):
        parser.error("--stages and --out belong together")
    try:
        if args.driving is not None:
            show_driven(args.image, args.driving, args.clip, args.beside)
            print(f"picture, driving video and clip side by side: {args.beside}")
            return
        show(args.image, args.stages / SKELETON, args.clip, args.out, args.beside)
    except EngineError as error:
        sys.exit(f"error: {error}")
    laps = json.loads((args.stages / TIMINGS).read_bytes())
    print(", ".join(f"{stage} {ms / 1000:.1f} s" for stage, ms in laps.items()))
    print(f"the clip: {args.out}\npicture, skeleton and clip side by side: {args.beside}")


def show(image: Path, skeleton: Path, clip: Path, out: Path, beside: Path) -> None:
    """Writes the clip enlarged, and picture, skeleton and clip in one row. Raises `EngineError`."""
    info = probe_video(clip)
    encode_mp4(map(enlarged, frames(clip)), info.fps, out, comment=COMMENT)
    picture = crop_frames(load_image(image)[None], large(info))
    row = rows(picture, map(enlarged, frames(skeleton)), map(enlarged, frames(clip)))
    encode_mp4(row, info.fps, beside, comment=COMMENT)


def show_driven(image: Path, driving: Path, clip: Path, beside: Path) -> None:
    """Writes picture, driving video and clip in one row. Raises `EngineError`.

    The driving video may have any size, and as many frames as the clip.
    """
    info = probe_video(clip)
    size = large(info)
    picture = crop_frames(load_image(image)[None], size)
    shown = (crop_frames(some, size) for some in frames(driving))
    row = rows(picture, shown, map(enlarged, frames(clip)))
    encode_mp4(row, info.fps, beside, comment=COMMENT)


def large(info: VideoInfo) -> Size:
    """The size of a clip when it is shown."""
    return TIMES * info.height, TIMES * info.width


def rows(picture: Tensor, motion: Iterable[Tensor], made: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pieces [n, H, 3 W, 3] u8: the picture [1, H, W, 3], the motion and the clip in a row."""
    for moving, dancing in zip(motion, made, strict=True):
        still = picture.expand(len(dancing), *picture.shape[1:])
        yield torch.cat([still, moving, dancing], dim=2)


def frames(video: Path) -> Iterator[Tensor]:
    """The frames of a video [n, H, W, 3] u8, in pieces that are cut alike for every video."""
    info = probe_video(video)
    yield from read_video(info, None, frame_count(info, None, None))


def enlarged(clip: Tensor) -> Tensor:
    """Frames [n, H, W, 3] u8 -> the same, smoothly made `TIMES` as high and wide."""
    wide = clip.permute(0, 3, 1, 2).float()
    large = F.interpolate(wide, scale_factor=TIMES, mode="bicubic", align_corners=False)
    return large.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


if __name__ == "__main__":
    main()
