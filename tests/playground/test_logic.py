"""What the page works out by itself, asked of its modules in node: orders, framing, words."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from engine.media.framing import crop_image

JS = Path(__file__).resolve().parents[2] / "engine" / "playground" / "js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no node here, which runs JavaScript")

INFO = """{ models: [{ name: "scail2", available: true, modes: ["animation", "replacement"],
  takes_masks: true, takes_who: true, framings: ["auto", "as-is"], segments: ["even", "cover"],
  max_persons: 6,
  presets: [{ name: "turbo", available: false, input: { recipe: "turbo" }, steps: 6, cfg: 1 },
            { name: "official", available: true, input: { recipe: "official" }, cfg: 5 }],
  sizes: [{ width: 896, height: 512 }, { width: 512, height: 896 }] }], features: [] }"""
STATE = (
    """{ info: INFO, model: "scail2", preset: null, kept: {}, size: null, mode: null,
  segments: null, framing: null, who: [], picture: { medium: "upload:a", field: "image_path" },
  motion: { medium: "upload:b", field: "video_path" }, pictureMask: null, motionMask: null,
  pictureShape: { width: 600, height: 800 }, frames: null, seed: 7, prompt: "", persons: 1,
  fps: null, fit: "crop", audio: true, isSkeleton: false }"""
).replace("INFO", INFO)


def asked(module, expression):
    """Returns what an expression over a module's names is, as JSON."""
    program = f"""
    import * as it from "{(JS / module).as_uri()}";
    const state = {STATE};
    console.log(JSON.stringify({expression}));
    """
    told = subprocess.run(
        [NODE, "--input-type=module"], input=program.encode(), capture_output=True, check=True
    )
    return json.loads(told.stdout)


def test_an_order_says_what_was_chosen_and_no_more():
    assert asked("order.js", "it.orderOf(state)") == {
        "model": "scail2",
        "input": {
            "image_path": "upload:a", "video_path": "upload:b", "recipe": "official", "seed": 7,
            "width": 512, "height": 896, "output": "url",
        },
    }  # fmt: skip


def test_an_order_has_every_setting_that_is_not_the_usual_one():
    chosen = """{ ...state, mode: "replacement", segments: "cover", framing: "as-is", persons: 2,
      who: [2, 1], frames: 49, fps: 12.5, fit: "resize", audio: false, isSkeleton: true,
      prompt: "she dances", size: { width: 320, height: 256 },
      motionMask: { medium: "upload:c", field: "mask_path" } }"""
    assert asked("order.js", f"it.orderOf({chosen}, 'validate').input") == {
        "image_path": "upload:a", "pose_video_path": "upload:b", "mask_path": "upload:c",
        "recipe": "official", "seed": 7, "width": 320, "height": 256, "frames": 49,
        "prompt": "she dances", "persons": 2, "fps": 12.5, "fit": "resize", "audio": False,
        "mode": "replacement", "framing": "as-is", "who": "2,1", "segments": "cover",
        "output": "url", "action": "validate",
    }  # fmt: skip


def test_settings_that_come_back_are_sent_again_as_they_were():
    """Those that the page has no field for too, and figures that are not the preset's."""
    sent = {
        "recipe": "official", "cfg": 3, "seed": 11, "width": 320, "height": 256, "frames": 49,
        "prompt": "a <b>", "negative_prompt": "", "audio": False, "who": "2,1", "persons": 2,
    }  # fmt: skip
    back = f"{{ ...state, ...it.stateOf({json.dumps(sent)}, state.info.models[0]) }}"
    assert asked("order.js", f"it.settingsOf({back})") == sent


@pytest.mark.parametrize(
    ("picture", "size"), [((600, 800), (512, 896)), ((800, 400), (96, 160)), ((96, 160), (320, 96))]
)
def test_the_window_is_what_the_engine_crops(picture, size):
    """A picture whose pixels say where they are comes back cropped to the window."""
    (width, height), (wide, tall) = picture, size
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 1, width)[None].expand(height, width)
    seen = crop_image(torch.stack([rows, columns, rows]), (tall, wide))
    found = asked(
        "framing.js",
        f"it.windowOf({{ width: {width}, height: {height} }},"
        f'{{ width: {wide}, height: {tall} }}, "crop")',
    )
    for share, values in ((found["tall"], seen[0]), (found["wide"], seen[1])):
        assert float(values.max() - values.min()) == pytest.approx(share, abs=0.03)
        assert float(values.mean()) == pytest.approx(0.5, abs=0.01)  # in the middle


def test_numbers_are_written_as_people_read_them():
    assert asked("words.js", "[0.84, 14.2, 185, 4320, null].map(it.duration)") == [
        "0.8 s", "14 s", "3 min 05 s", "1 h 12 min", "\u2013"
    ]  # fmt: skip
    assert asked("words.js", "[0, 812345, 2.1e9, 999700].map(it.bytes)") == [
        "0 B", "812 kB", "2.1 GB", "1.0 MB"
    ]  # fmt: skip
    assert asked("words.js", "[it.cost(310, 0.69), it.cost(1, 0.5)]") == ["0.059", "< 0.001"]
    assert asked("words.js", "[it.clock(63.24), it.counted(1, 'clip'), it.counted(7, 'clip')]") == [
        "1:03.2", "1 clip", "7 clips"
    ]  # fmt: skip


def test_a_seed_is_one_that_both_sides_hold_exactly():
    seeds = asked("settings.js", "Array.from({ length: 200 }, () => it.drawSeed())")
    assert all(isinstance(seed, int) and 0 <= seed < 2**53 for seed in seeds)
    assert max(seeds) > 2**50
