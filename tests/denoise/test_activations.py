"""What is known of the bytes that denoising takes holds against the code itself.

The truth is counted: the code runs on the meta device, where a tensor has a size and no memory,
with the real launchers and a bank that launches nothing.
"""

from dataclasses import replace

import pytest
import torch

from engine.config import SCAIL2_14B, SCAIL_1_3B, SCAIL_14B
from engine.denoise.activations import (
    Tokens,
    Width,
    allocator_gap,
    largest_moment,
    most_bytes,
    walk_block,
    walk_clip,
    walk_embedding,
)
from engine.denoise.block import BlockWeights, ContextKeys, assemble, run_block
from engine.denoise.contexts import KEPT_TEXT_BYTES
from engine.denoise.cuda_graphs import FEWEST_REPLAYS, GraphedBlocks
from engine.denoise.packaged import PackagedDenoiser, outside_the_blocks, video_first
from engine.denoise.sampler import grid
from engine.flow import Conditions, Recipe, Roles
from engine.machine.allocator import CachingAllocator, Card, Counter
from engine.machine.ladder import LADDER
from engine.memory import (
    ALLOWANCES,
    GAP_BYTES,
    SMALL_BYTES,
    ClipShape,
    EncoderBytes,
    Running,
    next_rung,
    plan,
)
from engine.models.dit import Rope
from kernels.arch import SM89
from kernels.cross_attention import CrossKeys
from kernels.ops import native_ops, plain_attention
from tests.support.live_memory import Live, NoLaunches, Pool
from tests.support.planned_clips import (
    ENCODERS,
    FEW_LAYERS,
    FREE,
    GUIDED,
    LATE,
    PLAIN,
    PRODUCTION,
    REAL,
    SHORT,
    SOME_LAYERS,
    SOME_LAYERS_SCAIL2,
    MetaPackage,
    manifest_of,
    meta,
    shape_of,
)

# --- the tables against the code


def flash(q, k, v):
    """PyTorch's attention of 16 bits on a GPU, on tensors without memory."""
    q, k, v = (side.transpose(0, 1)[None] for side in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0][0].transpose(0, 1)


def ops_of(bits):
    ops = native_ops(NoLaunches(), SM89)
    return ops if bits == 8 else plain_attention(ops, flash)


def count_block(model, ffn, tokens, bits):
    package = MetaPackage(manifest_of(replace(model, layers=1), ffn))
    ops, bf16 = ops_of(bits), {"dtype": torch.bfloat16}
    with Recorder() as live:
        weights = assemble(BlockWeights, lambda name: package.tensor(f"blocks.0.{name}"))
        text, vision = (
            CrossKeys(meta(n, model.dim, **bf16), meta(n, model.dim, **bf16), meta(n))
            for n in (512, 320)
        )
        rope = Rope(meta(tokens, 1, 64), meta(tokens, 1, 64))
        modulation, x = meta(6, model.dim), meta(tokens, model.dim)
        before = live.now
        live.events.clear()
        run_block(ops, weights, ContextKeys(text, vision), x, modulation, rope)
    return live.peak - before, [nbytes for sign, _, nbytes in live.events if sign > 0]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens", [300, 1500, 29757, 48832, 95920])
@pytest.mark.parametrize(("model", "ffn"), [(SCAIL_14B, 13824), (SCAIL_1_3B, 8960)])
def test_the_largest_moment_of_a_block_is_what_its_launchers_allocate(model, ffn, tokens, bits):
    got = largest_moment(Width(model.dim, ffn, bits), tokens)
    counted, _ = count_block(model, ffn, tokens, bits)
    assert got == pytest.approx(counted, rel=0.01)


def test_attention_in_16_bits_needs_no_more_than_that_in_8():
    """Its q, k and v in FP32 at once would be another 9.5 GB."""
    wide, usual = (largest_moment(Width(5120, 13824, bits), 48832) for bits in (16, 8))
    assert wide < usual < 2.3e9
    for bits in (8, 16):  # and the plan asks for that of the attention at hand
        found = plan(REAL, shape_of("512x896"), ENCODERS, FREE[141], Running(bits)).footprint
        assert found.course.width == Width(5120, 13824, bits)


