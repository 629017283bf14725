"""The preview: colours over both sides, a number for each, and warnings where they happen."""

import dataclasses

import torch

from engine.flow import RoleFrames, Source, Standing, Warned
from engine.masks.colours import BLACK, BLUE, CLASSES, WHITE, paint
from engine.masks.preview import preview_frames, stills
from engine.media.framing import image_to_network

HEIGHT, WIDTH, FRAMES = 128, 160, 30
GREY = 100


def numbers(ground, *squares):
    held = torch.full((HEIGHT, WIDTH), ground, dtype=torch.uint8)
    for colour, left in squares:
        held[40:110, left : left + 40] = CLASSES[colour]
    return held


def source(warned=(), persons=(("blue", 20), ("red", 100)), mode="replacement"):
    picture = torch.full((HEIGHT, WIDTH, 3), GREY, dtype=torch.uint8)
    mask = paint(numbers(BLACK, *persons))
    standing = Standing("blue", 0, 1.0, 0.0, 0.0, 70.0, 110.0, 70.0, 110.0, 0.0)
    return Source(
        image=image_to_network(picture),
        skeleton=picture.expand(FRAMES, -1, -1, -1).contiguous(),
        fps=10.0,
        audio=None,
        roles=RoleFrames(
            mode,
            image_to_network(mask),
            paint(numbers(WHITE, *persons)).expand(FRAMES, -1, -1, -1).contiguous(),
        ),
        standing=(standing,),
        warned=tuple(warned),
    )


def half(colour):
    return ((paint(torch.tensor(colour, dtype=torch.uint8)).int() + GREY) // 2).tolist()


def test_persons_are_half_in_their_colour_on_both_sides_and_the_rest_is_as_it_was():
    first = next(iter(preview_frames(source())))[0]
    assert first.shape[1] == 2 * WIDTH
    assert first.shape[0] % 2 == 0 and first.shape[0] > HEIGHT
    for left in (0, WIDTH):
        assert (first[80, left + 40] - torch.tensor(half(BLUE))).abs().max() <= 1
        assert (first[80, left + 120] - torch.tensor(half(CLASSES["red"]))).abs().max() <= 1
        assert first[80, left + 80].tolist() == [GREY] * 3
    assert first[110, 80].tolist() == [255] * 3  # the foot line
    assert first[110, WIDTH + 80].tolist() == [255] * 3


def test_foot_lines_of_the_motion_are_drawn_where_they_were_measured_alone():
    frames = [frame[0] for frame in preview_frames(source())]
    assert len(frames) == FRAMES
    assert frames[1][110, 80].tolist() == [255] * 3
    assert frames[1][110, WIDTH + 80].tolist() == [GREY] * 3


def bright(frame):
    return int((frame[HEIGHT:].amax(-1) > 200).sum())


def test_a_warning_is_bright_around_its_frame():
    frames = [frame[0] for frame in preview_frames(source([Warned("cut", "There is a cut.", 15)]))]
    assert [n for n, frame in enumerate(frames) if bright(frame)] == [*range(5, 26)]
    for said in (Warned("shape", "It is turned."), None):
        (frame,) = [*preview_frames(source([said] if said else []))][:1]
        assert not bright(frame[0])
        assert frame[0][HEIGHT:].float().std() > 5  # and there


def test_many_warnings_are_told_in_lines_that_fit():
    long = [Warned("jump", f"The mask of the person {n} jumps. " * 4, n) for n in range(9)]
    tall = [next(iter(preview_frames(source(long[:n])))).shape[1] for n in (1, 6, 9)]
    assert tall[0] < tall[1] < tall[2] < 2000


def test_three_stills_show_the_beginning_what_is_odd_and_the_end():
    held = source([Warned("shape", "It is turned."), Warned("cut", "There is a cut.", 21)])
    every = [frame[0] for frame in preview_frames(held)]
    assert [next(n for n, one in enumerate(every) if torch.equal(one, still))
            for still in stills(held)] == [0, 21, FRAMES - 1]  # fmt: skip
    plain = source()
    every = [frame[0] for frame in preview_frames(plain)]
    assert torch.equal(stills(plain)[1], every[14])


def test_the_placed_picture_is_shown_where_there_is_one():
    held = source()
    placed = dataclasses.replace(held, placed=torch.full_like(held.image, -1.0))
    assert next(iter(preview_frames(placed)))[0][80, 80].tolist() == [0, 0, 0]


def test_a_clip_of_one_frame_has_three_stills_too():
    held = source()
    one = dataclasses.replace(
        held, skeleton=held.skeleton[:1],
        roles=dataclasses.replace(held.roles, driving=held.roles.driving[:1]),
    )  # fmt: skip
    assert len(stills(one)) == 3
