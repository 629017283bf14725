"""Made masks as files: every form is read again to the pixel, the .npz with all that is known."""

import io
import zipfile

import numpy as np
import pytest
import torch

from engine.errors import BadMedia, OutputError
from engine.flow import Warned
from engine.masks.colours import BLACK, PERSON_COLOURS, WHITE, numbers_of, paint
from engine.masks.made import MadeMasks
from engine.masks.reader import DRIVING, read_driving_mask, read_reference_mask
from engine.masks.saved import coloured, made_of, save_masks, save_reference
from engine.masks.stored import open_reference
from engine.media.video import frame_count, probe_video
from tests.support.made_masks import load_made
from tests.support.mask_scenes import labels, write_video

SIZE = (128, 224)


def made(persons=2, frames=5):
    held = labels(frames, *SIZE, persons)
    boxes = torch.full((frames, persons, 4), torch.nan)
    boxes[1:] = torch.arange(4.0)
    return MadeMasks(
        labels=held,
        reference=labels(1, 200, 150, persons)[0],
        boxes=boxes,
        scores=torch.full((frames, persons), 0.75),
        fps=16.0,
        source_sha256="a" * 64,
        order=tuple(range(persons, 0, -1)),
        model="drawn",
        image_sha256="b" * 64,
        warned=(Warned("cut", "There is a cut.", 3), Warned("shape", "It is turned.")),
    )


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "dance.mkv"
    return probe_video(write_video(path, torch.zeros(5, *SIZE, 3, dtype=torch.uint8)))


def read(path, video, mode="animation", who=()):
    """Labels [T, H, W] that a file of masks is read as."""
    count = frame_count(video, None, None)
    mask = read_driving_mask(path, video, None, count, SIZE, mode, who=who)
    assert not mask.notes
    told = torch.zeros(8, dtype=torch.uint8)
    told[list(PERSON_COLOURS)] = torch.arange(1, 7, dtype=torch.uint8)
    return told[numbers_of(mask.colours).int()]


@pytest.mark.parametrize("mode", DRIVING)
@pytest.mark.parametrize("persons", [2, 6])
def test_npz_mkv_zip_and_npz_again_say_the_same(tmp_path, video, persons, mode):
    wanted = made(persons)
    held = wanted
    for name in ("one.npz", "two.mkv", "three.zip", "four.npz"):
        save_masks(tmp_path / name, held, DRIVING[mode])
        got = read(tmp_path / name, video, mode)
        assert torch.equal(got, wanted.labels), name
        held = MadeMasks(
            got, held.reference, held.boxes, held.scores, held.fps, held.source_sha256,
            held.order, held.model, held.image_sha256, held.warned,
        )  # fmt: skip
    assert read(tmp_path / "two.mkv", video, mode).unique().tolist() == [*range(persons + 1)]


def test_lossless_video_whose_bytes_were_changed_is_refused(tmp_path, video):
    """FFV1 has checksums, and its decoder shows something else where they do not match."""
    save_masks(tmp_path / "masks.mkv", made(), BLACK)
    data = bytearray((tmp_path / "masks.mkv").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20] = bytes(byte ^ 0xFF for byte in data[middle : middle + 20])
    (tmp_path / "masks.mkv").write_bytes(data)
    with pytest.raises(BadMedia, match=r"masks\.mkv is a damaged video: what is stored and its"):
        read(tmp_path / "masks.mkv", video)


def test_a_picture_without_a_number_beside_numbered_ones_is_refused(tmp_path, video):
    """It stood for one that was missing, and all that came behind were a frame late."""
    save_masks(tmp_path / "masks.zip", made(), BLACK)
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    held["cover.png"] = held.pop("mask_00002.png")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    with pytest.raises(BadMedia, match=r"other\.zip: 'cover\.png' has no number, and others have"):
        read(tmp_path / "other.zip", video)


def test_an_npz_keeps_all_that_is_known(tmp_path):
    wanted = made()
    save_masks(tmp_path / "masks.npz", wanted, BLACK)
    got = load_made(tmp_path / "masks.npz")
    for name in ("labels", "reference", "scores"):
        assert torch.equal(getattr(got, name), getattr(wanted, name))
    assert torch.equal(got.boxes.isnan(), wanted.boxes.isnan())
    assert torch.equal(got.boxes.nan_to_num(), wanted.boxes.nan_to_num())
    for name in ("fps", "source_sha256", "image_sha256", "order", "model", "warned", "persons"):
        assert getattr(got, name) == getattr(wanted, name), name


def test_a_file_that_was_edited_needs_labels_alone(tmp_path, video):
    save_masks(tmp_path / "masks.npz", made(), BLACK)
    held = dict(np.load(tmp_path / "masks.npz"))
    held["masks"][:, :40] = 0
    np.savez(tmp_path / "edited.npz", masks=held["masks"])
    assert torch.equal(read(tmp_path / "edited.npz", video), torch.from_numpy(held["masks"]))
    assert made_of(tmp_path / "edited.npz") == ""  # of no picture in particular


