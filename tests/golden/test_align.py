"""Golden data of the alignment: what passes, what fails, and where the minimiser may stop early."""

import numpy as np
import pytest

from engine.golden import align as golden_align
from engine.pose.camera import base_camera

FILES = ("align_down_896x512", "align_central_512x896", "align_clean_336x208", "align_solver")


@pytest.mark.golden
@pytest.mark.parametrize("name", FILES)
def test_every_golden_check_passes(golden, name):
    checks = list(golden_align.checks(golden / "pose" / f"{name}.npz"))
    assert len(checks) >= 28
    assert [check for check in checks if not check.ok] == []


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "tensor", "damage", "failing"),
    [
        ("align_solver", "03_K", 1 + 2e-6, "K_new, focal"),
        ("align_solver", "03_ms", 1 + 2e-6, "K_new, focal"),
        ("align_solver", "08_p2", 2, "cost of the start"),
        ("align_clean_336x208", "K_new", 1 + 2e-6, "K_new, focal"),
        ("align_clean_336x208", "s", 1 + 2e-6, "K_new, vertical focal"),
        ("align_clean_336x208", "scale_face", 1 + 2e-6, "scale_face"),
        ("align_clean_336x208", "scaled_faces", 1 + 1e-4, "scaled_faces"),
        ("align_clean_336x208", "out_hands", 1 + 1e-4, "out_hands"),
        ("align_clean_336x208", "out_candidate", 1 + 1e-4, "out_candidate"),
        ("align_clean_336x208", "canvas2d_aligned", 0, "canvas2d_aligned"),
        ("align_clean_336x208", "frames_rgba_aligned", 0, "frames_rgba_aligned"),
        ("align_clean_336x208", "frames_rgba_aligned_no2d", 0, "no2d alpha pixels"),
        ("align_clean_336x208", "frames_rgba_unaligned", 0, "frames_rgba_unaligned, overlay"),
    ],
)
def test_a_damaged_golden_file_fails(golden, tmp_path, name, tensor, damage, failing):
    with np.load(golden / "pose" / f"{name}.npz") as file:
        arrays = dict(file)
    arrays[tensor] = (arrays[tensor] * damage).astype(arrays[tensor].dtype)
    np.savez(tmp_path / "other_name.npz", **arrays)
    failed = [c.check for c in golden_align.checks(tmp_path / "other_name.npz") if not c.ok]
    assert any(check.endswith(failing) for check in failed), failed


def stopped_early(arrays, index, share):
    """A copy whose minimiser stopped at this share of the way from the start to where it did."""
    key = f"{index:02d}_"
    height, width = arrays[key + "hw"]
    base = base_camera(int(height), int(width))
    m, s = 1 + share * (arrays[key + "ms"] - 1)
    camera = base.matrix + share * (arrays[key + "K"] - base.matrix)
    camera[0, 0], camera[1, 1] = base.fx * m, base.fx * m * s
    return dict(arrays) | {key + "ms": np.array([m, s]), key + "K": camera}


def failed(folder, arrays):
    np.savez(folder / "problems.npz", **arrays)
    return [c.check for c in golden_align.checks(folder / "problems.npz") if not c.ok]


@pytest.mark.golden
def test_a_few_fits_may_stop_early_between_start_and_optimum(golden, tmp_path):
    with np.load(golden / "pose" / "align_solver.npz") as file:
        arrays = dict(file)
    for index in (1, 3, 5):
        arrays = stopped_early(arrays, index, 0.9)
    assert failed(tmp_path, arrays) == []
    for index in (7, 9, 11):
        arrays = stopped_early(arrays, index, 0.9)
    assert failed(tmp_path, arrays) == ["problems.npz early stops"]
    one = failed(tmp_path, stopped_early(arrays, 1, -0.1))
    assert "problems.npz 01 stopped early, golden: cost of the start" in one


@pytest.mark.golden
def test_golden_files_are_known_by_their_tensors(golden):
    def known(name):
        with np.load(golden / "pose" / f"{name}.npz") as file:
            return golden_align.recognises(frozenset(file.files), {})

    assert [known(name) for name in (*FILES, "walk_336x208", "raw_cylinders")] == [True] * 4 + [
        False
    ] * 2
