"""Small videos for tests, in which every frame shows its own number as a grey level."""

import subprocess

import imageio_ffmpeg
import numpy as np
import torch

from engine.media.mp4 import encode_mp4
from engine.media.sound import find_sound
from engine.media.video import read_video

STEP = 8  # grey levels from one frame to the next: more than compression moves them


def numbered(count, height=64, width=96):
    """Frames [n, H, W, 3] u8 that show their numbers."""
    levels = (torch.arange(count) * STEP).to(torch.uint8)
    return levels.view(-1, 1, 1, 1).expand(count, height, width, 3).contiguous()


def numbers(frames):
    return [round(level / STEP) for level in frames.float().mean((1, 2, 3)).tolist()]


def read_numbers(info, *args):
    return [number for chunk in read_video(info, *args) for number in numbers(chunk)]


def clip(path, count=20, fps=16, audio=None):
    """A clip; `audio` is a file with its sound."""
    sound = None if audio is None else find_sound(audio)
    encode_mp4([numbered(count)], fps, path, audio=sound, crf=4)
    return path


def run_ffmpeg(*arguments, stdin=b""):
    """Runs ffmpeg for files that the engine itself never writes: other containers, tags, damage."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, input=stdin, check=True)


def tone(path, seconds, *options):
    run_ffmpeg("-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}", *options, path)
    return path


def read_sound(path, hz):
    """Samples -1..1 of the first track, as they come on its clock."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a:0", "-af",
        "aresample=async=1:first_pts=0", "-f", "f32le", "-ac", "1", "-ar", str(hz), "-",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(found, np.float32)
