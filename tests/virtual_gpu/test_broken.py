"""Kernels that were broken in one place are found out."""

import pytest

from kernels.arch import ARCHS
from tests.support.compiled import STATE, compiled
from virtual_gpu.broken import KINDS
from virtual_gpu.cases import table
from virtual_gpu.verdict import every_break, found_out, sample


@pytest.fixture(scope="module")
def everything():
    compiled(*((spec, arch) for arch in ARCHS for spec in table(arch)))
    return every_break(ARCHS, STATE)


def survivors(chosen):
    """Those that nothing was found wrong with, and when that is right."""
    missed = [one for n, one in enumerate(chosen, 1) if found_out(one, STATE, n) is None]
    return [f"{one}. Nothing changes if {one.place.kind.harmless}" for one in missed]


def test_places_of_every_kind_are_found(everything):
    assert {one.place.kind.name for one in everything} == {kind.name for kind in KINDS}
    assert all(one.place.applied(one.text) != one.text for one in everything)


def test_most_of_a_few_broken_kernels_are_found_out(everything):
    chosen = sample(everything, 40, seed=1)
    assert len(chosen) == 40
    assert len(survivors(chosen)) <= 2  # of 40 there is one of each kind, most of them rare


@pytest.mark.slow
def test_at_least_98_of_100_broken_kernels_are_found_out(everything):
    chosen = sample(everything, 400, seed=2)
    missed = survivors(chosen)
    print(*missed, sep="\n")
    assert len(missed) <= 8
