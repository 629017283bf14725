"""Masks of a driving video: which frames, which size, which background, and what is said of it."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import BadMedia, BadRequest
from engine.masks.colours import BLACK, BLUE, CLASSES, PERSONS, WHITE, driving_channels, paint
from engine.masks.reader import (
    absent_driving_mask,
    read_driving_mask,
)
from engine.media.framing import crop_frames, crop_nearest
from engine.media.video import frame_count, probe_video, read_video
from tests.support.clips import run_ffmpeg
from tests.support.mask_scenes import VIDEOS, colours, labels, write_video

SIZE = (64, 96)


def moving(count, ground=BLACK, colour=BLUE):
    """Numbers [T, H, W] u8: a square that goes a pixel to the right with each frame."""
    frames = torch.full((count, *SIZE), ground, dtype=torch.uint8)
    for place in range(count):
        frames[place, 20:44, place : place + 24] = colour
    return frames


def places(mask, colour=BLUE):
    """Where the square of `moving` is in each frame, by its left edge."""
    is_there = (mask.colours == paint(torch.tensor(colour))).all(-1)
    return [int(frame.any(0).int().argmax()) for frame in is_there]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A driving video of 20 frames at 16 fps."""
    path = tmp_path_factory.mktemp("video") / "dance.mkv"
    return probe_video(write_video(path, paint(moving(20))))


def read(path, video, fps=None, frames=None, size=SIZE, mode="animation"):
    return read_driving_mask(path, video, fps, frame_count(video, fps, frames), size, mode)


def save_npz(folder, **arrays):
    np.savez_compressed(folder / "masks.npz", **arrays)
    return folder / "masks.npz"


def save_pictures(folder, numbers, name="mask_{}.png"):
    folder.mkdir(exist_ok=True)
    for place, picture in enumerate(paint(numbers)):
        Image.fromarray(picture.numpy()).save(folder / name.format(place))
    return folder


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for entry in folder.iterdir():
            archive.write(entry, f"masks/{entry.name}")
    return path


def labels_of(numbers):
    return (numbers == BLUE).numpy().astype(np.uint8)


def saved(form, folder, numbers):
    return {
        "video": lambda: write_video(folder / "mask.mkv", paint(numbers)),
        "npz": lambda: save_npz(folder, masks=labels_of(numbers)),
        "npz of persons": lambda: save_npz(folder, masks=labels_of(numbers)[:, None] > 0),
        "npz of a person": lambda: save_npz(folder, masks=labels_of(numbers) > 0),
        "folder": lambda: save_pictures(folder / "masks", numbers),
        "zip": lambda: zipped(save_pictures(folder / "masks", numbers)),
        "grey video": lambda: write_video(
            folder / "mask.mkv", (numbers == BLUE)[..., None].expand(-1, -1, -1, 3).byte() * 255
        ),
    }[form]()


FORMS = ["video", "npz", "npz of persons", "npz of a person", "folder", "zip", "grey video"]


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_say_the_same(tmp_path, video, form):
    path = saved(form, tmp_path, moving(20))
    mask = read(path, video)
    assert torch.equal(mask.colours, paint(moving(20)))
    assert (mask.persons, mask.notes) == (("blue",), ())
    mask = read(path, video, mode="replacement")
    assert torch.equal(mask.colours, paint(moving(20, WHITE)))


@pytest.mark.parametrize(
    ("form", "fps", "frames"),
    [("video", None, 7), ("video", 8, None), ("video", 24, None), ("npz", 24, 9), ("zip", 10, 5)],
)
def test_the_frames_are_those_that_are_shown_of_the_video(tmp_path, video, form, fps, frames):
    shown = torch.cat([*read_video(video, fps, frames)])
    mask = read(saved(form, tmp_path, moving(20)), video, fps, frames)
    assert torch.equal(mask.colours, shown)


