"""Makes a small clip large, alone and beside the picture and skeleton that it was made from.

python -m engine.demo.show --image I.png --stages DIR --clip C.mp4 --out LARGE.mp4 --beside B.mp4
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import EngineError
from engine.media.framing import crop_frames
from engine.media.mp4 import encode_mp4
from engine.media.picture import load_image
from engine.media.video import frame_count, probe_video, read_video
from engine.stage_dump import SKELETON, TIMINGS

TIMES = 4  # as high and as wide
COMMENT = "DEMO WEIGHTS"  # in the file, as in the clip that it shows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=Path, required=True, help="the reference picture")
    parser.add_argument("--stages", type=Path, required=True, help="as generate kept them")
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
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
    size = TIMES * info.height, TIMES * info.width
    picture = crop_frames(load_image(image)[None], size)
    encode_mp4(rows(picture, skeleton, clip), info.fps, beside, comment=COMMENT)


def rows(picture: Tensor, skeleton: Path, clip: Path) -> Iterator[Tensor]:
    """Pieces [n, H, 3 W, 3] u8: the picture [1, H, W, 3], the skeleton and the clip in a row."""
    for bones, made in zip(frames(skeleton), frames(clip), strict=True):
        still = picture.expand(len(made), *picture.shape[1:])
        yield torch.cat([still, enlarged(bones), enlarged(made)], dim=2)


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
