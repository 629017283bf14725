"""Mask files of every kind: whose colour each pixel gets, and what is no mask."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import BadMedia
from engine.flow import go_on
from engine.masks.cleaning import BACKGROUND, Scale, clean
from engine.masks.colours import BLACK, BLUE, CLASSES, WHITE, paint
from engine.masks.stored import open_mask
from tests.support.mask_scenes import PICTURES, VIDEOS, colours, labels, write_video

PAIRS = [
    ("blue", "red"),
    ("red", "green"),
    ("green", "magenta"),
    ("magenta", "cyan"),
    ("cyan", "yellow"),
]


@pytest.fixture(scope="module")
def dancers():
    return labels(2)


def read(path):
    stored = open_mask(path)
    frames = torch.stack(list(stored.frames(range(stored.count), go_on)))
    return clean(frames, path.name)


def write(folder, kind, frames):
    if kind in VIDEOS:
        suffix, options, _ = VIDEOS[kind]
        return write_video(folder / f"mask{suffix}", frames, options), frames
    suffix, options, _ = PICTURES[kind]
    Image.fromarray(frames[0].numpy()).save(folder / f"mask{suffix}", **options)
    return folder / f"mask{suffix}", frames[:1]


def numbers(frames):
    return (frames > 127).int() @ torch.tensor([1, 2, 4], dtype=torch.int32)


def lowest_iou(got, wanted):
    """The lowest over the colours; and no colour may be there that is not wanted."""
    present = wanted.unique().tolist()
    assert set(got.unique().tolist()) <= set(present)
    return min(
        (((got == n) & (wanted == n)).sum() / ((got == n) | (wanted == n)).sum()).item()
        for n in present
    )


def check_file(folder, kind, frames):
    path, written = write(folder, kind, frames)
    assert lowest_iou(read(path), numbers(written)) >= (VIDEOS | PICTURES)[kind][2]


@pytest.mark.parametrize("kind", VIDEOS | PICTURES)
def test_every_kind_of_file_keeps_its_persons(tmp_path, dancers, kind):
    check_file(tmp_path, kind, colours(dancers, ("green", "magenta"), WHITE))


@pytest.mark.slow
@pytest.mark.parametrize("ground", [BLACK, WHITE])
@pytest.mark.parametrize("kind", VIDEOS | PICTURES)
def test_every_kind_of_file_keeps_persons_of_all_colours(tmp_path, kind, ground):
    for pair in PAIRS:
        check_file(tmp_path, kind, colours(labels(5), pair, ground))


def test_by_the_threshold_of_the_network_the_same_files_would_lose_their_edges(tmp_path, dancers):
    path, frames = write(tmp_path, "H.264 4:2:0 crf 32", colours(dancers, ("blue", "red"), BLACK))
    stored = torch.stack(list(open_mask(path).frames(range(len(frames)), go_on)))
    by_threshold = (stored > 225).int() @ torch.tensor([1, 2, 4], dtype=torch.int32)
    wanted = numbers(frames)
    kept = (by_threshold == BLUE) & (wanted == BLUE)
    assert kept.sum() / (wanted == BLUE).sum() < 0.95


def test_six_persons_are_told_apart(tmp_path):
    names = ("blue", "red", "green", "magenta", "cyan", "yellow")
    frames = colours(labels(3, persons=6), names, WHITE)
    path, _ = write(tmp_path, "H.264 4:2:0 crf 18", frames)
    assert lowest_iou(read(path), numbers(frames)) >= 0.97


@pytest.mark.parametrize(("height", "width"), [(96, 160), (256, 448), (1080, 1920)])
def test_small_and_large_files_get_no_alien_colour(tmp_path, height, width):
    frames = colours(labels(2, height, width), ("red", "green"), WHITE)
    path, _ = write(tmp_path, "H.264 4:2:0 crf 32", frames)
    assert lowest_iou(read(path), numbers(frames)) >= 0.85


def test_an_area_is_measured_at_the_size_of_the_file():
    assert Scale.of(512, 896) == Scale(eroded=5, least=16)
    assert Scale.of(1280, 704) == Scale(eroded=7, least=30)
    assert Scale.of(1080, 1920) == Scale(eroded=11, least=71)
    assert Scale.of(96, 160) == Scale(eroded=3, least=4)


def test_a_colour_counts_if_one_frame_shows_an_area_of_it():
    frames = torch.zeros(3, 512, 512, 3, dtype=torch.uint8)
    frames[:, 100:200, 100:200, 2] = 255
    frames[1, 300:308, 300:308, 0] = 255  # 4 x 4 are left
    assert clean(frames, "mask").unique().tolist() == [BLACK, 1, BLUE]
    frames[1, 307] = 0  # 3 x 4
    assert clean(frames, "mask").unique().tolist() == [BLACK, BLUE]


def test_pixels_take_the_nearest_colour_that_is_there():
    frames = torch.zeros(1, 512, 512, 3, dtype=torch.uint8)
    frames[:, :, :200] = torch.tensor([0, 0, 255], dtype=torch.uint8)
    frames[:, :, 200:202] = torch.tensor([0, 160, 200], dtype=torch.uint8)  # rounds to cyan
    frames[:, :, 202:204] = torch.tensor([0, 140, 20], dtype=torch.uint8)  # rounds to green
    got = clean(frames, "mask")[0, 0, 198:206].tolist()
    assert got == [BLUE] * 4 + [BLACK] * 4


def test_a_photograph_is_refused():
    draw = torch.rand(1, 3, 12, 16)
    photo = torch.nn.functional.interpolate(draw, (384, 512), mode="bicubic").clamp(0, 1) * 255
    with pytest.raises(BadMedia, match=r"photo\.jpg is no mask: \d+% of its pixels"):
        clean(photo.permute(0, 2, 3, 1).to(torch.uint8), "photo.jpg")


@pytest.mark.golden
def test_the_pictures_of_the_examples_are_refused(golden):
    paths = sorted((golden / "examples").glob("*/ref*.*"))
    assert paths
    for path in paths:
        with pytest.raises(BadMedia, match="is no mask"):
            read(path)


@pytest.mark.parametrize(("share", "is_mask"), [(0.04, True), (0.06, False)])
def test_five_percent_of_foreign_pixels_are_the_limit(share, is_mask):
    frames = torch.zeros(1, 200, 200, 3, dtype=torch.uint8)
    frames[:, :100, :, 2] = 255
    frames[:, 200 - round(200 * share) :] = torch.tensor([100, 0, 0], dtype=torch.uint8)
    if is_mask:
        assert clean(frames, "mask").unique().tolist() == [BLACK, BLUE]
    else:
        with pytest.raises(BadMedia, match="6% of its pixels"):
            clean(frames, "mask")


def test_lines_and_dots_alone_are_refused():
    frames = torch.zeros(1, 128, 128, 3, dtype=torch.uint8)
    frames[:, ::2, :, 0] = 255
    frames[:, 1::2, :, 2] = 255
    with pytest.raises(BadMedia, match="only lines or dots"):
        clean(frames, "mask")


def test_a_matte_is_person_1_from_128_on():
    frames = torch.zeros(1, 128, 256, 3, dtype=torch.uint8)
    frames[:, :, 100:200] = 127
    frames[:, :, 150:] = 128
    frames[:, :, 160:] = 255
    got = clean(frames, "matte")
    assert (got[..., :150] == BACKGROUND).all()
    assert (got[..., 150:] == BLUE).all()


def test_a_soft_matte_is_one_and_a_grey_photograph_is_not():
    matte = np.zeros((256, 256, 3), np.uint8)
    cv2.circle(matte, (128, 128), 80, (255, 255, 255), -1)
    soft = torch.from_numpy(cv2.GaussianBlur(matte, (31, 31), 0))[None]
    assert (clean(soft, "matte") == BLUE).float().mean().item() == pytest.approx(0.307, abs=0.003)
    grey = torch.linspace(20, 235, 256).to(torch.uint8).view(1, 1, 256, 1).expand(1, 256, 256, 3)
    with pytest.raises(BadMedia, match="is no matte"):
        clean(grey.contiguous(), "photo")


def test_white_alone_is_white_and_black_alone_is_background():
    frames = torch.full((2, 64, 64, 3), 255, dtype=torch.uint8)
    assert clean(frames, "mask").unique().tolist() == [WHITE]
    assert clean(torch.zeros_like(frames), "mask").unique().tolist() == [BACKGROUND]


def test_clean_colours_stay_to_the_pixel():
    held = torch.tensor(list(CLASSES.values()), dtype=torch.uint8).repeat_interleave(30)
    frames = held.view(1, 1, -1).expand(2, 64, -1).contiguous()
    assert torch.equal(clean(paint(frames), "mask"), frames)
