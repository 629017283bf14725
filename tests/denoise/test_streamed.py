"""Streamed blocks give the velocity of blocks that stay, to the bit, wherever they come from."""

from dataclasses import replace

import pytest
import torch

from engine.config import NANO
from engine.denoise.block import BlockWeights, assemble, tensor_names
from engine.denoise.cuda_graphs import GraphedBlocks
from engine.denoise.packaged import PackagedDenoiser
from engine.denoise.packed import SPARE_BYTES, PinnedBlocks, StoredBlocks, kept_on_host, pack
from engine.denoise.sampler import grid
from engine.denoise.schedule import Streaming, streamed_blocks
from engine.denoise.streamed import StreamedBlocks
from engine.errors import BadPackage
from engine.flow import Conditions, Recipe
from engine.machine.host_memory import HostMemory
from engine.machine.transfers import HostTransfers
from engine.machine.upload import PackageWeights
from engine.package.folder import open_package
from kernels.arch import SM90
from kernels.launch import DriverError
from kernels.ops import reference_ops
from tests.support.nano_clips import nano_package
from tests.support.planned_clips import REAL, MetaPackage

CPU = torch.device("cpu")
RECIPE = Recipe("euler", 2, 2.0, 5.0, pose_until=0.5)
WAYS = [Streaming(0, 2), Streaming(2, 3), Streaming(5, 3)]


@pytest.fixture(scope="module")
def package():
    return open_package(nano_package(SM90))


