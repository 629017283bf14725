"""Drawn clips with exact masks for the drift of colours: dancers before a wall, and no model."""

import contextlib

import cv2
import numpy as np
import torch

from engine.drift.steady import Steady
from engine.flow import RoleFrames, Source
from tests.support.mask_scenes import colours, labels

SKIN = np.float32([[205, 120, 90], [70, 110, 190], [150, 170, 60]])  # of person 1, 2, ..
NAMES = ["blue", "red", "green"]
BLACK = 0


def painted(held):
    """Paints labels [T, H, W]: each person in shades of its colour, before a wall that is darker
    to one side. A person's colours go with its place in the frame.
    """
    height, width = held.shape[1:]
    rng = np.random.default_rng(0)
    grain = cv2.resize(rng.uniform(-18, 18, (height // 8, width // 8)), (width, height))
    wall = np.float32([150, 165, 120]) + grain[..., None]
    wall = wall * np.linspace(0.8, 1.1, width)[None, :, None]
    shade = np.linspace(0.75, 1.15, height)[:, None, None]
    looks = [wall, *(np.broadcast_to(skin * shade, wall.shape) for skin in SKIN)]
    wall, *people = (torch.from_numpy(look.clip(0, 255).round().astype(np.uint8)) for look in looks)
    frames = wall.repeat(len(held), 1, 1, 1)
    for number, look in enumerate(people, start=1):
        frames = look.where((held == number)[..., None], frames)
    return frames


def source_of(held, driving=None, mode="animation"):
    """A job whose persons are where `held` says. `driving`: other frames than the painted ones."""
    shown = painted(held) if driving is None else driving
    mask = colours(held, NAMES, BLACK)
    picture = torch.zeros(3, *held.shape[1:])
    return Source(picture, shown, 16.0, None, roles=RoleFrames(mode, picture, mask))


def darker(frames, levels):
    return (frames.int() - levels).clamp(0, 255).byte()


def paler(frames, share):
    """Takes colour away: all channels go towards their mean (in grey as the eye sees it)."""
    values = frames.float()
    grey = (values * torch.tensor([0.2126, 0.7152, 0.0722])).sum(-1, keepdim=True)
    return (grey + share * (values - grey)).round().clamp(0, 255).byte()


def dancing(segments, frames, height=96, width=160, persons=2):
    """Labels of a clip of segments with so many frames each."""
    return labels(segments * frames, height, width, persons)


def handed_on(source, parts, drift="first", check=lambda: None):
    """What goes into the clip of segments that come out as `parts`, and what followed them."""
    steady = Steady(drift, source, len(parts))
    laps = []

    @contextlib.contextmanager
    def lap(name):
        laps.append(name)
        yield

    made = [torch.cat(list(steady.hand_on(iter(part.split(3)), check, lap))) for part in parts]
    assert set(laps) <= {"drift"}
    return made, steady


def outcomes(steady, segment):
    return {one.region: one.outcome for one in steady.report[segment - 1].regions}


def figures(steady, segment):
    """dE and chroma of each region as it came."""
    return {one.region: (one.delta_e, one.chroma) for one in steady.report[segment - 1].regions}


def after(steady):
    """dE of all regions and segments as they are in the clip."""
    return [one.delta_e_after for part in steady.report for one in part.regions]
