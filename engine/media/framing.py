"""Pictures and frames of any size -> the sizes and values of the network, and back.

The size follows the picture's orientation; picture and motion are resized to cover it and cropped
at the centre, each by its own aspect ratio. This is exactly docs/reference/denoiser.md 5.3 to 5.6
and 5.10.
"""

import logging
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import LIMITS, SIZE_MULTIPLE, TRAINED_SIZE, VAE_STRIDE, Limits
from engine.errors import BadMedia, BadRequest

log = logging.getLogger(__name__)

Size = tuple[int, int]  # H, W

_MAX_COVER = 16  # resized pixels for each one kept: beyond, the crop shows nothing and eats memory
_CHUNK_BYTES = 128 * 2**20  # fp32 pixels in work at once
_FP32_PIXEL = 3 * 4


def target_size(height: int, width: int, base: Size = TRAINED_SIZE) -> Size:
    """The trained size, turned as the picture is; a square counts as portrait.

    `base` is (short side, long side).
    """
    short, long = base
    return (short, long) if height < width else (long, short)


def check_size(height: int, width: int, limits: Limits = LIMITS) -> Size:
    """Returns the size that a user asked for. Raises `BadRequest` where no clip can have it."""
    for name, side in (("height", height), ("width", width)):
        nearest = SIZE_MULTIPLE * max(1, (side + SIZE_MULTIPLE // 2) // SIZE_MULTIPLE)
        nearest = min(max(nearest, limits.min_side), limits.max_side)
        if not limits.min_side <= side <= limits.max_side:
            raise BadRequest(
                f"The {name} is {side}; it must be {limits.min_side} to {limits.max_side}. "
                f"The nearest is {nearest}."
            )
        if side % SIZE_MULTIPLE:
            raise BadRequest(
                f"The {name} is {side}; it must be a multiple of {SIZE_MULTIPLE}. "
                f"The nearest is {nearest}."
            )
    return height, width


def fitted_size(height: int, width: int, box: Size) -> Size:
    """The size of a clip in `box` that has the shape of a picture, as far as sizes allow.

    It is that of the ComfyUI endpoints' "resize" (docs/reference/runpod.md A.5): the largest that
    fits, rounded, then each side floored to a multiple. Raises `BadMedia` for a picture so long
    that a side of the clip would be too short.
    """
    ratio = min(box[0] / height, box[1] / width)
    tall, wide = (round(side * ratio) // SIZE_MULTIPLE * SIZE_MULTIPLE for side in (height, width))
    if min(tall, wide) < LIMITS.min_side:
        raise BadMedia(
            f"A picture of {width}x{height} fits into {box[1]}x{box[0]} at {wide}x{tall} only; at "
            f'least {LIMITS.min_side} a side are needed. Crop it to its subject, or use "crop".'
        )
    return tall, wide


def trim_to_whole_latents(count: int) -> int:
    """The most frames, at most `count`, that fill whole latent frames: 4k + 1.

    The network drops the rest in any case (docs/reference/encoders.md 1.3); here the log says so.
    """
    if count < 1:
        raise BadMedia(f"The motion has {count} frames; at least one is needed.")
    stride = VAE_STRIDE[0]
    kept = (count - 1) // stride * stride + 1
    if kept < count:
        log.info("%d of %d frames kept: the last %d fill no latent", kept, count, count - kept)
    return kept


def image_to_network(image: Tensor) -> Tensor:
    """[H, W, 3] u8 -> [3, H, W] fp32 in -1..1."""
    return (image.permute(2, 0, 1).contiguous().float() / 255) * 2 - 1


def crop_image(image: Tensor, size: Size) -> Tensor:
    """Covers `size` and crops at the centre: [3, h, w] fp32 -> [3, H, W] fp32.

    Bicubic overshoot at edges is not clamped and reaches the network, as in training
    (docs/reference/denoiser.md 5.5).
    """
    if image.shape[1:] == size:
        return image
    return _cover(image[None], size)[0].contiguous()


def crop_frames(frames: Tensor, size: Size) -> Tensor:
    """Covers `size` and crops at the centre: [n, h, w, 3] u8 -> [n, H, W, 3] u8.

    Some frames at a time are resized in fp32, clamped, rounded (docs/reference/denoiser.md 5.5).
    """
    count, height, width, _ = frames.shape
    if (height, width) == size:
        return frames
    cropped = frames.new_empty(count, *size, 3)
    covered = covering_size(height, width, size)
    pixels = height * width + covered[0] * covered[1]
    at_once = max(1, _CHUNK_BYTES // (pixels * _FP32_PIXEL))
    for first in range(0, count, at_once):
        some = frames[first : first + at_once].permute(0, 3, 1, 2).contiguous().float()
        some = _cover(some, size).clamp(0, 255).round()
        cropped[first : first + at_once] = some.permute(0, 2, 3, 1).to(torch.uint8)
    return cropped


def crop_clip(chunks: Iterable[Tensor], count: int, size: Size) -> Tensor:
    """At most `count` frames [T, H, W, 3] u8 from chunks [n, h, w, 3] u8, cropped as they come.

    Never holds more than the result and one chunk. Raises `BadMedia` if no frame comes.
    """
    clip = torch.empty(count, *size, 3, dtype=torch.uint8)
    filled = 0
    for chunk in chunks:
        some = crop_frames(chunk[: count - filled], size)
        clip[filled : filled + len(some)] = some
        filled += len(some)
    if not filled:
        raise BadMedia("The motion has no frames; at least one is needed.")
    return clip[:filled]


def crop_nearest(frames: Tensor, shape: Size, size: Size) -> Tensor:
    """Covers `size` and crops, as pictures of `shape` are: [n, h, w, ..] u8 -> [n, H, W, ..] u8.

    No value is mixed with another, so labels stay labels. Frames of another size than `shape` are
    stretched to it (docs/reference/masks.md 4.2).
    """
    covered = covering_size(*shape, size)
    for axis in (0, 1):
        kept = torch.arange(size[axis]) + (covered[axis] - size[axis]) // 2
        held = frames.shape[axis + 1]
        if held == size[axis] == covered[axis]:
            continue
        frames = frames.index_select(axis + 1, (2 * kept + 1) * held // (2 * covered[axis]))
    return frames


def covering_size(height: int, width: int, size: Size) -> Size:
    """The size after the resize and before the crop.

    Integers are multiplied before the division: int(w * (H / h)) differs for some sizes
    (docs/reference/denoiser.md 10).
    """
    tall, wide = size
    if width / height > wide / tall:
        covered = tall, int((width * tall) / height)
    else:
        covered = int((height * wide) / width), wide
    if covered[0] * covered[1] > _MAX_COVER * tall * wide:
        raise BadMedia(
            f"A picture of {width}x{height} would be cut to a sliver to fill {wide}x{tall}; "
            "crop it to its subject first."
        )
    return covered


def skeleton_to_network(frames: Tensor) -> Tensor:
    """[n, H, W, 3] u8 -> [3, n, H/2, W/2] fp32 in -1..1, each pixel the mean of 2x2.

    A clip may be converted in any chunks: frames do not depend on each other. Source:
    docs/reference/denoiser.md 5.6.
    """
    values = (frames.permute(3, 0, 1, 2).contiguous().float() - 127.5) / 127.5
    # Not avg_pool2d: it adds in another order, which shows in the last bit.
    return F.interpolate(values, scale_factor=0.5, mode="bilinear", align_corners=False)


def frames_to_network(frames: Tensor) -> Tensor:
    """[n, H, W, 3] u8 of a finished clip -> [3, n, H, W] fp32 in -1..1, for it to go on.

    `frames_to_u8` cut what lay between two levels, so a level stands for the middle of what became
    it: as it is, each segment of a long clip would be half a level darker than the one before. The
    ends of the scale are what was clamped to them.
    """
    values = frames.permute(3, 0, 1, 2).contiguous().float()
    middle = (values + 0.5) / 127.5 - 1
    return middle.where((values > 0) & (values < 255), values / 127.5 - 1)


def frames_to_u8(frames: Tensor) -> Tensor:
    """[3, n, H, W] in about -1..1 -> [n, H, W, 3] u8, truncated as officially.

    Source: docs/reference/denoiser.md 5.10.
    """
    shares = (frames.float().clamp(-1, 1) + 1) / 2
    return (shares * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _cover(pictures: Tensor, size: Size) -> Tensor:
    """[n, 3, h, w] fp32 -> [n, 3, H, W], resized and cropped."""
    covered = covering_size(pictures.shape[2], pictures.shape[3], size)
    if pictures.shape[2:] != covered:
        pictures = F.interpolate(
            pictures, covered, mode="bicubic", align_corners=False, antialias=True
        )
    top, left = (covered[0] - size[0]) // 2, (covered[1] - size[1]) // 2
    return pictures[:, :, top : top + size[0], left : left + size[1]]
