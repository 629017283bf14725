"""A proof keeps what was measured and what failed, and its report says both."""

from pathlib import Path

import pytest
import torch

from kernels.arch import ARCHS, SM90
from kernels.gemm import GEMM
from tests.support.compiled import STATE, compiled
from virtual_gpu.bank import VirtualBank, WrongKernel
from virtual_gpu.cases import table
from virtual_gpu.edges import edges
from virtual_gpu.measure import Check
from virtual_gpu.orders import UNWATCHED
from virtual_gpu.proof import Breaks, Proven, Row, _take
from virtual_gpu.report import report

ROOT = Path(__file__).resolve().parents[2]
NAME = GEMM["fp8"].bias.name


@pytest.fixture
def proven():
    (cubin,) = compiled((GEMM["fp8"].bias, SM90))
    return Proven("sm90", {NAME: Row(cubin, launches=3)})


def test_the_error_that_is_nearest_to_its_limit_is_kept(proven):
    near = Check(NAME, "17 x 256", "error", 0.8e-4, 1e-4)
    far = Check(NAME, "1 x 256", "error", 5e-4, 1e-2)
    codes = [Check(NAME, "17 x 256", "wrong codes", found, 0) for found in (0.0, 2.0)]
    _take(proven, iter([far, near, far, *codes]))
    row = proven.rows[NAME]
    assert (row.worst, row.checks, row.wrong_codes) == (near, 5, 2)
    assert proven.failures == [f"sm90, {codes[1]}"]


@pytest.mark.parametrize("found", [1.1e-4, float("nan"), float("inf")])
def test_an_error_beyond_its_limit_is_a_failure(proven, found):
    _take(proven, iter([Check(NAME, "17 x 256", "error", found, 1e-4)]))
    assert len(proven.failures) == 1


def test_what_stops_a_kernel_is_a_failure(proven):
    def checks():
        yield Check(NAME, "17 x 256", "error", 0.0, 1e-4)
        raise WrongKernel("race: shared offset 0")

    _take(proven, checks())
    assert proven.rows[NAME].checks == 1
    assert proven.failures == ["race: shared offset 0"]


def test_the_report_tells_kernels_failures_notes_and_survivors(proven):
    proven.failures.append("it failed")
    proven.notes.append("it wrote twice")
    breaks = Breaks({"no barrier": (3, 4)}, ["gemm, PTX line 7: no barrier. Harmless if"], 1234)
    text = report([proven], breaks)
    registers, loop = proven.rows[NAME].cubin.registers, proven.rows[NAME].cubin.loop
    assert f"| {NAME} | {registers} | " in text and f" | {loop.instructions} | 3 | " in text
    for sentence in (
        "- FAILED: it failed", "- note: it wrote twice", "| no barrier | 3 of 4 |",
        "1,234 places can be broken; 4 were", "- not found out: gemm, PTX line 7",
    ):  # fmt: skip
        assert sentence in text
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_the_proof_that_is_kept_names_every_kernel_and_no_failure():
    """`make proof` writes it again after a change to the kernels."""
    text = (ROOT / "docs" / "proof.md").read_text("utf-8")
    assert "FAILED" not in text
    for arch in ARCHS:
        part = text.partition(f"## {arch.name}\n")[2].partition("\n## ")[0]
        rows = [line.split(" | ")[0].strip("| ") for line in part.splitlines() if "| " in line]
        assert sorted(rows[1:]) == sorted(spec.name for spec in table(arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_the_last_block_of_the_longest_clip_has_the_right_addresses(arch, monkeypatch):
    # tensors of gigabytes, most of which is never touched
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    bank = VirtualBank(arch, STATE, [UNWATCHED])
    assert [str(check) for check in edges(bank) if not check.holds] == []