def pinned(stored):
    return PinnedBlocks(stored, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONDITIONS = Conditions(
    draw(7, NANO.text_dim, seed=1),
    draw(5, NANO.text_dim, seed=2),
    draw(17, NANO.clip_dim, seed=3),
    draw(16, 1, 4, 4, seed=4),
    draw(16, 2, 2, 2, seed=5),
)


def velocities(denoiser, recipe=RECIPE):
    times = grid(recipe.sampler, recipe.steps, recipe.shift).timesteps
    velocity = denoiser.bind(CONDITIONS, recipe)
    latents = draw(16, 2, 4, 4, seed=6)
    made = []
    for step, told in enumerate(times):
        made.append(velocity(latents, range(2), step, told))
        latents = latents - 0.3 * made[-1]
    return torch.stack(made)


@pytest.fixture(scope="module")
def want(package):
    return velocities(PackagedDenoiser(PackageWeights(package, CPU), reference_ops()))


@pytest.mark.parametrize("source", [pinned, lambda stored: stored], ids=["pinned", "file"])
@pytest.mark.parametrize("streaming", WAYS, ids=str)
def test_a_clip_with_streamed_blocks_is_the_same_to_the_bit(package, want, streaming, source):
    weights = PackageWeights(package, CPU)
    denoiser = PackagedDenoiser(weights, reference_ops(), loads=False, streams_from=source)
    denoiser.stream(streaming)
    for stays in (True, False):  # between clips the blocks stay, or they come for each
        denoiser.home.settle(stays=stays)
        with denoiser.home.present():
            assert torch.equal(velocities(denoiser), want)


def test_what_is_decided_may_change_from_clip_to_clip(package, want):
    denoiser = PackagedDenoiser(PackageWeights(package, CPU), reference_ops(), streams_from=pinned)
    for streaming in (None, WAYS[0], WAYS[1], None, WAYS[1], WAYS[1]):
        denoiser.stream(streaming)
        denoiser.home.settle(stays=True)
        assert torch.equal(velocities(denoiser), want)


def test_streamed_steps_are_launched_even_where_graphs_are_wanted(package, want):
    recorded = []
    denoiser = PackagedDenoiser(
        PackageWeights(package, CPU),
        reference_ops(),
        lambda runner: GraphedBlocks(runner, recorded.append),
    )
    denoiser.stream(WAYS[1])
    denoiser.home.settle(stays=True)
    denoiser.use_graphs(True)
    velocities(denoiser, replace(RECIPE, steps=18))
    assert recorded == []


def test_a_clip_that_ended_halfway_changes_nothing_of_the_next(package, want):
    denoiser = PackagedDenoiser(PackageWeights(package, CPU), reference_ops(), loads=False)
    denoiser.stream(Streaming(1, 2))
    denoiser.home.settle(stays=True)
    ops, calls = denoiser._ops, []

    def fail(*given):
        calls.append(given)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return ops.attention(*given)

    denoiser._use(replace(ops, attention=fail))
    with pytest.raises(KeyboardInterrupt):
        velocities(denoiser)
    denoiser._use(ops)
    assert torch.equal(velocities(denoiser), want)


def test_a_block_in_one_piece_has_the_tensors_of_the_package(package):
    weights = PackageWeights(package, CPU)
    stored = StoredBlocks(weights, [pack(weights, n) for n in range(NANO.layers)])
    for n, layout in enumerate(stored.layouts):
        memory = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
        stored.fill(n, memory)
        got = layout.weights(memory)
        want = assemble(BlockWeights, lambda name: package.read(f"blocks.{n}.{name}"))  # noqa: B023
        assert torch.equal(got.qkv.rows.q, want.qkv.rows.q)
        assert torch.equal(got.down.bias, want.down.bias)
        assert torch.equal(got.modulation, want.modulation)
        assert got.up.form == want.up.form
        assert all(start % 256 == 0 for start, _ in layout.places.values())
        assert [*layout.places] == [f"blocks.{n}.{name}" for name in tensor_names(BlockWeights)]


class Damaged(PackageWeights):
    """Fails at a block, in the thread that copies."""

    def fill(self, places, **changes):
        if any(name.startswith("blocks.4.") for name in places):
            raise BadPackage("weights.bin is damaged: blocks.4.qkv.q")
        super().fill(places, **changes)


def test_a_block_that_cannot_be_read_ends_the_step_with_the_sentence_that_says_so(package):
    weights = Damaged(package, CPU)
    stored = StoredBlocks(weights, [pack(weights, n) for n in range(NANO.layers)])
    blocks = StreamedBlocks(stored, Streaming(0, 2), HostTransfers(), CPU)
    got = []
    with pytest.raises(BadPackage, match=r"damaged: blocks\.4"):
        for held in blocks:
            got.append(held)
    assert len(got) == 4
    blocks.close()


def test_a_block_that_stays_and_did_not_arrive_is_used_in_no_later_step(package):
    weights = Damaged(package, CPU)
    stored = StoredBlocks(weights, [pack(weights, n) for n in range(NANO.layers)])
    streaming = Streaming(NANO.layers - 1, 2)
    assert 4 not in streamed_blocks(NANO.layers, streaming.resident)
    blocks = StreamedBlocks(stored, streaming, HostTransfers(), CPU)
    for _ in range(2):
        with pytest.raises(BadPackage, match=r"damaged: blocks\.4"):
            list(blocks)
    blocks.close()


# --- where they are kept


def stored_of(package):
    weights = PackageWeights(package, CPU)
    return StoredBlocks(weights, [pack(weights, n) for n in range(NANO.layers)])


def plain(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8)


def test_blocks_are_pinned_where_the_host_has_room_and_read_where_it_has_not(package, caplog):
    stored = stored_of(package)
    enough = stored.nbytes + SPARE_BYTES
    assert isinstance(kept_on_host(stored, HostMemory(enough, "the machine"), plain), PinnedBlocks)
    assert caplog.text == ""
    short = kept_on_host(stored, HostMemory(enough - 1, "the container's limit"), plain)
    assert isinstance(short, StoredBlocks)
    assert "of pinned memory with 2.1 GB to spare, and the container's limit leaves" in caplog.text
    assert short._cached == NANO.layers - 1


def test_a_system_that_pins_no_more_is_told_and_blocks_are_read(package, caplog):
    """As WSL2: what was pinned is given back."""
    held = []

    def pin(nbytes):
        if len(held) == 3:
            raise DriverError("cuMemHostRegister_v2 failed: CUDA_ERROR_OUT_OF_MEMORY (2)", 2)
        held.append(plain(nbytes))
        return held[-1]

    source = kept_on_host(stored_of(package), HostMemory(10**12, "the machine"), pin)
    assert isinstance(source, StoredBlocks)
    assert "the system refuses it: cuMemHostRegister_v2 failed" in caplog.text
    assert source._cached == NANO.layers


def test_14b_wants_less_than_14_gb_of_pinned_memory():
    package = MetaPackage(REAL)
    nbytes = sum(pack(package, n).nbytes for n in range(40))
    assert 11.9e9 < nbytes < 14e9
    assert nbytes == PackagedDenoiser(package, reference_ops(), loads=False).block_bytes


def test_blocks_that_have_room_in_the_page_cache_go_through_it_and_others_past_it(package):
    class Seen(PackageWeights):
        def fill(self, places, *, through_cache=False):
            seen.append(through_cache)

    seen = []
    weights = Seen(package, CPU)
    stored = StoredBlocks(weights, [pack(weights, n) for n in range(NANO.layers)], cached=2)
    for n in range(4):
        stored.fill(n, plain(1))
    assert seen == [True, True, False, False]
