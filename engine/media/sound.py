"""The sound of a video: its default track, cut and shifted by the times of what is decoded.

Packets are never copied: only decoded sound can be cut where a picture starts, be silent through a
gap, and end with the last picture. Encoding it again takes a hundredth of the time that it lasts.
"""

import logging
from fractions import Fraction
from pathlib import Path

from engine.config import LIMITS
from engine.errors import BadMedia
from engine.flow import Check, Sound, go_on
from engine.media.ffmpeg import (
    SAFE_INPUT,
    FfmpegFailed,
    clock_zero,
    ffmpeg,
    file_url,
    list_streams,
)
from engine.media.files import check_file

log = logging.getLogger(__name__)

_LONGEST_S = Fraction(600)
_TRACKS = ("0:a:disp:default:0", "0:a:0")  # the default one, or the first
_CPU_S, _MEMORY_BYTES = 120, 2 * 2**30  # ten minutes of many channels, and some silence
# A gap is filled, and an overlap cut, from this on: less is the coarse clock of a container.
_GAP_S = 0.02


def find_sound(
    path: Path,
    begins_s: Fraction | None = None,
    seconds: Fraction = _LONGEST_S,
    check: Check = go_on,
) -> Sound | None:
    """Finds and tries the sound of a video or sound file; None if it has none.

    `begins_s`, `seconds`: where the pictures start on the clock of the file (None: where the sound
    does), and how long they last. What is tried here is what `sound_output` asks for later. Raises
    `BadMedia` if it cannot be decoded.
    """
    check_file(path, "sound", LIMITS.max_video_bytes)
    source = [*SAFE_INPUT, "-i", file_url(path)]
    try:
        for track in _TRACKS:
            one = [*source, "-map", track, "-c", "copy", "-frames:a", "1"]
            if counted := list_streams(one, check=check)[0]:
                break
        else:
            log.info("%s has no sound", path.name)
            return None
        if begins_s is not None:
            begins_s -= clock_zero(source, track, counted[0], check)
        sound = Sound(path, track, begins_s or Fraction(0))
        attempt = [*sound_input(sound), *sound_output(sound, seconds), "-f", "null", "-"]
        with ffmpeg(attempt, cpu_s=_CPU_S, memory_bytes=_MEMORY_BYTES, check=check) as run:
            said = run.finish()
    except FfmpegFailed as error:
        reason = error.reason.replace(str(path.absolute()), path.name)
        raise BadMedia(f"The sound of {path.name} cannot be read: {reason}.") from error
    if said:
        log.info("%s: of its sound ffmpeg says: %s", path.name, said)
    return sound


def sound_input(sound: Sound) -> list[str]:
    """What makes ffmpeg read the sound."""
    return [*SAFE_INPUT, "-i", file_url(sound.path)]


def sound_output(sound: Sound, seconds: Fraction, place: int = 0) -> list[str]:
    """What makes ffmpeg encode exactly `seconds` of the sound, from its input number `place`."""
    begins_s, length_s = f"{float(sound.begins_s):.9f}", f"{float(seconds):.9f}"
    filters = [
        f"asetpts=round(PTS-{begins_s}/TB)",
        f"atrim=end={length_s}",  # what comes hours later would be waited for in silence
        f"aresample=async=1:min_hard_comp={_GAP_S}:first_pts=0",
        f"atrim=end={length_s}",
        f"apad=whole_dur={length_s}",
    ]
    track = f"{place}{sound.track.removeprefix('0')}"
    return ["-map", track, "-af", ",".join(filters), "-c:a", "aac", "-b:a", "192k"]