def conditions_of(model, shape, text):
    """All that a model is told of a clip, without memory."""
    time, height, width = shape.grid[0], shape.height // 8, shape.width // 8
    half, further = (time, height // 2, width // 2), (shape.references, height, width)
    roles = Roles(
        "animation",
        reference=meta(28, 1, height, width),
        driving=meta(28, *half),
        additional=meta(16, *further),
        additional_masks=meta(28, *further),
    )
    return Conditions(
        text,
        2 * text if shape.contexts == 2 else None,
        meta(257, model.clip_dim),
        meta(16, 1, height, width),
        meta(16, *half),
        roles if model.mask_dim else None,
    )


def count_denoising(manifest, shape, rung, bits, streaming=None):
    """The most bytes in the steps that make all graphs, of so many that graphs are made."""
    steps = 2 * (FEWEST_REPLAYS + 1)
    first = range(3)
    asked = first if shape.unseen == "never" else (*first, *(steps // 2 + step for step in first))
    recipe = Recipe("euler", steps, 2.0 if shape.contexts == 2 else 1.0, 5.0)
    share = {"never": (0.0, 1.0), "last": (0.0, 0.5), "first": (0.5, 1.0)}[shape.unseen]
    recipe = replace(recipe, pose_from=share[0], pose_until=share[1])
    package = MetaPackage(manifest)
    time = shape.grid[0]
    height, width = shape.height // 8, shape.width // 8
    with torch.inference_mode(), Live() as live:
        conditions = conditions_of(manifest.model, shape, torch.ones(shape.text_tokens, 4096))
        pool = Pool(live)
        graphed = (lambda steps: GraphedBlocks(steps, pool)) if rung.graphs else None
        denoiser = PackagedDenoiser(package, ops_of(bits), graphed, loads=streaming is None)
        denoiser.stream(streaming)
        denoiser.home.settle(stays=True)
        denoiser.kept.keep(weights=rung.contexts_stay, texts=rung.texts_stay)
        velocity = denoiser.bind(conditions, recipe)
        latents = meta(16, time, height, width)
        timesteps = grid(recipe.sampler, steps, recipe.shift).timesteps
        for step in asked:
            latents = latents - velocity(latents, range(time), step, timesteps[step])
    return live.peak


@pytest.mark.parametrize(
    ("changes", "recorded", "stay", "bits"),
    [
        (PLAIN, False, False, 8),
        (PRODUCTION, False, False, 8),
        (GUIDED, True, False, 8),
        (GUIDED, True, True, 8),
        (PRODUCTION, True, True, 8),
        (LATE, True, False, 8),
        (PRODUCTION, False, False, 16),
        (LATE, True, False, 16),
    ],
    ids=str,
)
def test_the_peak_while_denoising_is_what_the_denoiser_allocates(changes, recorded, stay, bits):
    """Once the weights of the contexts stay, once they are read and dropped block by block."""
    # in 16 bits q and k are made in pieces, which takes the meta device long for a large clip
    shape = shape_of("512x896", frames=81 if bits == 8 else 13, **changes)
    layers = SOME_LAYERS if bits == 8 else FEW_LAYERS
    found = plan(layers, shape, EncoderBytes(0, 0, 0), FREE[141], Running(bits))
    assert found.rung == LADDER[0]
    assert_counted(layers, found, recorded, stay, bits)


@pytest.mark.parametrize(
    ("changes", "references", "recorded", "bits"),
    [
        (PLAIN, 0, False, 8),
        (PLAIN, 2, True, 8),
        (GUIDED, 2, True, 8),
        (GUIDED, 4, False, 8),
        (LATE, 2, True, 8),
        (PLAIN, 2, False, 16),
    ],
    ids=str,
)
def test_masks_and_further_pictures_take_what_the_plan_says(changes, references, recorded, bits):
    shape = shape_of("512x896", frames=81 if bits == 8 else 13, references=references, **changes)
    layers = SOME_LAYERS_SCAIL2
    found = plan(layers, shape, EncoderBytes(0, 0, 0), FREE[141], Running(bits))
    assert_counted(layers, found, recorded, False, bits)


def assert_counted(layers, found, recorded, stay, bits):
    shape = found.shape
    while found.rung.graphs is not recorded or found.rung.texts_stay is not stay:
        found = next_rung(found, "denoise")
    gap = max(0, gap_of(found) - GAP_BYTES)
    got = found.peaks["denoise"] - ALLOWANCES - found.footprint.weights.rounding - gap
    if found.rung.texts_stay:
        got -= KEPT_TEXT_BYTES  # these texts are the clip's own, which is counted with it
    assert got == pytest.approx(count_denoising(layers, shape, found.rung, bits), rel=0.01)


@pytest.mark.parametrize("layers", [SOME_LAYERS, SOME_LAYERS_SCAIL2], ids=["preview", "scail2"])
@pytest.mark.parametrize(
    ("name", "changes", "resident"),
    [
        ("416x672", PLAIN, 0),
        ("416x672", GUIDED, 4),
        ("512x896", PRODUCTION, 2),
        ("512x896", GUIDED, 0),
        ("704x1280", GUIDED, 1),
    ],
    ids=str,
)
def test_a_step_with_its_ring_is_what_the_denoiser_allocates(layers, name, changes, resident):
    """Every tensor of the steps, the blocks that stay and those that pass, to 3 %."""
    shape = shape_of(name, **changes)
    room = plan(layers, shape, EncoderBytes(0, 0, 0), FREE[141])
    while not room.rung.streams:
        room = next_rung(room, "denoise")
    rest = room.peaks["denoise"] - blocks_in(room) * room.footprint.weights.block
    free = rest + (3 + resident) * room.footprint.weights.block
    found = plan(layers, shape, EncoderBytes(0, 0, 0), free)
    assert found.rung.streams
    assert (found.streaming.resident, found.streaming.depth) == (resident, 3)
    gap = max(0, gap_of(found) - GAP_BYTES)
    got = found.peaks["denoise"] - ALLOWANCES - gap
    counted = count_denoising(layers, shape, found.rung, 8, found.streaming)
    assert got == pytest.approx(counted, rel=0.03)


def blocks_in(found):
    """The blocks on the GPU while others are streamed."""
    return found.streaming.resident + found.streaming.depth


def gap_of(found):
    """The bytes that the allocator's model has for a plan."""
    course, running = found.footprint.course, found.footprint.running
    course = course if found.rung.graphs else course.launched
    return allocator_gap(course, expandable=running.expandable)


# --- the allocator's gap


class Recorder(Live):
    """Writes down what the code takes and gives back, in order: (+1 or -1, name, bytes)."""

    def __init__(self):
        super().__init__()
        self.events = []

    def _see(self, storage):
        is_new = id(storage) not in self._known
        super()._see(storage)
        if is_new:
            self.events.append((1, id(storage), storage.nbytes()))

    def _forget(self, key, nbytes):
        super()._forget(key, nbytes)
        self.events.append((-1, key, nbytes))


def replay(events, card, expandable):
    """Takes and gives what was written down, with an allocator."""
    allocator, held = CachingAllocator(card, expandable=expandable), {}
    for sign, name, nbytes in events:
        if sign > 0:
            held[name] = allocator.take(nbytes)
        elif name in held:
            allocator.give(held.pop(name))


def recorded_evaluations(model, shape, bits, kinds):
    """The events of two evaluations of each kind, by the code on the meta device."""
    manifest = manifest_of(replace(model, layers=2), 13824)
    recipe = Recipe("euler", 50, 1.0, 5.0, pose_until=0.5)
    time, height, width = shape.grid[0], shape.height // 8, shape.width // 8
    conditions = conditions_of(model, shape, torch.ones(4, 4096))
    timesteps = grid(recipe.sampler, recipe.steps, recipe.shift).timesteps
    with torch.inference_mode(), Recorder() as recorder:
        denoiser = PackagedDenoiser(MetaPackage(manifest), ops_of(bits))
        velocity = denoiser.bind(conditions, recipe)
        latents = meta(16, time, height, width)
        for step in kinds:  # makes tables, which stay
            velocity(latents, range(time), step, timesteps[step])
        recorder.events.clear()
        for step in kinds:
            for _ in range(2):
                velocity(latents, range(time), step, timesteps[step])
    return recorder.events


@pytest.mark.parametrize("expandable", [False, True], ids=["usual", "expandable"])
@pytest.mark.parametrize(
    ("model", "size", "frames", "bits", "references"),
    [(SCAIL_14B, (512, 896), 81, 8, 0), (SCAIL_14B, (704, 1280), 77, 8, 0),
     (SCAIL_14B, (64, 96), 5, 8, 0), (SCAIL_14B, (256, 448), 33, 16, 0),
     (SCAIL2_14B, (512, 896), 81, 8, 0), (SCAIL2_14B, (704, 1280), 77, 8, 2),
     (SCAIL2_14B, (64, 96), 5, 8, 4), (SCAIL2_14B, (256, 448), 33, 16, 1)],
)  # fmt: skip
def test_an_allocator_with_the_planned_bytes_runs_what_the_code_does(
    model, size, frames, bits, references, expandable
):
    shape = ClipShape(*size, frames, unseen="last", evaluations=(3, 3), references=references)
    found = plan(manifest_of(model, 13824), shape, ENCODERS, FREE[141], Running(bits, expandable))
    planned = most_bytes(found.footprint.course) + max(GAP_BYTES, gap_of(found)) + SMALL_BYTES
    events = recorded_evaluations(model, shape, bits, (0, 25))
    replay(events, Card(planned), expandable)  # raises `Full` where it does not fit


class Sizes(Counter):
    """Writes down the bytes of each tensor that is walked through."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def take(self, nbytes):
        self.taken.append(nbytes)
        return super().take(nbytes)


@pytest.mark.parametrize("tokens", [300, 48832])
def test_each_tensor_of_a_block_is_walked_through_in_its_size(tokens):
    """All but those below a thousandth of the tokens."""
    walked, (_, taken) = Sizes(), count_block(SCAIL_14B, 13824, tokens, 8)
    walk_block(walked, Width(5120, 13824), tokens, tokens)
    least = max(4 * 5120 * tokens / 1000, 4 * 6 * 5120)
    assert sorted(n for n in walked.taken if n > least) == sorted(n for n in taken if n > least)


SWEEP = [(h, w, frames) for h, w in ((416, 672), (512, 896), (704, 1280), (96, 160))
         for frames in (5, 33, 61, 81, 121)]  # fmt: skip


@pytest.mark.parametrize("expandable", [False, True], ids=["usual", "expandable"])
def test_the_plan_counts_the_gap_of_the_model_whatever_the_tokens(expandable):
    gaps = []
    for height, width, frames in SWEEP:
        for changes in (SHORT, PRODUCTION, LATE):
            shape = ClipShape(height, width, frames, **changes)
            found = plan(REAL, shape, ENCODERS, 10**13, Running(expandable=expandable))
            fp, gap = found.footprint, gap_of(found)
            gaps.append(gap)
            idle = (
                ALLOWANCES
                - GAP_BYTES
                + fp.weights.outside
                + fp.weights.blocks
                + fp.weights.rounding
                + fp.vision
                + fp.vae
            )
            kept = fp.contexts + fp.tables + fp.latents
            denoise = found.peaks["denoise"]
            assert denoise >= idle + kept + most_bytes(fp.course) + gap
            course = fp.course
            fits = kept_bytes(course) + most_bytes(course) + gap
            walk_clip(Card(fits), course, expandable=expandable)
    assert max(gaps) > 2 * GAP_BYTES  # no constant would do
    assert min(gaps) < GAP_BYTES / 4


def kept_bytes(course):
    return sum(nbytes * count for nbytes, count in course.kept)


def test_segments_that_grow_need_less_at_the_size_of_training():
    shape = shape_of("512x896", **PRODUCTION)
    usual, growing = (
        plan(REAL, shape, ENCODERS, FREE[141], Running(expandable=expandable))
        for expandable in (False, True)
    )
    assert usual.rung == growing.rung
    assert gap_of(growing) <= GAP_BYTES < gap_of(usual)
    assert usual.peaks["denoise"] - growing.peaks["denoise"] == gap_of(usual) - GAP_BYTES


@pytest.mark.parametrize("sees", [True, False], ids=["skeleton", "unseen"])
@pytest.mark.parametrize(
    ("model", "references"), [(SCAIL_14B, 0), (SCAIL2_14B, 0), (SCAIL2_14B, 2), (SCAIL2_14B, 4)]
)
def test_making_tokens_takes_what_is_walked(model, references, sees):
    """At no other moment do masks and further pictures differ from what a block takes."""
    shape = shape_of("512x896", references=references)
    package = MetaPackage(manifest_of(replace(model, layers=0), 13824))
    outside = outside_the_blocks(package, package)
    told = conditions_of(model, shape, torch.ones(1, 4096))
    pose = told.pose if sees else None
    latents = meta(16, shape.grid[0], shape.height // 8, shape.width // 8)
    time, area = shape.grid
    with torch.inference_mode(), Live() as live:
        before = area * (1 + references)
        x = video_first(
            outside.embed(latents, told.reference, pose, roles=told.roles), before, area * time
        )
        total = len(x)
    counter = Counter()
    width = Width(model.dim, model.ffn, takes_roles=bool(model.mask_dim))
    tokens = Tokens(
        area * (1 + references + time), sees * area * time // 4, area * time, area * references
    )
    assert total == tokens.total
    walk_embedding(counter, width, tokens)
    assert counter.peak == pytest.approx(live.peak, rel=0.005)
    assert counter.now == live.now == 4 * model.dim * total
