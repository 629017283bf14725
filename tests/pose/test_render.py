"""The capsule renderer against the official frames and, on small canvases, sphere tracing."""

from pathlib import Path

import numpy as np
import pytest

from engine.golden import render as golden_render
from engine.pose.bones import PASTEL, SATURATED, SINGLE, Bones, bones, palettes
from engine.pose.camera import Camera, base_camera, camera_from_matrix
from engine.pose.joints import load_joints
from engine.pose.render import RADIUS, Depths, _capsules, _spans, depths, render

DANCE = Path(__file__).resolve().parents[2] / "engine" / "demo" / "dance.npz"
HEIGHT, WIDTH = 40, 56
CAMERA = Camera(fx=50.0, fy=44.0, cx=30.25, cy=18.5)
RED, BLUE = (1.0, 0.15, 0.15), (0.15, 0.15, 1.0)


# --- the slow, obvious version: docs/reference/pose.md 6.2 to 6.5, one step at a time, in float64


def trace(clip, camera, height, width, radius=21.5):
    ends = [z for frame in clip for z in (*frame.start[:, 2], *frame.end[:, 2])]
    return np.stack([trace_frame(f, camera, height, width, radius, ends) for f in clip])


def trace_frame(frame, camera, height, width, radius, ends):
    rows, columns = np.mgrid[:height, :width]
    ray = np.stack([(columns - camera.cx) / camera.fx, (rows - camera.cy) / camera.fy], -1)
    ray = np.concatenate([ray, np.ones((height, width, 1))], -1)
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    reach = max(min(max(ends), 25000), 10000)
    t, alive = np.full((height, width), 0.1), np.ones((height, width), bool)
    hit = ~alive
    for _ in range(300):
        away = np.min([off(b, frame, ray * t[..., None])[0] for b in range(len(frame.rgb))], 0)
        away -= radius
        hit |= alive & (away < 1e-3)
        alive &= ~hit & (t <= reach)
        t = np.where(alive, t + np.maximum(away, 1e-4), t)
    picture = np.zeros((height, width, 4), np.uint8)
    for y, x in np.argwhere(hit):
        picture[y, x] = shade(frame, ray[y, x], ray[y, x] * t[y, x], ends)
    return picture


def off(bone, frame, point):
    """Distance [...] and vector [..., 3] from the bone's axis to the point."""
    start, end = frame.start[bone].astype(np.float64), frame.end[bone].astype(np.float64)
    length = np.linalg.norm(end - start)
    unit = (end - start) / length if length >= 1e-8 else np.zeros(3)
    along = np.clip((point - start) @ unit, 0, length)
    vector = point - start - along[..., None] * unit
    return np.linalg.norm(vector, axis=-1), vector


def shade(frame, ray, point, ends):
    gaps = [off(bone, frame, point) for bone in range(len(frame.rgb))]
    nearest = min(gap for gap, _ in gaps)
    bone = next(b for b, (gap, _) in enumerate(gaps) if gap <= nearest + 2e-3)
    p, step = point.astype(np.float32), np.float32(1e-3)
    normal = gaps[bone][1] * ((p + step) - (p - step))
    normal = normal / np.linalg.norm(normal) if normal.any() else normal
    half = -ray - np.array([0, 0, 1])
    shine = max(normal @ half / np.linalg.norm(half), 0) ** 32
    near, far = max(min(ends), 0.1), min(max(ends) + 6000, 20000)
    fade = np.clip(1 - (point[2] - near) / (far - 0.1), 0, 1)
    rgb = frame.rgb[bone] * (0.3 + 0.7 * max(-normal[2], 0)) * fade + 0.5 * shine * fade
    return (*(np.clip(rgb, 0, 1) * 255), 204)


# --- scenes


def scene(*capsules):
    """(start, end, rgb) of each bone."""
    start, end, rgb = (np.array(column, np.float32) for column in zip(*capsules))
    return Bones(start, end, rgb)


