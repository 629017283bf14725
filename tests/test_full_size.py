"""Jobs of the real size with random weights; slow. Times are printed and not asserted."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.media.video import probe_video
from tests.support.measured import run_measured

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30

LAYERS = 40
FREE_BYTES = 25e9  # the weights, and one layer to build them from
MOST_BYTES, MOST_MEMORY_GB = 17e9, 3.0


def generate(golden, folder, name):
    """Runs the command as a user would; returns its seconds and its peak memory in bytes."""
    example, tiny = golden / "examples" / "001", demo_weights(state_dir())
    command = [
        sys.executable, "-m", "engine", "generate", "--image", example / "ref.jpg",
        "--pose", example / "rendered.mp4", "--checkpoint", tiny.checkpoint,
        "--models", tiny.models, "--width", 896, "--height", 512, "--steps", 4, "--cfg", 1,
        "--out", folder / f"{name}.mp4", "--stages", folder / name,
    ]  # fmt: skip
    start = time.monotonic()
    peak_bytes, _ = run_measured(command, ROOT)
    return time.monotonic() - start, peak_bytes


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.timeout(3600)
def test_the_example_renders_in_4_gib_and_the_same_twice(golden, tmp_path):
    for name in ("first", "again"):
        seconds, peak_bytes = generate(golden, tmp_path, name)
        print(f"{name}: {seconds:.0f} s, {peak_bytes / GIB:.2f} GiB")
        info = probe_video(tmp_path / f"{name}.mp4")
        assert (info.width, info.height, info.frames, info.fps) == (896, 512, 65, 16)
        assert peak_bytes < 4 * GIB
    first, again = (load_file(tmp_path / n / "latents.safetensors") for n in ("first", "again"))
    assert torch.equal(first["latents"], again["latents"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_layers_are_built_in_17_gb_and_3_gb_of_memory(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < FREE_BYTES:
        pytest.skip(f"{free / 1e9:.0f} GB of disk are free, {FREE_BYTES / 1e9:.0f} are needed")
    command = [sys.executable, "-m", "tests.support.synthetic", str(tmp_path)]
    peak_bytes, said = run_measured(command, ROOT)
    shutil.rmtree(tmp_path)  # 1.3 GB of a layer: pytest keeps folders
    found = json.loads(next(line for line in said.splitlines() if line.startswith('{"weights"')))
    print(f"{found}, {peak_bytes / 1e9:.2f} GB of memory")
    assert found["layers"] == LAYERS
    assert 16e9 < found["bytes"] <= MOST_BYTES
    assert peak_bytes <= MOST_MEMORY_GB * 1e9
