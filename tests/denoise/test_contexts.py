"""What is kept of text and picture between clips: keys are the same to the bit, reading ends."""

import pytest
import torch

from engine.config import TINY
from engine.denoise import contexts
from engine.denoise.block import ContextWeights, tensor_names
from engine.denoise.contexts import Contexts
from engine.denoise.packaged import PackagedDenoiser
from engine.errors import BadPackage
from engine.machine.upload import PackageWeights
from engine.package.folder import open_package
from kernels.arch import SM90
from kernels.ops import reference_ops
from tests.support.built import tiny_package

CPU = torch.device("cpu")
LAYERS = TINY.layers
BOTH = [f"blocks.{n}.{name}" for n in range(LAYERS) for name in tensor_names(ContextWeights)]
PICTURE = [name for name in BOTH if ".text" not in name]


class Visits(PackageWeights):
    """Writes down the names that are asked for."""

    def __init__(self, package):
        super().__init__(package, CPU)
        self.asked = []

    def visit(self, names, take):
        names = [*names]
        self.asked.append(sorted(names))
        super().visit(names, take)


@pytest.fixture(scope="module")
def package():
    return open_package(tiny_package(SM90))


@pytest.fixture
def weights(package):
    return Visits(package)


@pytest.fixture
def denoiser(weights):
    made = PackagedDenoiser(weights, reference_ops())
    weights.asked.clear()
    return made


def text(seed, real=5, rows=512):
    made = torch.zeros(rows, TINY.text_dim)
    made[:real] = torch.randn(real, TINY.text_dim, generator=torch.Generator().manual_seed(seed))
    return made


def picture(seed):
    return torch.randn(257, TINY.clip_dim, generator=torch.Generator().manual_seed(seed))


def tensors_of(found):
    return [
        tensor
        for keys in found
        for side in (keys.text, keys.vision)
        for tensor in (side.k, side.v, side.bias)
    ]


def fresh(package, *told):
    """The keys that a denoiser makes which has seen nothing, and keeps nothing."""
    denoiser = PackagedDenoiser(PackageWeights(package, CPU), reference_ops())
    denoiser.kept.keep(weights=False, texts=False)
    return [tensors_of(found) for found in denoiser.contexts(*told)]


def assert_same(package, denoiser, *told):
    got = [tensors_of(found) for found in denoiser.contexts(*told)]
    for one, want in zip(got, fresh(package, *told), strict=True):
        assert len(one) == LAYERS * 6
        assert all(map(torch.equal, one, want))


# each clip: its texts and its picture
CLIPS = [
    ([text(1)], picture(1)),
    ([text(1)], picture(2)),  # another picture
    ([text(2), text(3)], picture(2)),  # two new texts
    ([text(3), text(1)], picture(3)),  # both known
    ([text(4), text(1)], picture(1)),  # one known
    ([text(5), text(5)], picture(1)),  # one text twice
    ([text(5, real=6)], picture(1)),  # the same beginning
    ([text(5, rows=5)], picture(1)),  # the same rows and no padding
    ([text(5, rows=6)], picture(1)),  # the same rows and one of padding
    ([torch.zeros(512, TINY.text_dim)], picture(1)),
]


@pytest.mark.parametrize("keeps", [(True, True), (False, True), (True, False), (False, False)])
def test_keys_are_the_same_to_the_bit_whatever_is_kept(package, denoiser, keeps):
    denoiser.kept.keep(weights=keeps[0], texts=keeps[1])
    for told in [*CLIPS, *CLIPS]:
        assert_same(package, denoiser, *told)


def test_nothing_is_read_again_while_the_weights_stay(weights, denoiser):
    for told in CLIPS:
        denoiser.contexts(*told)
    assert weights.asked == [sorted(BOTH)]


def test_a_known_text_needs_no_weights_of_its_own_where_they_are_read_for_each_clip(
    weights, denoiser
):
    denoiser.kept.keep(weights=False, texts=True)
    for told, read in zip(
        CLIPS, [BOTH, PICTURE, BOTH, PICTURE, BOTH, BOTH, BOTH, BOTH, BOTH, BOTH]
    ):
        weights.asked.clear()
        denoiser.contexts(*told)
        assert weights.asked == [sorted(read)]


def test_with_little_memory_all_is_read_for_each_clip(weights, denoiser):
    denoiser.contexts(*CLIPS[0])
    denoiser.kept.keep(weights=False, texts=False)
    weights.asked.clear()
    for _ in range(2):
        denoiser.contexts(*CLIPS[0])
    assert weights.asked == [sorted(BOTH)] * 2
    denoiser.kept.keep(weights=True, texts=True)  # the next clip is smaller
    for _ in range(3):
        denoiser.contexts(*CLIPS[0])
    assert weights.asked == [sorted(BOTH)] * 3


def kept_bytes(kept):
    return sum(map(contexts._nbytes, kept._texts.values()))


def test_texts_are_kept_within_their_bytes_and_the_last_used_stay(weights, denoiser, monkeypatch):
    denoiser.kept.keep(weights=False, texts=True)
    denoiser.contexts([text(1)], picture(1))
    one = kept_bytes(denoiser.kept)
    assert one == LAYERS * 64 * (2 * 2 * TINY.dim + 4)
    monkeypatch.setattr(contexts, "KEPT_TEXT_BYTES", 3 * one)
    for seed in (2, 3, 1, 4):  # 1 is used once more, so 2 is the oldest when 4 comes
        denoiser.contexts([text(seed)], picture(1))
        assert kept_bytes(denoiser.kept) <= 3 * one
    weights.asked.clear()
    for seed in (1, 3, 4, 2):
        denoiser.contexts([text(seed)], picture(1))
    assert weights.asked == [sorted(PICTURE)] * 3 + [sorted(BOTH)]
    denoiser.kept.keep(weights=False, texts=False)
    assert kept_bytes(denoiser.kept) == 0


def test_a_text_that_is_too_long_to_be_kept_is_made_all_the_same(
    package, weights, denoiser, monkeypatch
):
    monkeypatch.setattr(contexts, "KEPT_TEXT_BYTES", 1)
    for told in CLIPS:
        assert_same(package, denoiser, *told)
    assert kept_bytes(denoiser.kept) == 0


def test_reading_that_ends_halfway_leaves_nothing_and_is_begun_again(package, denoiser, weights):
    whole = weights.visit

    def halfway(names, take):
        whole([*names][: len(BOTH) // 2], take)
        raise torch.OutOfMemoryError

    weights.visit = halfway
    with pytest.raises(torch.OutOfMemoryError):
        denoiser.contexts(*CLIPS[0])
    weights.visit = whole
    for _ in range(2):
        assert_same(package, denoiser, *CLIPS[0])
    assert weights.asked[1:] == [sorted(BOTH)]
    assert denoiser.kept._held.keys() == {*BOTH}


def test_a_package_without_a_weight_of_the_contexts_is_refused_when_it_is_loaded(
    package, weights, denoiser
):
    more = Contexts(weights, LAYERS, denoiser._outside)
    assert more.keys(reference_ops(), *CLIPS[0])
    with pytest.raises(BadPackage, match=rf"has no tensor blocks\.{LAYERS}\."):
        Contexts(weights, LAYERS + 1, denoiser._outside)