def random_scene(seed, count=7):
    rng = np.random.default_rng(seed)
    middle = rng.uniform((-250, -200, 350), (250, 200, 900), (count, 3))
    reach = rng.uniform(-150, 150, (count, 3))
    start, end = (middle + reach).astype(np.float32), (middle - reach).astype(np.float32)
    return Bones(start, end, rng.uniform(0.15, 1, (count, 3)).astype(np.float32))


SCENES = {
    "a sphere": scene(((20, 10, 300), (20, 10, 300), RED)),
    "away from the camera": scene(((30, -20, 300), (35, -25, 900), RED)),
    "towards the camera": scene(((30, -20, 900), (35, -25, 100), RED)),
    "through the camera plane": scene(((60, 60, -200), (40, 40, 400), RED)),
    "past the camera": scene(((50, 0, -300), (45, 5, -30), RED), ((0, 0, 400), (90, 0, 400), BLUE)),
    "level": scene(((-120, 30, 400), (120, 30, 400), RED)),
    "upright": scene(((10, -90, 400), (10, 90, 400), RED)),
    "crossing": scene(
        ((-90, -90, 400), (90, 90, 440), RED), ((-90, 90, 440), (90, -90, 400), BLUE)
    ),
    "larger than the picture": scene(((-900, 10, 160), (900, -10, 160), RED)),
    "outside the picture": scene(((900, 0, 300), (990, 0, 300), RED)),
}  # fmt: skip


def draw(clip, camera=CAMERA, height=HEIGHT, width=WIDTH, **options):
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        return np.stack(list(render(clip, camera, height, width, **options)))


def assert_same_picture(got, want):
    """Up to rays that graze a bone, and places where two bones are equally near."""
    covered = max((want[..., 3] > 0).sum(), 1)
    extra, lost = got[..., 3] > want[..., 3], got[..., 3] < want[..., 3]
    assert lost.sum() <= 1
    assert extra.sum() <= 1 + 0.01 * covered  # a traced ray along a bone gives up after 300 steps
    differ = extra | lost
    levels = np.abs(got[..., :3].astype(int) - want[..., :3])[~differ].max(axis=-1)
    assert (levels > 8).sum() <= 0.01 * covered
    assert (levels > 1).sum() <= 0.02 * covered


@pytest.mark.parametrize("name", SCENES)
def test_a_bone_in_any_place_looks_as_if_sphere_traced(name):
    clip = [SCENES[name]]
    assert_same_picture(draw(clip), trace(clip, CAMERA, HEIGHT, WIDTH))


@pytest.mark.parametrize("seed", range(2))
def test_many_bones_look_as_if_sphere_traced(seed):
    clip = [random_scene(seed)]
    want = trace(clip, CAMERA, HEIGHT, WIDTH)
    assert (want[..., 3] > 0).mean() > 0.2
    assert_same_picture(draw(clip), want)


def test_rays_end_at_ten_metres_or_at_the_farthest_bone():
    camera = Camera(fx=1500.0, fy=1500.0, cx=-60.0, cy=20.0)
    clip = [scene(((500, 0, 12000), (900, 0, 12000), RED))]  # 900 mm aside is 12.03 m away
    got, want = draw(clip, camera), trace(clip, camera, HEIGHT, WIDTH)
    assert want[0, 20, 10, 3] == 204
    assert not want[0, :, 35:].any()
    assert_same_picture(got, want)


def test_a_camera_inside_a_bone_sees_its_colour_everywhere():
    around = scene(((-50, 5, 3), (50, 4, -2), RED), ((0, 0, 300), (0, 0, 400), BLUE))
    got = draw([around])
    assert (got[..., 3] == 204).all()
    assert_same_picture(got, trace([around], CAMERA, HEIGHT, WIDTH))


