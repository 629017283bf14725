"""Sizes, crops and value ranges, against the official script's results and by hand."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.errors import BadMedia, BadRequest
from engine.golden.check import resized
from engine.golden.preprocess import checks, recognises
from engine.media.framing import (
    check_size,
    crop_clip,
    crop_frames,
    crop_image,
    crop_nearest,
    frames_to_u8,
    image_to_network,
    skeleton_to_network,
    target_size,
    trim_to_whole_latents,
)


def golden_file(golden):
    return golden / "transformer" / "preprocess.safetensors"


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.golden
def test_every_official_value_is_met_to_the_bit(golden):
    results = list(checks(golden_file(golden)))
    assert len(results) == 8
    assert [result.tolerance for result in results] == [resized(0.0, 2e-6)] * 8
    assert all(result.ok for result in results)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["target_hw", "ref_cropped", "pose_cropped_u8", "pose_half"])
def test_a_golden_file_that_differs_in_one_value_fails_in_that_tensor_alone(golden, tmp_path, name):
    tensors, metadata = contents(golden_file(golden))
    tensors[f"port_up.{name}"].view(-1)[7 % tensors[f"port_up.{name}"].numel()] += 1
    save_file(tensors, tmp_path / "any_name.safetensors", metadata)
    failed = [check.check for check in checks(tmp_path / "any_name.safetensors") if not check.ok]
    assert failed == [f"any_name.safetensors: port_up.{name}"]


@pytest.mark.golden
def test_the_golden_kind_is_recognised_by_its_tensors_and_not_by_its_name(golden, tmp_path):
    shutil.copy(golden_file(golden), tmp_path / "x.safetensors")
    tensors, metadata = contents(tmp_path / "x.safetensors")
    assert recognises(frozenset(tensors), metadata)
    assert not recognises(frozenset(tensors), {})
    assert not recognises(frozenset({"in.x", "out.out"}), metadata)


@pytest.mark.parametrize(
    ("picture", "size"), [((1080, 1920), (512, 896)), ((99, 98), (896, 512)), ((7, 7), (896, 512))]
)
def test_the_clip_lies_as_the_picture_lies_and_a_square_stands(picture, size):
    assert target_size(*picture) == size


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (4, 1), (5, 5), (8, 5), (81, 81), (326, 325)])
def test_frames_that_fill_no_latent_are_dropped_and_the_log_says_so(count, kept, caplog):
    caplog.set_level("INFO")
    assert trim_to_whole_latents(count) == kept
    assert (f"last {count - kept} fill" in caplog.text) == (kept < count)


def test_a_motion_without_frames_is_refused():
    with pytest.raises(BadMedia, match="0 frames; at least one"):
        trim_to_whole_latents(0)
    with pytest.raises(BadMedia, match="no frames"):
        crop_clip([], 5, (64, 64))


@pytest.mark.parametrize(
    ("height", "width", "sentence"),
    [
        (500, 896, "The height is 500; it must be a multiple of 32. The nearest is 512."),
        (512, 880, "The width is 880; it must be a multiple of 32. The nearest is 896."),
        (512, 2000, "The width is 2000; it must be 64 to 1280. The nearest is 1280."),
        (0, 896, "The height is 0; it must be 64 to 1280. The nearest is 64."),
        (-64, 896, "The height is -64; it must be 64 to 1280. The nearest is 64."),
    ],
)
def test_a_size_that_no_clip_can_have_is_answered_with_the_nearest(height, width, sentence):
    with pytest.raises(BadRequest) as raised:
        check_size(height, width)
    assert str(raised.value) == sentence


def test_a_good_size_passes():
    assert check_size(672, 416) == (672, 416)


def test_the_other_side_of_a_cover_is_multiplied_before_it_is_divided():
    assert int(360 * (896 / 320)) == 1007  # what must not happen: 360 * 896 / 320 is 1008
    image = torch.rand(3, 360, 320)
    covered = torch.nn.functional.interpolate(
        image[None], (1008, 896), mode="bicubic", antialias=True
    )[0]
    assert torch.equal(crop_image(image, (512, 896)), covered[:, 248:760])


def test_the_crop_takes_the_centre_of_a_wide_and_of_a_tall_picture():
    ramp = torch.arange(128.0).expand(3, 64, 128)
    assert torch.equal(crop_image(ramp, (64, 64)), ramp[:, :, 32:96])
    assert torch.equal(crop_image(ramp.mT.contiguous(), (64, 64)), ramp.mT[:, 32:96])


def test_a_picture_of_the_right_size_is_untouched():
    image = torch.rand(3, 64, 96)
    frames = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    assert crop_image(image, (64, 96)) is image
    assert crop_frames(frames, (64, 96)) is frames


def test_pictures_overshoot_at_edges_and_frames_do_not():
    frames = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    frames[:, :, 32:] = 255
    image = crop_image(image_to_network(frames[0]), (96, 96))
    assert image.max() > 1.01
    assert image.min() < -1.01
    cropped = crop_frames(frames, (96, 96))
    assert cropped[0, 0, 0].tolist() == [0, 0, 0]  # a wrap-around would show here
    assert cropped[0, 0, -1].tolist() == [255, 255, 255]


def test_frames_are_resized_in_fp32_and_rounded_to_the_nearest():
    frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    resized = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), (96, 96), mode="bicubic", antialias=True
    )
    want = resized.clamp(0, 255).round().permute(0, 2, 3, 1)
    assert torch.equal(crop_frames(frames, (96, 96)).float(), want)


def test_a_clip_cropped_in_chunks_is_the_clip_cropped_at_once():
    frames = torch.randint(0, 256, (7, 70, 130, 3), dtype=torch.uint8)
    got = crop_clip(frames.split(3), 6, (64, 96))
    assert torch.equal(got, crop_frames(frames, (64, 96))[:6])


def test_a_clip_that_ends_early_is_as_long_as_it_is():
    frames = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(crop_clip([frames], 9, (64, 64)), frames)


def test_a_sliver_is_refused_before_memory_is_asked_for():
    with pytest.raises(BadMedia, match="60000x64 would be cut to a sliver"):
        crop_image(torch.zeros(3, 64, 1).expand(3, 64, 60_000), (896, 512))


def test_skeleton_pixels_are_means_of_two_by_two():
    frames = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(1, 2, 2, 1)
    got = skeleton_to_network(frames.expand(5, 2, 2, 3))
    assert got.shape == (3, 5, 1, 1)
    torch.testing.assert_close(got, torch.full((3, 5, 1, 1), -0.2), rtol=0, atol=1e-6)


def test_values_run_from_minus_one_to_one():
    image = torch.tensor([[[0, 255, 51]]], dtype=torch.uint8)
    torch.testing.assert_close(image_to_network(image).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_output_is_truncated_and_never_wraps():
    values = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 1.5]).view(1, 6, 1, 1).expand(3, 6, 1, 1)
    got = frames_to_u8(values)
    assert got.shape == (6, 1, 1, 3)
    assert got[:, 0, 0, 1].tolist() == [0, 0, 127, 254, 255, 255]


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (33, 50), (128, 128)])
def test_labels_are_cropped_where_pictures_are_and_never_mixed(size):
    ramp = torch.arange(96, dtype=torch.uint8).expand(64, 96)
    labels = crop_nearest(ramp[None], (64, 96), size)[0]
    picture = crop_image(ramp.float().expand(3, -1, -1), size)[0]
    assert labels.shape == size
    assert set(labels.unique().tolist()) <= set(range(96))
    assert (labels.float() - picture)[:, 4:-4].abs().max() <= 1


def test_labels_of_another_size_are_stretched_to_that_of_their_picture():
    labels = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    large = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert torch.equal(crop_nearest(labels, (64, 96), (64, 96)), large)
    assert torch.equal(crop_nearest(large, (2, 3), (2, 3)), labels)
    cropped = crop_nearest(large[..., None], (64, 96), (32, 32))[0, ::16, ::16, 0]
    assert cropped.tolist() == [[0, 1], [3, 4]]