def test_a_mask_of_another_rate_goes_by_frames_and_not_by_seconds(tmp_path, video):
    path = write_video(tmp_path / "mask.mkv", paint(moving(20)), fps=30)
    assert places(read(path, video)) == [*range(20)]
    assert places(read(path, video, fps=8)) == [*range(0, 20, 2)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A driving video of variable rate, 20 frames."""
    folder = tmp_path_factory.mktemp("uneven")
    even = write_video(folder / "even.mkv", paint(moving(20)))
    uneven = "setpts='(N+floor(N/3))/16/TB'"
    codec = ["-c:v", "ffv1", "-pix_fmt", "gbrp", "-fps_mode", "passthrough"]
    run_ffmpeg("-i", even, "-vf", uneven, *codec, folder / "dance.mkv")
    info = probe_video(folder / "dance.mkv")
    assert (info.frames, info.is_constant) == (20, False)
    return info


@pytest.mark.parametrize("fps", [None, 8, 16, 30])
@pytest.mark.parametrize("form", ["video", "npz"])
def test_a_video_of_variable_rate_chooses_frames_of_its_mask_alike(tmp_path, uneven, fps, form):
    shown = torch.cat([*read_video(uneven, fps)])
    mask = read(saved(form, tmp_path, moving(20)), uneven, fps)
    assert torch.equal(mask.colours, shown)


def test_a_mask_may_have_the_frames_of_the_clip(tmp_path, video):
    path = save_npz(tmp_path, masks=labels_of(moving(10)))
    assert places(read(path, video, fps=8)) == [*range(10)]
    assert places(read(path, video, fps=8, frames=6)) == [*range(6)]
    assert places(read(path, video, frames=10)) == [*range(10)]


@pytest.mark.parametrize("form", ["video", "npz", "zip"])
@pytest.mark.parametrize(("held", "last", "said"), [(21, 19, "left out"), (19, 18, "shown twice")])
def test_a_frame_more_or_less_is_mended_and_said(tmp_path, video, form, held, last, said):
    mask = read(saved(form, tmp_path, moving(held)), video)
    assert places(mask) == [*range(19), last]
    assert [said in note for note in mask.notes] == [True]
    assert f"{held} frames for 20" in mask.notes[0]


def test_a_picture_is_the_mask_of_one_frame_and_shown_twice_for_two(tmp_path, video):
    path = save_pictures(tmp_path, moving(1)) / "mask_0.png"
    assert places(read(path, video, frames=1)) == [0]
    two = read(path, video, frames=2)
    assert places(two) == [0, 0]
    assert two.notes == ("mask_0.png is one picture for 2: its last one is shown twice.",)


def test_what_lies_beside_the_pictures_of_a_mask_is_no_frame_of_it(tmp_path, video):
    folder = save_pictures(tmp_path / "masks", moving(20))
    (folder / "inner").mkdir()
    for name in ("Thumbs.db", "a readme.txt", "zz.json"):
        (folder / name).write_bytes(b"x")
    assert places(read(folder, video)) == [*range(20)]
    assert read(folder, video).notes == ()
    (folder / "mask_7.png").unlink()  # a gap is one still
    with pytest.raises(BadMedia, match=r"'mask_8\.png' comes after 'mask_6\.png'"):
        read(folder, video)
    (folder / "inner").rmdir()
    path = zipped(save_pictures(folder, moving(20)))
    assert places(read(path, video)) == [*range(20)]


@pytest.mark.parametrize("held", [1, 5, 18, 22, 40])
def test_another_number_of_frames_is_refused(tmp_path, video, held):
    with pytest.raises(BadMedia) as raised:
        read(save_npz(tmp_path, masks=labels_of(moving(held))), video)
    told = "is one picture" if held == 1 else f"has {held} frames"
    assert str(raised.value) == (
        f"masks.npz {told} and dance.mkv has 20 frames; "
        "a mask needs one for each frame of its video."
    )


@pytest.mark.parametrize("scale", [0.5, 2, 3])
def test_a_mask_of_another_size_is_brought_to_that_of_the_video(tmp_path, video, scale):
    numbers = moving(20)
    large = torch.nn.functional.interpolate(numbers[None], scale_factor=scale, mode="nearest")[0]
    mask = read(save_npz(tmp_path, masks=labels_of(large)), video)
    if scale > 1:
        assert torch.equal(mask.colours, paint(numbers))
    same = (mask.colours == paint(numbers)).all(-1).float().mean()
    assert same > 0.98


@pytest.mark.parametrize("size", [(96, 64), (64, 64), (32, 96), (128, 160)])
def test_a_mask_is_cropped_as_its_video_is(tmp_path, video, size):
    mask = read(save_npz(tmp_path, masks=labels_of(moving(20))), video, size=size)
    frames = crop_frames(torch.cat([*read_video(video)]), size)
    seen = frames[..., 2] > 127
    assert ((mask.colours[..., 2] > 0) == seen).float().mean() > 0.995


@pytest.mark.parametrize(("height", "width", "fits"), [(640, 954, True), (640, 940, False)])
def test_the_shape_may_differ_by_a_hundredth(tmp_path, video, height, width, fits):
    masks = np.zeros((20, height, width), np.uint8)
    masks[:, 100:200, 100:200] = 1
    path = save_npz(tmp_path, masks=masks)
    if fits:
        assert read(path, video).persons == ("blue",)
    else:
        with pytest.raises(
            BadMedia, match=r"940x640 and dance\.mkv 96x64; a mask must have the shape"
        ):
            read(path, video)


@pytest.mark.parametrize(
    ("mode", "wrong", "right"), [("animation", WHITE, BLACK), ("replacement", BLACK, WHITE)]
)
def test_a_background_that_is_the_wrong_way_round_is_turned_and_said(
    tmp_path, video, mode, wrong, right
):
    path = write_video(tmp_path / "mask.mkv", paint(moving(20, wrong)))
    mask = read(path, video, mode=mode)
    assert torch.equal(mask.colours, paint(moving(20, right)))
    (note,) = mask.notes
    assert note.startswith(f"mask.mkv has a {'white' if wrong else 'black'} background (91% of it)")
    path = write_video(tmp_path / "mask.mkv", paint(moving(20, right)))
    assert read(path, video, mode=mode).notes == ()


def test_persons_are_told_in_their_order(tmp_path, video):
    held = labels(20, 128, 192, persons=3)
    path = write_video(tmp_path / "mask.mkv", colours(held, ("cyan", "blue", "red"), WHITE))
    assert read(path, video, mode="replacement").persons == ("blue", "red", "cyan")
    path = save_npz(tmp_path, masks=held.numpy())
    assert read(path, video).persons == ("blue", "red", "green")


def test_of_two_persons_at_one_place_the_first_is_seen(tmp_path, video):
    masks = np.zeros((20, 3, *SIZE), bool)
    masks[:, 2, :, :60] = masks[:, 1, :, 40:80] = True
    got = read(save_npz(tmp_path, masks=masks), video).colours[3, 10]
    names = [next(n for n, c in CLASSES.items() if torch.equal(paint(torch.tensor(c)), rgb))
             for rgb in got[[20, 50, 70]]]  # fmt: skip
    assert names == ["green", "red", "red"]
    assert got[90].sum() == 0


def test_a_mask_without_persons_is_noted_in_animation_and_refused_in_replacement(tmp_path, video):
    path = save_npz(tmp_path, masks=np.zeros((20, *SIZE), np.uint8))
    mask = read(path, video)
    assert mask.notes == ("masks.npz shows nobody: all of the video is taken as background.",)
    assert mask.colours.max() == 0
    for ground in (BLACK, WHITE):
        white = write_video(tmp_path / "m.mkv", paint(torch.full((20, *SIZE), ground).byte()))
        assert read(white, video).colours.max() == 0
        for nobody in (path, white):
            with pytest.raises(BadMedia, match="shows nobody; who is to be replaced"):
                read(nobody, video, mode="replacement")


def test_a_small_file_is_cleaned_before_it_is_stretched(tmp_path):
    held = labels(5, 96, 160)
    frames = colours(held, ("red", "green"), WHITE)
    path = write_video(tmp_path / "mask.mp4", frames, VIDEOS["H.264 4:2:0 crf 32"][1])
    mask = read(path, probe_video(path), size=(512, 896), mode="replacement")
    assert mask.persons == ("red", "green")
    wanted = crop_nearest(frames, (96, 160), (512, 896))
    assert (mask.colours == wanted).all(-1).float().mean() > 0.98


@pytest.mark.parametrize("persons", [2, 6])
@pytest.mark.parametrize(("mode", "ground"), [("animation", BLACK), ("replacement", WHITE)])
def test_labels_are_painted_in_the_palette_and_the_official_resize_leaves_them(
    tmp_path, video, persons, mode, ground
):
    held = labels(20, 128, 192, persons)
    mask = read(save_npz(tmp_path, masks=held.numpy()), video, size=(128, 192), mode=mode)
    assert mask.persons == PERSONS[:persons]
    assert torch.equal(mask.colours, colours(held, PERSONS[:persons], ground))
    assert torch.equal(crop_frames(mask.colours, (128, 192)), mask.colours)
    shares = driving_channels(mask.colours[:17]).unflatten(0, (4, 7)).sum(1)
    assert shares.max() <= 1
    classes = driving_channels(mask.colours[:17])[:7].amax((1, 2, 3)) > 0
    told = {name for name, is_there in zip(CLASSES, classes) if is_there}
    assert told == {*PERSONS[:persons]} | ({"white"} if ground else set())


def test_no_mask_of_the_video_is_black_in_animation_and_refused_in_replacement():
    mask = absent_driving_mask(5, SIZE, "animation")
    assert torch.equal(mask.colours, torch.zeros(5, *SIZE, 3, dtype=torch.uint8))
    assert mask.notes == (
        "The motion has no mask: all of it is taken as background without persons.",
    )
    with pytest.raises(BadRequest, match="Replacement needs a mask of the video, which says who"):
        absent_driving_mask(5, SIZE, "replacement")


def test_a_job_can_be_called_off_while_its_mask_is_read(tmp_path, video):
    class CalledOff(Exception):
        pass

    for form in FORMS:
        path, asked = saved(form, tmp_path, moving(20)), []

        def check(asked=asked):
            asked.append(None)
            if len(asked) > 12:
                raise CalledOff

        with pytest.raises(CalledOff):
            read_driving_mask(path, video, None, 20, SIZE, "animation", check)


def test_the_numbers_of_pictures_count_and_not_their_letters(tmp_path, video):
    folder = save_pictures(tmp_path / "masks", moving(20), "mask {}.png")
    assert places(read(folder, video)) == [*range(20)]
    (folder / ".DS_Store").write_bytes(b"Bud1")
    assert places(read(folder, video)) == [*range(20)]
    (folder / "mask 7.png").unlink()
    with pytest.raises(BadMedia, match=r"'mask 8\.png' comes after 'mask 6\.png'"):
        read(folder, video)


def test_nothing_is_left_behind(tmp_path, video, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    Path(tmp_path / "temporary").mkdir()
    read(zipped(save_pictures(tmp_path / "masks", moving(20))), video)
    assert [*(tmp_path / "temporary").iterdir()] == []