def test_a_camera_on_the_axis_of_a_bone_sees_it_without_a_normal():
    along = [scene(((0, 0, -50), (0, 0, 50), RED))]
    got = draw(along, Camera(50.0, 50.0, 20.0, 20.0))
    fade = 1 - (0.1 - 0.1) / (50 + 6000 - 0.1)
    assert tuple(got[0, 20, 20]) == (int(1.0 * 0.3 * fade * 255), int(0.15 * 0.3 * 255), 11, 204)
    assert (got[..., 3] == 204).all()


def test_bones_behind_the_camera_are_not_seen():
    behind = scene(((0, 0, -300), (10, 0, -30), RED))
    assert not draw([behind]).any()


def test_of_two_bones_in_the_same_place_the_first_shows():
    place = ((-100, 0, 500), (100, 20, 450))
    red, both = scene((*place, RED)), scene((*place, RED), (*place, BLUE))
    assert np.array_equal(draw([both]), draw([red]))
    assert draw([red])[..., 0].max() > 100


def test_a_window_of_a_large_picture_shows_what_the_picture_shows_there():
    clip = [SCENES["through the camera plane"], random_scene(7)]  # 1: more pairs than one portion
    whole = draw(clip, Camera(300.0, 280.0, 160.0, 150.0), 300, 320)
    window = draw(clip, Camera(300.0, 280.0, 60.0, 100.0), 150, 220)
    assert (whole[0, ..., 3] > 0).mean() > 0.05
    assert np.array_equal(whole[:, 50:200, 100:320], window)


def test_frames_do_not_see_each_other_and_frames_without_bones_are_black():
    one, empty = random_scene(1), bones(np.zeros((1, 24, 3), np.float32), palettes(1))
    frames = draw([one, empty, one, one])
    assert not frames[1].any()
    assert np.array_equal(frames[0], frames[2])
    assert np.array_equal(frames[0], frames[3])
    assert frames[0].any()


def test_a_clip_without_bones_is_black():
    empty = bones(np.zeros((0, 24, 3), np.float32), palettes(0))
    assert depths([empty]) is None
    assert not draw([empty, empty]).any()


def test_part_of_a_clip_keeps_the_brightness_of_the_whole():
    clip = [random_scene(2), scene(((0, 0, 9000), (10, 0, 3000), RED)), random_scene(3)]
    assert depths([clip[1]]) == Depths(3000, 9000)
    whole, part = draw(clip), draw(clip[2:], within=depths(clip))
    assert np.array_equal(part[0], whole[2])
    assert not np.array_equal(draw(clip[2:])[0], whole[2])
    assert draw(clip[2:], within=Depths(100.0, 9000.0))[0, ..., 3].any()


# --- joints to bones


def person(seed=0, count=1):
    rng = np.random.default_rng(seed)
    place = rng.uniform((-400, -800, 2500), (400, 800, 3500), (count, 24, 3))
    return place.astype(np.float32)


@pytest.mark.parametrize(
    "missing",
    [(0, 0, 0), (3, 4, -7), (np.nan, 1, 2), (np.inf, 1, 2), (1e20, 1, 2)],
    ids=["zero", "sum is zero", "NaN", "infinite", "absurd"],
)
def test_a_bone_with_a_missing_end_is_left_out(missing):
    joints = person()
    joints[0, 18] = missing  # left elbow: bones 4 and 5
    got, whole = bones(joints, palettes(1)), bones(person(), palettes(1))
    kept = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12]
    assert np.array_equal(got.start, whole.start[kept])
    assert np.array_equal(got.end, whole.end[kept])
    assert np.array_equal(got.rgb, whole.rgb[kept])


def test_a_joint_that_no_bone_uses_does_not_matter():
    joints = person()
    joints[0, [0, 3, 22, 23]] = np.nan
    assert np.array_equal(bones(joints, palettes(1)).start, bones(person(), palettes(1)).start)


def test_persons_are_drawn_in_order_with_their_palettes():
    got = bones(person(count=3), palettes(3))
    assert np.array_equal(got.rgb, np.concatenate([PASTEL, SATURATED, PASTEL]))
    assert np.array_equal(got.start[13:26], bones(person(count=3)[1:2], palettes(1)).start)
    assert np.array_equal(bones(person(), palettes(1)).rgb, SINGLE)
    assert np.allclose(SINGLE[1], (255 / 300 + 0.15, 85 / 300 + 0.15, 0.15))


