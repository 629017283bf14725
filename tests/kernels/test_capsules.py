"""The capsule rasteriser in the interpreter, against the renderer of the engine and its reference.

The limits are those of docs/reference/pose.md 9, which hold between any renderer and the official
one.
"""

import numpy as np
import pytest
import torch

from engine.golden import render as golden_render
from engine.pose.bones import Bones, bones, palettes
from engine.pose.camera import Camera, base_camera, camera_from_matrix
from engine.pose.render import depths, render
from kernels.arch import ARCHS, SM90
from kernels.capsules import Skeletons, View, capsules, capsules_reference
from kernels.spec import KernelError
from tests.support.interpreter import InterpretedBank

BANK = InterpretedBank(SM90, BLOCK=8192)  # few programs: the interpreter's time goes by operations
RED, BLUE = (1.0, 0.15, 0.15), (0.15, 0.15, 1.0)
CAMERA = Camera(fx=50.0, fy=44.0, cx=30.25, cy=18.5)


def skeletons(clip, spare=0):
    """Padding has values that would be seen if they were read as bones."""
    most = max(len(frame.rgb) for frame in clip) + spare
    padded = {name: np.ones((len(clip), most, 3), np.float32) for name in ("start", "end", "rgb")}
    for at, frame in enumerate(clip):
        for name, values in padded.items():
            values[at, : len(frame.rgb)] = getattr(frame, name)
    count = torch.tensor([len(frame.rgb) for frame in clip], dtype=torch.int32)
    return Skeletons(**{k: torch.from_numpy(v) for k, v in padded.items()}, count=count)


def view(clip, camera, height, width, **options):
    found = depths(clip)
    near, far = (found.nearest, found.farthest) if found else (0.0, 0.0)
    return View(height, width, camera.fx, camera.fy, camera.cx, camera.cy, near, far, **options)


def draw(clip, camera, height, width, how=None, spare=0, **options):
    how = how or (lambda *scene: capsules(BANK, *scene))
    return how(skeletons(clip, spare), view(clip, camera, height, width, **options)).numpy()


def engine(clip, camera, height, width):
    return np.stack(list(render(clip, camera, height, width)))


def assert_same_picture(got, want, edges=1):
    """The limits of docs/reference/pose.md 9; a tiny picture may lose `edges` pixels at its
    outlines."""
    covered = int(((got[..., 3] > 0) | (want[..., 3] > 0)).sum())
    assert set(np.unique(got[..., 3])) <= {0, 204}
    assert (got[..., 3] != want[..., 3]).sum() <= max(edges, 0.001 * covered)
    both = (got[..., 3] > 0) & (want[..., 3] > 0)
    levels = np.abs(got[..., :3].astype(int) - want[..., :3])[both].max(axis=-1)
    assert (levels > 8).sum() <= 0.01 * covered
    close = levels[levels <= 8]
    assert np.quantile(close, 0.99) <= 2
    assert close.mean() <= 0.3
    mean_square = ((got[..., :3].astype(float) - want[..., :3]) ** 2).mean()
    assert mean_square <= 255**2 / 10**4.7  # 47 dB


def scene(*capsules):
    start, end, rgb = (np.array(column, np.float32) for column in zip(*capsules))
    return Bones(start, end, rgb)


def crowd(seed, count=7):
    rng = np.random.default_rng(seed)
    middle = rng.uniform((-250, -200, 350), (250, 200, 900), (count, 3))
    reach = rng.uniform(-150, 150, (count, 3))
    start, end = (middle + reach).astype(np.float32), (middle - reach).astype(np.float32)
    return Bones(start, end, rng.uniform(0.15, 1, (count, 3)).astype(np.float32))


