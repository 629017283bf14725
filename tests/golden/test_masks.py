"""Golden masks are recognised by their tensors, at any size, and no error in them passes."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engine.golden.verify import recompute

NAME = "preprocess.safetensors"


@pytest.fixture
def held(golden):
    return load_file(golden / "scail2" / NAME)


def verified(folder, tensors, name="x.safetensors"):
    """(ok, what is told after the file's name) of every check."""
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / name)
    return [(check.ok, check.check.removeprefix(f"{name}: ")) for check in recompute(folder)]


@pytest.mark.golden
def test_every_recorded_tensor_is_met_to_the_bit(golden, tmp_path, held):
    checks = verified(tmp_path, held)
    assert [ok for ok, _ in checks] == [True] * 29
    given = {"mask_u8", "driving_in_u8", "driving_mask_in_u8", "ref_in_u8", "ref_mask_in_u8"}
    told = {name for name in held if name.rpartition(".")[2] not in given | {"target_hw"}}
    assert {name for _, name in checks} == told


@pytest.mark.golden
@pytest.mark.parametrize("name", ["anim.driving_masks", "repl.ref_mask_28", "comp_odd.masks",
                                  "anim.ref_masks", "anim.keep", "repl.ref_mask_cropped",
                                  "anim_black_ref.ref_mask_28_sat_animation"])  # fmt: skip
def test_a_tensor_that_was_changed_fails(tmp_path, held, name):
    held[name] = held[name].clone()
    held[name].view(-1)[-1] += 1 if name == "anim.keep" else 2e-6
    assert [told for ok, told in verified(tmp_path, held) if not ok] == [name]


@pytest.mark.golden
def test_a_tensor_that_is_missing_fails_and_one_that_is_unknown_is_told(tmp_path, held):
    del held["anim.driving_masks"]
    held["repl.surprise"] = torch.zeros(3)
    wrong = [check for check in verified(tmp_path, held) if not check[0]]
    assert wrong == [(False, "anim lacks driving_masks"), (None, "repl.surprise")]


def compressed(frames):
    """Written once more, pixel by pixel: [F, 3, 8a, 8b] u8 -> [28, t, a, b]."""
    classes = ["111", "100", "010", "001", "110", "101", "011"]
    count, _, height, width = frames.shape
    out = torch.zeros(28, (count - 1) // 4 + 1, height // 8, width // 8)
    for time in range(4 * out.shape[1]):
        frame = frames[max(0, time - 3)]
        for y in range(height):
            for x in range(width):
                on = "".join("1" if level > 225 else "0" for level in frame[:, y, x].tolist())
                if on in classes:
                    channel = 7 * (time % 4) + classes.index(on)
                    out[channel, time // 4, y // 8, x // 8] += 1 / 64
    return out


@pytest.mark.parametrize(("count", "height", "width"), [(1, 8, 16), (5, 24, 8)])
def test_an_unseen_set_of_other_sizes_passes(tmp_path, count, height, width):
    levels = torch.tensor([0, 128, 225, 226, 255], dtype=torch.uint8)
    frames = levels[torch.randint(0, 5, (count, 3, height, width))]
    tensors = {"unseen.mask_u8": frames, "unseen.masks": compressed(frames)}
    assert verified(tmp_path, tensors) == [(True, "unseen.masks")]


def test_a_clip_of_another_size_passes(tmp_path):
    size, levels = (32, 64), torch.tensor([0, 255], dtype=torch.uint8)
    blocks = levels[torch.randint(0, 2, (6, 3, 16, 32))].repeat_interleave(2, 2)
    mask = blocks.repeat_interleave(2, 3)
    picture = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    half = (blocks[:5, :, ::2].float() - 127.5) / 127.5
    reference = compressed(mask[:1])
    turned = torch.where(mask[:1].amax(1, keepdim=True) == 0, 255, mask[:1])
    tensors = {
        "driving_in_u8": mask, "driving_mask_in_u8": mask, "ref_in_u8": picture,
        "ref_mask_in_u8": mask[:1], "target_hw": torch.tensor(size), "keep": torch.tensor([5]),
        "driving_half": half, "driving_mask_half": half,
        "driving_masks": compressed(blocks[:5, :, ::2]),
        "ref_cropped": picture / 255 * 2 - 1, "ref_mask_cropped": mask[:1] / 255 * 2 - 1,
        "ref_mask_28": reference, "ref_masks": F.pad(reference, (0, 0, 0, 0, 0, 2)),
        "ref_mask_28_sat_animation": compressed(turned),
    }  # fmt: skip
    checks = verified(tmp_path, {f"unseen.{name}": tensor for name, tensor in tensors.items()})
    assert [name for ok, name in checks if not ok] == []
    assert len(checks) == 9


@pytest.mark.parametrize("count", [0, 4])
def test_frames_that_fill_no_latents_fail_with_a_sentence(tmp_path, count):
    frames = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    tensors = {"a.mask_u8": frames, "a.masks": torch.zeros(28, 1, 1, 1)}
    ((ok, told),) = verified(tmp_path, tensors)
    assert ok is False
    assert told.endswith(f"mask_u8 has {count} frames; 4k + 1 are expected.")
