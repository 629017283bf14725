"""Frames that show nothing: of one colour from edge to edge, as numbers that overflow leave them.

No clip of a person has such a frame. NaN becomes black on its way to 8 bits (`frames_to_u8`), so it
is found here too. Elsewhere SageAttention gave black clips, and static after a change of it
(docs/reference/runpod.md A.7); static has many colours and is not found.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from engine.errors import BlankFrames

SPREAD = 3  # levels: what a flat colour may differ by after the VAE's rounding
_STEP = 4  # pixels; a frame with a picture differs on a coarse grid already


def refuse_blank(chunks: Iterable[Tensor], passed: int = 0) -> Iterator[Tensor]:
    """Hands on chunks [n, H, W, 3] u8 as they come. Raises `BlankFrames` at the first blank one.

    `passed` counts the frames of the clip before them.
    """
    for frames in chunks:
        for number, frame in enumerate(frames, start=passed + 1):
            if is_blank(frame):
                colour = "black" if int(frame.max()) <= SPREAD else "of one colour"
                raise BlankFrames(
                    f"Frame {number} of the clip came out {colour}. Try another seed; if it "
                    "stays, the weights, a LoRA or the GPU's driver compute wrongly."
                )
        passed += len(frames)
        yield frames


def is_blank(frame: Tensor) -> bool:
    """True if no channel of a frame [H, W, 3] u8 varies by more than `SPREAD`."""
    return _is_flat(frame[::_STEP, ::_STEP]) and _is_flat(frame)


def _is_flat(pixels: Tensor) -> bool:
    flat = pixels.reshape(-1, 3)
    return bool((flat.amax(0) - flat.amin(0) <= SPREAD).all())