def test_the_base_camera_spans_55_degrees_over_the_longer_side():
    for height, width, focal in ((512, 896, 860.59999), (672, 416, 645.44999), (336, 208, 322.725)):
        camera = base_camera(height, width)
        assert camera.fx == camera.fy == pytest.approx(focal, abs=1e-5)
        assert (camera.cx, camera.cy) == (width / 2, height / 2)
        assert camera_from_matrix(camera.matrix) == camera


# --- goldens


def recognised(folder):
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as file:
            if golden_render.recognises(frozenset(file.files), {}):
                yield path


@pytest.mark.golden
def test_official_frames_are_met_within_the_limits(golden):
    found = [check for path in recognised(golden) for check in golden_render.checks(path)]
    assert len(found) > 40
    assert [check for check in found if not check.ok] == []


def darker(arrays):
    frames = arrays["frames_rgba"].astype(int)
    frames[..., :3] = np.maximum(frames[..., :3] - 3, 0)
    return {"frames_rgba": frames.astype(np.uint8)}


DAMAGES = {
    "moved by a pixel": lambda a: {"frames_rgba": np.roll(a["frames_rgba"], 1, axis=2)},
    "three levels darker": darker,
    "other alpha": lambda a: {"frames_rgba": a["frames_rgba"] - (a["frames_rgba"] == 204)},
    "a frame less": lambda a: {"frames_rgba": a["frames_rgba"][1:]},
    "other camera": lambda a: {"K": a["K"] + np.eye(3)[[0, 2, 1]] * [2.0, 0, 0]},
    "thinner": lambda a: {"radius": a["radius"] - 0.5},
    "joint moved": lambda a: {"joints": a["joints"] + np.float32(0.01)},
    "other colour": lambda a: {"cyl_rgba": a["cyl_rgba"] * np.float32(0.99)},
}  # fmt: skip


@pytest.mark.golden
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_golden_file_is_noticed(golden, tmp_path, damage):
    source = min(recognised(golden), key=lambda path: path.stat().st_size)
    with np.load(source) as file:
        arrays = dict(file)
    np.savez(tmp_path / "damaged.npz", **arrays | DAMAGES[damage](arrays))
    assert not all(check.ok for check in golden_render.checks(tmp_path / "damaged.npz"))


@pytest.mark.golden
def test_a_wrong_pixel_of_the_overlay_is_noticed(golden, tmp_path):
    for source in recognised(golden):
        with np.load(source) as file:
            arrays = dict(file)
        if "frames_rgba_with2d" in arrays:
            arrays["frames_rgba_with2d"][0, 0, 0, 0] ^= 1
            np.savez(tmp_path / "damaged.npz", **arrays)
            wrong = [c for c in golden_render.checks(tmp_path / "damaged.npz") if not c.ok]
            assert [check.error for check in wrong] == [1.0]
            return
    pytest.fail("no golden file with an overlay")


@pytest.mark.parametrize(
    ("persons", "height", "width"), [(1, 512, 896), (1, 336, 208), (2, 512, 896)]
)
def test_few_rays_are_solved_for_each_pixel_that_a_bone_covers(persons, height, width):
    apart = np.array([[300.0 * number, 0, 1500] for number in range(persons)])
    clip = load_joints(DANCE).joints[::16, :1] + apart[:, None]
    clip = [bones(frame, palettes(persons)) for frame in clip.astype(np.float32)]
    camera = base_camera(height, width)
    covered = sum((frame[..., 3] > 0).sum() for frame in render(clip, camera, height, width))
    solved = sum(
        _spans(_capsules(frame).exact, camera, RADIUS, height, width).width.sum() for frame in clip
    )
    assert covered < solved < 3 * covered  # bones overlap at joints, and spans are a pixel wider
