"""Channels of masks: the official tensors, and what each mistake would change of them."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from engine.masks.colours import (
    CLASSES,
    PERSONS,
    THRESHOLD,
    driving_channels,
    mask_channels,
    paint,
    reference_channels,
    show_black,
)
from engine.media.framing import crop_frames, image_to_network

ORDER = torch.tensor(list(CLASSES.values())).view(1, -1, 1, 1)
GREY_225 = (225 - 127.5) / 127.5


def solid(*rgb, count=1, height=16, width=16):
    return torch.tensor(rgb, dtype=torch.uint8).expand(count, height, width, 3).contiguous()


def normalised(frames):
    """[F, 3, h, w] u8 -> fp32 in -1..1."""
    return (frames.float() - 127.5) / 127.5


@pytest.fixture
def held(golden):
    return load_file(golden / "scail2" / "preprocess.safetensors")


@pytest.fixture
def compressed(held):
    """The frames of the compression cases in -1..1, and their channels."""
    return [
        (normalised(held[f"{case}.mask_u8"]), held[f"{case}.masks"])
        for case in ("comp_a", "comp_odd")
    ]


@pytest.fixture
def driving(held):
    """The driving masks of the clip cases at their size [F, H, W, 3] u8, and their channels."""
    found = []
    for case in ("anim", "repl", "anim_black_ref"):
        frames = held[f"{case}.driving_mask_in_u8"][: held[f"{case}.keep"].item()]
        size = tuple(held[f"{case}.target_hw"].tolist())
        found.append((crop_frames(frames.permute(0, 2, 3, 1), size), held[f"{case}.driving_masks"]))
    return found


def spelled_out(frames, is_on=lambda x: x > torch.tensor(GREY_225), order=ORDER, shares=None):
    """The compression [F, 3, a, b] -> [28, t, a', b'] as one would write it first."""
    on = is_on(frames).int()
    maps = (on[:, :1] + 2 * on[:, 1:2] + 4 * on[:, 2:] == order).float()
    cells = [-(-side // 8) for side in frames.shape[2:]]
    maps = F.adaptive_avg_pool2d(maps, cells) if shares is None else shares(maps, cells)
    groups = torch.cat([maps[:1]] * 3 + [maps]).split(4)
    return torch.stack([torch.cat(list(group)) for group in groups], 1)


@pytest.mark.golden
def test_frames_are_compressed_as_officially_to_the_bit(compressed):
    for frames, channels in compressed:
        assert torch.equal(mask_channels(frames), channels)
        assert torch.equal(spelled_out(frames), channels)


@pytest.mark.golden
def test_driving_masks_are_compressed_as_officially_to_the_bit(driving):
    for frames, channels in driving:
        assert torch.equal(driving_channels(frames), channels)


def class_major(channels):
    return channels.unflatten(0, (4, 7)).transpose(0, 1).flatten(0, 1)


def last_frame_repeated(frames):
    channels = mask_channels(torch.cat([frames, frames[-1:].expand(4, -1, -1, -1)]))
    q = channels.unflatten(0, (4, 7)).permute(2, 0, 1, 3, 4).flatten(0, 1)[3:-1]
    return q.unflatten(0, (-1, 4)).flatten(1, 2).transpose(0, 1)


def nearest(maps, cells):
    return F.interpolate(maps, cells, mode="nearest")


MISTAKES = {
    "channels class-major": lambda x: class_major(mask_channels(x)),
    "re-binarised above half": lambda x: (mask_channels(x) > 0.5).float(),
    "re-binarised above none": lambda x: (mask_channels(x) > 0).float(),
    "225 is on": lambda x: spelled_out(x, lambda y: y >= torch.tensor(GREY_225)),
    "a limit in FP64": lambda x: spelled_out(x, lambda y: y.double() > GREY_225),
    "half is on": lambda x: spelled_out(x, lambda y: y > 0),
    "226 is off": lambda x: spelled_out(x, lambda y: y > (226.5 - 127.5) / 127.5),
    "classes in the order of persons": lambda x: spelled_out(
        x, order=torch.tensor([7, *(CLASSES[name] for name in PERSONS)]).view(1, -1, 1, 1)
    ),
    "the last frame is repeated, not the first": last_frame_repeated,
    "nearest, not mean": lambda x: spelled_out(x, shares=nearest),
}


@pytest.mark.golden
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_compression_would_show(compressed, mistake):
    changes = [(mistake(frames) - channels).abs().max() for frames, channels in compressed]
    assert max(changes) > 0.01


def mean_after_threshold(frames):
    maps = normalised(frames.permute(0, 3, 1, 2)) > THRESHOLD
    on = maps[:, 0] + 2 * maps[:, 1] + 4 * maps[:, 2].int()
    shares = F.avg_pool2d((on[:, None] == ORDER).float(), 16)
    return (
        torch.cat([shares[:1]] * 3 + [shares]).unflatten(0, (-1, 4)).flatten(1, 2).transpose(0, 1)
    )


def every_second_pixel(frames):
    return mask_channels(normalised(frames[:, ::2, ::2].permute(0, 3, 1, 2)))


@pytest.mark.golden
@pytest.mark.parametrize("mistake", [mean_after_threshold, every_second_pixel])
def test_colours_that_are_not_averaged_before_the_threshold_would_show(driving, mistake):
    changes = [(mistake(frames) - channels).abs().max() for frames, channels in driving]
    assert max(changes) > 0.01


@pytest.mark.golden
def test_a_reference_mask_without_the_black_rule_or_with_it_in_excess_would_show(held):
    with_black = reference_channels(held["anim_black_ref.ref_mask_cropped"][0])
    wanted = held["anim_black_ref.ref_mask_28_sat_animation"]
    assert (with_black - wanted).abs().max() == 1
    turned = show_black(held["anim_black_ref.ref_mask_cropped"][0])
    assert torch.equal(reference_channels(turned), wanted)


def test_a_channel_is_on_from_226():
    for level, channel in ((225, 0.0), (226, 1.0)):
        frames = solid(0, 0, level)
        assert mask_channels(normalised(frames.permute(0, 3, 1, 2)))[3].unique() == channel
        assert reference_channels(image_to_network(frames[0]))[3].unique() == channel
        assert driving_channels(frames)[3].unique() == channel


def test_a_block_of_four_is_on_if_its_sum_is_above_900():
    for other, channel in ((225, 0.0), (226, 1.0), (130, 0.0)):
        frames = solid(0, 0, 225)
        frames[:, ::2, ::2, 2] = other
        assert driving_channels(frames)[3].unique() == channel
    frames = solid(0, 0, 255)
    frames[:, ::2, ::2, 2] = 135  # the mean is 225 to the bit
    assert driving_channels(frames).max() == 0


@pytest.mark.parametrize(
    ("place", "name"),
    [*enumerate(["white", "red", "green", "blue", "yellow", "magenta", "cyan"])],
)
def test_each_colour_has_the_channel_of_its_place(place, name):
    rgb = paint(torch.full((1, 16, 16), CLASSES[name], dtype=torch.uint8))
    channels = driving_channels(rgb)[:, 0, 0, 0]
    assert channels.nonzero().ravel().tolist() == [place + 7 * group for group in range(4)]


def test_persons_are_blue_red_green_magenta_cyan_yellow():
    rgb = [
        paint(torch.tensor([[CLASSES[name]]], dtype=torch.uint8))[0, 0].tolist() for name in PERSONS
    ]
    assert rgb == [
        [0, 0, 255], [255, 0, 0], [0, 255, 0], [255, 0, 255], [0, 255, 255], [255, 255, 0],
    ]  # fmt: skip


def test_the_first_frame_fills_a_group_and_the_rest_follow_by_fours():
    names = ["white", "red", "green", "blue", "yellow", "magenta", "cyan", "red", "green"]
    numbers = torch.tensor([CLASSES[name] for name in names], dtype=torch.uint8)
    channels = driving_channels(paint(numbers.view(-1, 1, 1).expand(-1, 16, 16)))
    shown = [
        list(CLASSES)[int(channels[7 * place : 7 * place + 7, group, 0, 0].argmax())]
        for group in range(3)
        for place in range(4)
    ]
    assert shown == [names[0]] * 3 + names


def test_a_person_shrinks_on_black_and_grows_on_white():
    on_black, on_white = solid(0, 0, 0), solid(255, 255, 255)
    for frames in (on_black, on_white):
        frames[:, :, :7] = torch.tensor([0, 0, 255], dtype=torch.uint8)
    assert driving_channels(on_black)[3].item() == 3 / 8
    assert driving_channels(on_white)[3].item() == 4 / 8
    assert driving_channels(on_white)[0].item() == 4 / 8
    assert driving_channels(on_black).sum().item() == 4 * 3 / 8


def test_between_two_persons_a_gap_is_left():
    frames = solid(0, 0, 255)
    frames[:, :, :7] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    channels = driving_channels(frames)
    assert (channels[1].item(), channels[3].item()) == (3 / 8, 4 / 8)
    assert channels.sum().item() == 4 * 7 / 8


def test_a_slice_of_a_clip_is_a_clip_of_its_own():
    frames = paint(torch.randint(0, 8, (45, 32, 48), dtype=torch.uint8))
    whole = driving_channels(frames)
    later = driving_channels(frames[20:37])
    assert torch.equal(later[:, 1:], whole[:, 6:10])
    halves = F.avg_pool2d(normalised(frames.permute(0, 3, 1, 2)), 2)
    assert torch.equal(driving_channels(frames), mask_channels(halves))


def test_a_picture_has_four_equal_groups():
    numbers = torch.randint(0, 8, (32, 48), dtype=torch.uint8)
    channels = reference_channels(image_to_network(paint(numbers)))
    assert channels.shape == (28, 1, 4, 6)
    groups = channels.unflatten(0, (4, 7))
    assert torch.equal(groups, groups[:1].expand(4, -1, -1, -1, -1))
    assert groups[0].sum(0).mean().item() == pytest.approx((numbers > 0).float().mean().item())
