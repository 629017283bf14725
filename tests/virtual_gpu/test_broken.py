"""Kernels that were broken in one place are found out."""

import pytest

from kernels.arch import SM89
from tests.support.compiled import QUICK_ARCHS, STATE, compiled
from virtual_gpu.broken import KINDS
from virtual_gpu.cases import table
from virtual_gpu.verdict import every_break, found_out, is_unread, sample


@pytest.fixture(scope="module")
def everything():
    compiled(*((spec, arch) for arch in QUICK_ARCHS for spec in table(arch)))
    return every_break(QUICK_ARCHS, STATE)


def survivors(chosen):
    """Those that nothing was found wrong with, and when that is right."""
    unseen = [(n, one) for n, one in enumerate(chosen, 1) if found_out(one, STATE, n) is None]
    missed = [one for n, one in unseen if not is_unread(one, STATE, n)]
    return [f"{one}. Nothing changes if {one.place.kind.harmless}" for one in missed]


def test_places_of_every_kind_are_found(everything):
    assert {one.place.kind.name for one in everything} == {kind.name for kind in KINDS}
    assert all(one.place.applied(one.text) != one.text for one in everything)


def test_most_of_a_few_broken_kernels_are_found_out(everything):
    chosen = sample(everything, 40, seed=1)
    assert len(chosen) == 40
    assert len(survivors(chosen)) <= 2  # of 40 there is one of each kind, most of them rare


def test_a_value_that_nobody_reads_is_told_from_one_that_matters(everything):
    """Rows of 5120 are rotated in 8192 lanes: some exchanges there are of zeros alone."""
    places = [one for one in everything if one.spec.name == "quantize.i8r_5120"
              and one.arch is SM89 and one.place.kind.name == "another lane"]  # fmt: skip
    chosen = places[:: len(places) // 12]
    told = {one.place.line: is_unread(one, STATE, 900 + n) for n, one in enumerate(chosen)}
    assert {*told.values()} == {True, False}
    for n, one in enumerate(chosen):
        if told[one.place.line]:
            assert found_out(one, STATE, 900 + n) is None


@pytest.mark.slow
def test_at_least_98_of_100_broken_kernels_are_found_out(everything):
    chosen = sample(everything, 400, seed=2)
    missed = survivors(chosen)
    print(*missed, sep="\n")
    assert len(missed) <= 8