SCENES = {
    "a sphere": scene(((20, 10, 300), (20, 10, 300), RED)),
    "away from the camera": scene(((30, -20, 300), (35, -25, 900), RED)),
    "towards the camera": scene(((30, -20, 900), (35, -25, 100), RED)),
    "along the rays": scene(((-5, 10, 300), (-15, 30, 900), RED)),
    "through the camera plane": scene(((60, 60, -200), (40, 40, 400), RED)),
    "past the camera": scene(((50, 0, -300), (45, 5, -30), RED), ((0, 0, 400), (90, 0, 400), BLUE)),
    "level": scene(((-120, 30, 400), (120, 30, 400), RED)),
    "crossing": scene(
        ((-90, -90, 400), (90, 90, 440), RED), ((-90, 90, 440), (90, -90, 400), BLUE)
    ),
    "larger than the picture": scene(((-900, 10, 160), (900, -10, 160), RED)),
    "the camera inside": scene(((-50, 5, 3), (50, 4, -2), RED), ((0, 0, 300), (0, 0, 400), BLUE)),
    "many": crowd(1),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("how", [None, capsules_reference], ids=["kernel", "reference"])
def test_a_bone_in_any_place_looks_as_the_engine_draws_it(name, how):
    clip = [SCENES[name]]
    got, want = (f(clip, CAMERA, 39, 57) for f in (lambda *a: draw(*a, how=how), engine))
    assert (want[..., 3] > 0).any()
    assert_same_picture(got, want)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_the_kernel_is_tuned_for_every_architecture(arch):
    bank = InterpretedBank(arch)
    got = draw([SCENES["many"]], CAMERA, 8, 16, how=lambda *scene: capsules(bank, *scene))
    assert_same_picture(got, engine([SCENES["many"]], CAMERA, 8, 16))


@pytest.mark.parametrize("block", [128, 1024])
def test_the_size_of_a_tile_does_not_show(block):
    bank = InterpretedBank(SM90, BLOCK=block)
    clip = [crowd(2), crowd(3, count=4)]
    got = draw(clip, CAMERA, 17, 31, how=lambda *scene: capsules(bank, *scene))
    assert np.array_equal(got, draw(clip, CAMERA, 17, 31))
    assert got.any()


def test_frames_do_not_see_each_other_nor_the_padding():
    empty = Bones(*(np.zeros((0, 3), np.float32) for _ in range(3)))
    clip = [crowd(4), empty, SCENES["larger than the picture"]]
    got = draw(clip, CAMERA, 20, 30, spare=3)
    assert_same_picture(got, engine(clip, CAMERA, 20, 30))
    assert not got[1].any()
    assert got[0].any()
    assert got[2].any()


@pytest.mark.parametrize("how", [None, capsules_reference], ids=["kernel", "reference"])
def test_a_clip_without_bones_is_black(how):
    empty = bones(np.zeros((0, 24, 3), np.float32), palettes(0))
    assert not draw([empty, empty], CAMERA, 9, 11, how=how).any()


def test_brightness_follows_the_depths_of_the_whole_clip():
    clip = [crowd(5), scene(((0, 0, 9000), (10, 0, 3000), RED))]
    whole, alone = draw(clip, CAMERA, 20, 30)[0], draw(clip[:1], CAMERA, 20, 30)[0]
    assert_same_picture(whole[None], engine(clip, CAMERA, 20, 30)[:1])
    assert not np.array_equal(whole, alone)


def test_a_camera_on_the_axis_of_a_bone_sees_it_without_a_normal():
    along = [scene(((0, 0, -50), (0, 0, 50), RED))]
    got = draw(along, Camera(50.0, 50.0, 20.0, 20.0), 40, 40)
    assert tuple(got[0, 20, 20]) == (76, int(0.15 * 0.3 * 255), 11, 204)
    assert (got[..., 3] == 204).all()


def test_of_two_bones_in_the_same_place_the_first_shows():
    place = ((-100, 0, 500), (100, 20, 450))
    both = [scene((*place, RED), (*place, BLUE))]
    assert np.array_equal(draw(both, CAMERA, 30, 40), draw([scene((*place, RED))], CAMERA, 30, 40))


def golden_clips(folder):
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as file:
            if golden_render.recognises(frozenset(file.files), {}):
                yield dict(file)


@pytest.mark.golden
def test_the_smallest_golden_frames_are_met_within_the_limits(golden):
    arrays = min(golden_clips(golden), key=lambda arrays: arrays["frames_rgba"][0].size)
    want = arrays["frames_rgba"]
    cuts = np.cumsum(arrays["cyl_count"])[:-1]
    columns = arrays["cyl_start"], arrays["cyl_end"], arrays["cyl_rgba"][:, :3]
    clip = [Bones(*frame) for frame in zip(*(np.split(column, cuts) for column in columns))]
    whole = skeletons(clip)
    some = slice(None, None, max(1, len(clip) // 3))
    parts = (whole.start[some], whole.end[some], whole.rgb[some], whole.count[some])
    shown = Skeletons(*(part.contiguous() for part in parts))
    look = view(
        clip, camera_from_matrix(arrays["K"]), *want.shape[1:3], radius=float(arrays["radius"])
    )
    bank = InterpretedBank(SM90, BLOCK=1 << (look.height * look.width - 1).bit_length())
    got = capsules(bank, shown, look).numpy()
    assert [c for c in golden_render.frame_checks("", got, want[some]) if not c.ok] == []
    assert (got[..., 3] > 0).any(axis=(1, 2)).all()


@pytest.mark.golden
@pytest.mark.parametrize("persons", [1, 2])
def test_golden_dancers_on_a_small_canvas_look_as_the_engine_draws_them(golden, persons):
    joints = next(arrays["joints"] for arrays in golden_clips(golden) if "joints" in arrays)
    one = joints[3:4, :1].astype(np.float32)
    joints = np.concatenate([one + 250 * person for person in range(persons)], axis=1)
    clip = [bones(frame, palettes(persons)) for frame in joints]
    camera = base_camera(96, 63)
    got, want = draw(clip, camera, 96, 63), engine(clip, camera, 96, 63)
    assert (want[..., 3] > 0).sum() > 100
    assert_same_picture(got, want)
    assert_same_picture(draw(clip, camera, 96, 63, how=capsules_reference), want)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("start", torch.zeros(1, 3, 4), r"start \[1, 3, 3\] fp32, got \[1, 3, 4\]"),
        ("end", torch.zeros(1, 2, 3), r"end \[1, 3, 3\] fp32, got \[1, 2, 3\]"),
        ("rgb", torch.zeros(1, 3, 3).double(), "got .* torch.float64"),
        ("count", torch.zeros(2, dtype=torch.int32), r"count \[1\], got \[2\]"),
        ("count", torch.zeros(1), r"argument 1 \(\*i32\): the tensor is torch.float32"),
    ],
)
def test_tensors_of_another_shape_or_type_are_refused(field, value, message):
    fields = {name: torch.zeros(1, 3, 3) for name in ("start", "end", "rgb")}
    fields |= {"count": torch.zeros(1, dtype=torch.int32), field: value}
    with pytest.raises(KernelError, match=message):
        capsules(BANK, Skeletons(**fields), View(8, 8, 9.0, 9.0, 4.0, 4.0, 100.0, 200.0))


def test_a_picture_too_large_for_the_grid_is_refused():
    clip = [SCENES["a sphere"]]
    with pytest.raises(KernelError, match=r"outside 1\.\.65535"):
        capsules(InterpretedBank(SM90, BLOCK=1), skeletons(clip), view(clip, CAMERA, 256, 257))
