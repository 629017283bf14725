"""Drawn persons with exact masks, and mask files of every kind that people send."""

import itertools

import cv2
import numpy as np
import torch

from engine.masks.colours import CLASSES, paint
from tests.support.clips import run_ffmpeg

# how ffmpeg writes each kind, and the least IoU that must be left of every colour
VIDEOS = {
    "H.264 4:2:0 crf 18": (".mp4", ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p"], 0.985),
    "H.264 4:2:0 crf 32": (".mp4", ["-c:v", "libx264", "-crf", "32", "-pix_fmt", "yuv420p"], 0.97),
    "H.264 4:4:4 crf 18": (".mp4", ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv444p"], 0.998),
    "VP9": (".webm", ["-c:v", "libvpx-vp9", "-cpu-used", "8", "-pix_fmt", "yuv420p"], 0.97),
    "ffv1 yuv420p": (".mkv", ["-c:v", "ffv1", "-pix_fmt", "yuv420p"], 0.985),
    "ffv1 gbrp": (".mkv", ["-c:v", "ffv1", "-pix_fmt", "gbrp"], 1),
    "x264rgb crf 0": (".mkv", ["-c:v", "libx264rgb", "-crf", "0"], 1),
    "BT.601 read as 709": (
        ".mp4",
        ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p",
         "-bsf:v", "h264_metadata=matrix_coefficients=1"],
        0.98,
    ),
}  # fmt: skip
PICTURES = {"PNG": (".png", {}, 1), "JPEG 75": (".jpg", {"quality": 75}, 0.98),
            "JPEG 95": (".jpg", {"quality": 95}, 0.99),
            "WebP 80": (".webp", {"quality": 80}, 0.97)}  # fmt: skip


def labels(count, height=512, width=896, persons=2):
    """Labels [T, H, W] u8 of dancers side by side, the largest some 0.6 of the height."""
    frames = np.zeros((count, height, width), np.uint8)
    unit = height / 512
    for place in range(count):
        for person in range(persons):
            across = width * (person + 0.5) / persons + 20 * unit * np.sin(place + person)
            _dancer(frames[place], across, 0.22 * height, unit, place + 2 * person, person + 1)
    return torch.from_numpy(frames)


def _dancer(frame, x, top, unit, phase, label):
    def at(dx, dy):
        return round(x + dx * unit), round(top + dy * unit)

    def limb(*points, thickness):
        for one, other in itertools.pairwise(points):
            cv2.line(frame, at(*one), at(*other), label, max(1, round(thickness * unit)))

    swing = 30 * np.sin(phase)
    cv2.circle(frame, at(0, 20), max(1, round(22 * unit)), label, -1)
    limb((0, 50), (0, 160), thickness=60)
    limb((-20, 60), (-60 - swing, 110), (-70, 170 - swing), thickness=18)
    limb((20, 60), (60, 110 + swing), (70 + swing, 160), thickness=18)
    limb((-15, 160), (-30 - swing, 230), (-35, 300), thickness=26)
    limb((15, 160), (30 + swing, 230), (40, 300), thickness=26)


def colours(held, names, ground):
    """Labels -> RGB [T, H, W, 3] u8; person n has the colour `names[n - 1]`."""
    numbers = torch.tensor([ground, *(CLASSES[name] for name in names)], dtype=torch.uint8)
    return paint(numbers[held.int()])


def write_video(path, frames, options=VIDEOS["ffv1 gbrp"][1], fps=16):
    _, height, width, _ = frames.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "-"]
    run_ffmpeg(*raw, *options, path, stdin=frames.numpy().tobytes())
    return path


def drawn_person(height, width, tall, foot, across):
    """A standing person as a mask [height, width] bool: `tall` pixels high, the feet at row `foot`
    (exclusive), the middle of the box at column `across`; what is outside is cut off.
    """
    unit = tall / 300
    large = np.zeros((3 * height + 2 * tall, 3 * width + 2 * tall), np.uint8)
    y, x = height + foot - tall, width + across
    side = 45 * unit

    def box(top, bottom, left, right):
        large[round(y + top * unit) : round(y + bottom * unit),
              round(x + left * unit) : round(x + right * unit)] = 1  # fmt: skip

    box(0, 50, -20, 20)
    box(50, 170, -side / unit, side / unit)
    box(170, 300, -35, -5)
    box(170, 300, 5, 35)
    return large[height : 2 * height, width : 2 * width] > 0
