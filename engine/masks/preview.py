"""A picture of who becomes whom, for people: colours over picture and motion, numbers, warnings.

    left   the picture as the clip has it: placed, or covering the clip
    right  a frame of the motion
    below  what should be looked at, brighter where it happens

The same colour and number are the same person on both sides, and lines show foot lines. Source:
docs/reference/masks.md 6.6.
"""

import textwrap
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.errors import BadMedia
from engine.flow import Mode, Source, Warned
from engine.masks.colours import CLASSES, PERSONS, numbers_of, paint
from engine.masks.tracks import box_of
from engine.media.framing import frames_to_u8

STILLS = 3

_LIGHT, _DIM, _DARK = (255, 255, 255), (150, 150, 150), (24, 24, 24)
_NEAR_S = 1.0  # around a frame in which something happens, it is bright
_SHORT_SIDE, _LETTERS = 512, 18  # pixels of letters at this short side
_LEAST_LETTERS = 11
_MOST_WARNED = 6
_TITLES: dict[Mode, tuple[str, str]] = {
    "animation": ("who dances", "whose motion it is"),
    "replacement": ("who takes the place", "who is replaced"),
}


def preview_frames(source: Source) -> Iterator[Tensor]:
    """Draws every frame of a job's media: [1, h, w, 3] u8 each, of even sides."""
    panel = _Panel(source)
    for number in range(len(source.skeleton)):
        yield panel.draw(number)[None]


def stills(source: Source) -> list[Tensor]:
    """Draws three frames [h, w, 3] u8: the first, one where something should be looked at, else
    the middle, and the last.
    """
    last = len(source.skeleton) - 1
    told = [one.frame for one in source.warned if one.frame is not None and 0 < one.frame < last]
    panel = _Panel(source)
    return [panel.draw(number) for number in (0, told[0] if told else last // 2, last)]


class _Panel:
    """Owns what is the same in every frame of a preview."""

    def __init__(self, source: Source) -> None:
        if source.roles is None:
            raise BadMedia("A model without masks has no persons to show.")
        self._source, self._roles = source, source.roles
        height, width = source.image.shape[1:]
        self._size = height, width
        self._font = _font(max(_LEAST_LETTERS, round(_LETTERS * min(height, width) / _SHORT_SIDE)))
        self._line = round(self._font.size * 1.4)
        self._warned = _lines(source.warned, 2 * width, self._font)
        rows = sum(len(lines) for _, lines in self._warned) or 1
        self._bar = (self._line * (rows + 1) + 1) // 2 * 2
        shown = source.image if source.placed is None else source.placed
        picture = frames_to_u8(shown[:, None])[0]
        mask = numbers_of(frames_to_u8(self._roles.reference[:, None])[0])
        self._left = self._persons(picture, mask, [one.foot_line for one in source.standing])

    def draw(self, number: int) -> Tensor:
        """Draws frame `number`: [h, w, 3] u8."""
        height, width = self._size
        canvas = Image.new("RGB", (2 * width, height + self._bar), _DARK)
        canvas.paste(self._left, (0, 0))
        mask = numbers_of(self._roles.driving[number])
        feet = [one.motion_foot_line for one in self._source.standing if one.frame == number]
        canvas.paste(self._persons(self._source.skeleton[number], mask, feet), (width, 0))
        draw = ImageDraw.Draw(canvas)
        picture, motion = _TITLES[self._roles.mode]
        time = f"{number / self._source.fps:.1f} s"
        self._title(draw, 0, (f"picture: {picture}", "picture"))
        self._title(draw, width, (f"video: {motion}; frame {number}, {time}", f"video: {time}"))
        self._warnings(draw, number)
        return torch.from_numpy(np.array(canvas))

    def _persons(self, picture: Tensor, mask: Tensor, feet: Sequence[float]) -> Image.Image:
        """A picture [H, W, 3] u8 half in the colours of its persons, each with its number."""
        is_person = torch.zeros_like(mask, dtype=torch.bool)
        for name in PERSONS:
            is_person |= mask == CLASSES[name]
        mixed = (picture.int() + paint(mask).int()) // 2
        shown = torch.where(is_person[..., None], mixed, picture.int()).to(torch.uint8)
        canvas = Image.fromarray(shown.numpy())
        draw = ImageDraw.Draw(canvas)
        for foot in feet:
            draw.line([(0, foot), (canvas.width, foot)], _LIGHT, 1)
        for place, name in enumerate(PERSONS, start=1):
            there = (mask == CLASSES[name]).numpy()
            if there.any():
                self._label(draw, box_of(there).tolist(), f"{place} {name}", name)
        return canvas

    def _label(self, draw: ImageDraw.ImageDraw, box: list[float], text: str, name: str) -> None:
        """Writes who it is above a person, or at the upper edge of the picture."""
        colour = tuple(paint(torch.tensor(CLASSES[name], dtype=torch.uint8)).tolist())
        wide = draw.textlength(text, self._font) + self._line * 0.5
        left = min(max(0.0, (box[0] + box[2] - wide) / 2), self._size[1] - wide)
        top = max(float(self._line), box[1] - self._line)
        plate = [(left, top), (left + wide, top + self._line)]
        draw.rectangle(plate, fill=_DARK, outline=colour, width=2)
        draw.text((left + self._line * 0.25, top + 1), text, _legible(colour), self._font)

    def _title(self, draw: ImageDraw.ImageDraw, left: int, texts: Sequence[str]) -> None:
        """Writes the first of some texts that fits above one side, else the last."""
        left, most = left + self._line // 3, self._size[1] - self._line
        lengths = [draw.textlength(text, self._font) for text in texts]
        text = next((text for text, wide in zip(texts, lengths) if wide <= most), texts[-1])
        wide = draw.textlength(text, self._font)
        draw.rectangle([(left, 0), (left + wide, self._line)], fill=_DARK)
        draw.text((left, 0), text, _LIGHT, self._font)

    def _warnings(self, draw: ImageDraw.ImageDraw, number: int) -> None:
        left, top = self._line // 3, self._size[0] + self._line // 2
        if not self._warned:
            draw.text((left, top), "Nothing looks wrong.", _DIM, self._font)
        for warned, lines in self._warned:
            near = warned.frame is not None and (
                abs(warned.frame - number) <= _NEAR_S * self._source.fps
            )
            for line in lines:
                draw.text((left, top), line, _LIGHT if near else _DIM, self._font)
                top += self._line


def _legible(colour: tuple[int, ...]) -> tuple[int, ...]:
    """A colour that can be read on dark: pure blue cannot."""
    return tuple(max(channel, 110) for channel in colour)


def _lines(
    warned: Sequence[Warned], width: int, font: ImageFont.FreeTypeFont
) -> list[tuple[Warned, list[str]]]:
    """The warnings in lines that fit; of many the first."""
    letters = max(20, int(width / font.getlength("n")))
    kept = [(one, textwrap.wrap(one.said, letters)) for one in warned[:_MOST_WARNED]]
    if len(warned) > _MOST_WARNED:
        rest = f"And {len(warned) - _MOST_WARNED} more."
        kept.append((Warned("more", rest), [rest]))
    return kept


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow has one of its own
    return font
