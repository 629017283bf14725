"""The main job at its real size with the tiny weights: slow, so not part of `make test`."""

import os
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from engine.media.video import probe_video

SECONDS = 300
GIB = 2**30


def generate(golden, folder, name):
    """Runs the command as a user would; returns its seconds and its peak memory in bytes."""
    example = golden / "examples" / "001"
    command = [
        sys.executable, "-m", "engine", "generate", "--image", example / "ref.jpg",
        "--pose", example / "rendered.mp4", "--out", folder / f"{name}.mp4",
        "--stages", folder / name,
    ]  # fmt: skip
    start = time.monotonic()
    child = os.posix_spawn(sys.executable, [str(part) for part in command], os.environ)
    _, status, usage = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return time.monotonic() - start, usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.timeout(2 * SECONDS + 120)
def test_the_example_renders_in_time_and_memory_and_the_same_twice(golden, tmp_path):
    for name in ("first", "again"):
        seconds, peak_bytes = generate(golden, tmp_path, name)
        info = probe_video(tmp_path / f"{name}.mp4")
        assert (info.width, info.height, info.frames, info.fps) == (896, 512, 65, 16)
        assert seconds < SECONDS
        assert peak_bytes < 4 * GIB
        print(f"{name}: {seconds:.0f} s, {peak_bytes / GIB:.2f} GiB")
    first, again = (load_file(tmp_path / n / "latents.safetensors") for n in ("first", "again"))
    assert torch.equal(first["latents"], again["latents"])