def test_the_mask_of_the_picture_lies_beside_and_is_found_again(tmp_path):
    save_masks(tmp_path / "masks.npz", made(), BLACK)
    stored = open_reference(tmp_path / "masks.npz")
    mask = read_reference_mask(stored, None, (200, 150), (200, 150), "replacement")
    assert torch.equal(mask.numbers, numbers_of(coloured(made().reference, BLACK)))
    assert mask.persons == ("blue", "red")
    save_reference(tmp_path / "ref_mask.png", made().reference, WHITE)
    again = read_reference_mask(
        tmp_path / "ref_mask.png", None, (200, 150), (200, 150), "animation"
    )
    assert torch.equal(again.numbers, numbers_of(coloured(made().reference, WHITE)))


def test_files_without_a_mask_of_the_picture_have_none(tmp_path):
    np.savez(tmp_path / "plain.npz", masks=np.zeros((2, 8, 8), np.uint8))
    assert open_reference(tmp_path / "plain.npz") is None
    save_masks(tmp_path / "masks.zip", made(), BLACK)
    assert open_reference(tmp_path / "masks.zip") is None
    save_masks(tmp_path / "masks.mkv", made(), BLACK)
    assert open_reference(tmp_path / "masks.mkv") is None
    assert open_reference(tmp_path) is None
    huge = np.zeros((1, 10_000, 5_000), np.uint8)
    np.savez_compressed(tmp_path / "huge.npz", reference=huge)
    with pytest.raises(BadMedia, match="no picture has as many pixels"):
        open_reference(tmp_path / "huge.npz")


def test_the_same_masks_are_the_same_file(tmp_path):
    for suffix in (".npz", ".zip", ".mkv"):
        files = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for path in files:
            save_masks(path, made(frames=2), BLACK)
        assert files[0].read_bytes() == files[1].read_bytes()
    assert len(zipfile.ZipFile(tmp_path / "a.zip").namelist()) == 2


def test_a_folder_that_is_not_there_is_told(tmp_path):
    for suffix in (".npz", ".zip", ".mkv"):
        with pytest.raises(OutputError, match="written"):
            save_masks(tmp_path / "none" / f"a{suffix}", made(frames=2), BLACK)


# --- who is who


def test_files_that_were_sorted_by_area_are_mended_by_who(tmp_path, video):
    right = made().labels
    by_area = torch.tensor([0, 2, 1], dtype=torch.uint8)[right.int()]
    frames = coloured(by_area, BLACK)
    lossy = ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p"]
    np.savez(tmp_path / "masks.npz", masks=by_area.numpy())
    assert torch.equal(read(tmp_path / "masks.npz", video, who=(2, 1)), right)
    got = read(write_video(tmp_path / "masks.mp4", frames, lossy), video, who=(2, 1))
    for person in (1, 2):
        both, either = (got == person) & (right == person), (got == person) | (right == person)
        assert both.sum() / either.sum() > 0.93  # small persons: 0.97 at 512


def test_who_is_not_named_has_no_colour(tmp_path, video):
    np.savez(tmp_path / "masks.npz", masks=made().labels.numpy())
    got = read(tmp_path / "masks.npz", video, who=(2,))
    assert torch.equal(got == 1, made().labels == 2)
    assert got.max() == 1
    count = frame_count(video, None, None)
    mask = read_driving_mask(
        tmp_path / "masks.npz", video, None, count, SIZE, "replacement", who=(2,)
    )
    assert mask.persons == ("blue",)
    others = mask.colours[made().labels == 1]
    assert torch.equal(others, paint(torch.tensor(WHITE, dtype=torch.uint8)).expand_as(others))


def test_a_person_who_is_not_there_is_told(tmp_path, video):
    np.savez(tmp_path / "masks.npz", masks=made().labels.numpy())
    with pytest.raises(Exception, match=r"who names person 3; masks.npz shows 1 \(blue\) and 2"):
        read(tmp_path / "masks.npz", video, who=(3,))


def array(shape, kind):
    """An array of numpy's form whose numbers are not there."""
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


@pytest.mark.parametrize(
    "held",
    [
        b"", b"PK\x03\x04", b"no array", array((10**11,), "<f8"), array((-1,), "<f4"),
        array((10**6,), "<U64"), np.array(1j), np.array([[1.0, 2.0]]), np.array(np.nan),
        np.array(["a", "b"]), np.array(b"bytes"),
    ],
    ids=range(11),
)  # fmt: skip
def test_an_array_that_was_swapped_for_the_hash_of_the_picture_ends_in_a_sentence(tmp_path, held):
    save_masks(tmp_path / "m.npz", made(), BLACK)
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        kept = {one: archive.read(one) for one in archive.namelist()}
    file = io.BytesIO()
    if not isinstance(held, bytes):
        np.lib.format.write_array(file, held)
    kept["image_sha256.npy"] = held if isinstance(held, bytes) else file.getvalue()
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        for one, data in kept.items():
            archive.writestr(one, data)
    with pytest.raises(BadMedia, match=r"^bad\.npz is damaged: ") as told:
        made_of(tmp_path / "bad.npz")
    assert len(str(told.value)) < 200
