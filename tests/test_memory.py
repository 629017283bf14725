"""Plans of memory: their tables hold against the code itself, and a GPU is used as far as it goes.

The truth is counted: the code runs on the meta device, where a tensor has a size and no memory,
with the real launchers and a bank that launches nothing.
"""

import re
from dataclasses import fields, replace
from math import prod
from pathlib import Path

import pytest
import torch

from engine.config import SCAIL_1_3B, SCAIL_14B, TINY
from engine.denoise.activations import (
    Width,
    allocator_gap,
    largest_moment,
    most_bytes,
    walk_clip,
)
from engine.denoise.block import (
    BlockWeights,
    ContextKeys,
    ContextWeights,
    Weight,
    assemble,
    run_block,
)
from engine.denoise.contexts import KEPT_TEXT_BYTES
from engine.denoise.cuda_graphs import FEWEST_REPLAYS, GraphedBlocks, is_recorded
from engine.denoise.packaged import TIME, PackagedDenoiser
from engine.denoise.sampler import grid
from engine.denoise.windows import evaluations_of_each, in_latents, windowed
from engine.errors import EngineError
from engine.flow import Conditions, Recipe
from engine.machine.allocator import CachingAllocator, Card
from engine.media.framing import frames_to_u8
from engine.memory import (
    ALLOWANCES,
    GAP_BYTES,
    LADDER,
    SMALL_BYTES,
    ClipShape,
    EncoderBytes,
    Running,
    next_rung,
    plan,
)
from engine.models.dit import Rope, Scail
from engine.models.vae import Vae
from engine.models.vae_decode import VaeDecoder
from engine.package.manifest import ITEM_BYTES, Entry
from engine.recipes import RECIPES
from kernels.arch import SM89
from kernels.channel_norm import channel_norm_reference
from kernels.cross_attention import CrossKeys
from kernels.ops import native_ops, plain_attention
from tests.support.live_memory import META, Live, NoLaunches, Pool
from tests.support.packages import MANIFEST

GB = 10**9
ENCODERS = EncoderBytes(text=9_262_000_000, vision=1_222_000_000, vae=253_785_062)
# Free on an empty card: what its driver shows, less what it keeps for itself.
FREE = {24: 24_080 * 2**20, 32: 32_100 * 2**20, 141: 143_200 * 2**20}
NAMED = {"416x672": (416, 672), "512x896": (512, 896), "704x1280": (704, 1280)}


class MetaPackage:
    """A package of the right names and shapes, and its `PackageWeights`: tensors on the meta
    device, zeros on the CPU for what stays there.
    """

    path, device = Path("meta"), META

    def __init__(self, manifest):
        self.package, self.manifest = self, manifest
        self.entries = {entry.name: entry for entry in manifest.tensors}
        self.names = tuple(self.entries)
        self.handed_over = set()

    def read(self, wanted):
        if isinstance(wanted, str):
            return torch.zeros(1).expand(self.entries[wanted].shape)  # gigabytes of one value
        held = {}
        self.visit(wanted, held.__setitem__)
        return held

    def visit(self, names, take):
        for name in names:
            self.handed_over.add(name)
            take(name, self.tensor(name))

    def tensor(self, name):
        entry = self.entries[name]
        return meta(*entry.shape, dtype=getattr(torch, entry.dtype))


def entries(model, ffn, codes="float8_e4m3fn"):
    """The tensors of a package, as the build names and orders them."""
    dim = model.dim
    with META:
        outside = Scail(replace(model, layers=0)).state_dict()
    found = []
    for name, tensor in outside.items():
        shape = (
            (dim, 80) if name.startswith("patch_embedding") and tensor.ndim > 1 else tensor.shape
        )
        is_large = len(shape) == 2 and prod(shape) >= 2**20
        found.append((name, "bfloat16" if is_large else "float32", tuple(shape)))
    sizes = {
        "text": (2 * dim, dim), "vision": (2 * dim, dim), "qkv": (3 * dim, dim), "o": (dim, dim),
        "cross_q": (dim, dim), "cross_o": (dim, dim), "up": (ffn, dim), "down": (dim, ffn),
    }  # fmt: skip
    tables = {"modulation": (6, dim), "smooth": (2, dim)}
    for kind in (ContextWeights, BlockWeights):
        for n in range(model.layers):
            for field in fields(kind):
                name = f"blocks.{n}.{field.name}"
                if field.type is Weight:
                    rows, width = sizes[field.name]
                    found.append((f"{name}.q", codes, (rows, width)))
                    found += [(f"{name}.{end}", "float32", (rows,)) for end in ("s", "bias")]
                else:
                    found.append((name, "float32", tables.get(field.name, (dim,))))
    return tuple(
        Entry(name, dtype, shape, 0, prod(shape) * ITEM_BYTES[dtype], "")
        for name, dtype, shape in found
    )


def manifest_of(model, ffn):
    return replace(MANIFEST, model=model, padded_ffn=ffn, tensors=entries(model, ffn))


REAL = manifest_of(SCAIL_14B, 13824)
SOME_LAYERS = manifest_of(replace(SCAIL_14B, layers=16), 13824)
FEW_LAYERS = manifest_of(replace(SCAIL_14B, layers=3), 13824)


def shape_of(name, **changes):
    return replace(ClipShape(*NAMED[name], frames=81), **changes)


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=META)


# --- what is known


def test_tokens_are_those_of_the_specification():
    assert [shape_of(name).tokens for name in NAMED] == [29757, 48832, 95920]


def test_the_weights_of_the_steps_are_those_of_the_specification():
    found = plan(REAL, shape_of("512x896"), ENCODERS, FREE[141]).footprint
    assert found.blocks == pytest.approx(11.96e9, rel=2e-3)
    # 40 blocks x (512 + 257 keys, in tiles of 64) x 2 x 5120 BF16, and a bias each
    assert found.contexts == 40 * (512 + 320) * (4 * 5120 + 4)
    guided = plan(REAL, shape_of("512x896", contexts=2), ENCODERS, FREE[141]).footprint
    assert guided.contexts == 40 * (2 * 512 + 320) * (4 * 5120 + 4)  # both see one picture
    # keys and values of both sides in 8 bits, with scales, biases and norms
    assert found.context_weights == pytest.approx(40 * 4 * 5120**2, rel=3e-3)
    assert found.context_weights >= 40 * 4 * 5120**2


def test_names_and_shapes_are_those_that_a_denoiser_reads():
    package = MetaPackage(manifest_of(TINY, 512))
    denoiser = PackagedDenoiser(package, native_ops(NoLaunches(), SM89))
    denoiser.contexts([torch.ones(3, TINY.text_dim)], meta(257, TINY.clip_dim))
    times = {name for name in package.names if name.startswith(TIME)}
    assert package.handed_over == {*package.names} - times


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
    with Live() as live:
        weights = assemble(BlockWeights, lambda name: package.tensor(f"blocks.0.{name}"))
        keys = CrossKeys(meta(512, model.dim, **bf16), meta(512, model.dim, **bf16), meta(512))
        rope = Rope(meta(tokens, 1, 64), meta(tokens, 1, 64))
        modulation, x = meta(6, model.dim), meta(tokens, model.dim)
        before = live.now
        run_block(ops, weights, ContextKeys(keys, keys), x, modulation, rope)
    return live.peak - before


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens", [300, 1500, 29757, 48832, 95920])
@pytest.mark.parametrize(("model", "ffn"), [(SCAIL_14B, 13824), (SCAIL_1_3B, 8960)])
def test_the_largest_moment_of_a_block_is_what_its_launchers_allocate(model, ffn, tokens, bits):
    got = largest_moment(Width(model.dim, ffn, bits), tokens)
    assert got == pytest.approx(count_block(model, ffn, tokens, bits), rel=0.01)


def test_attention_in_16_bits_needs_no_more_than_that_in_8():
    """Its q, k and v in FP32 at once would be another 9.5 GB."""
    wide, usual = (largest_moment(Width(5120, 13824, bits), 48832) for bits in (16, 8))
    assert wide < usual < 2.3e9
    for bits in (8, 16):  # and the plan asks for that of the attention at hand
        found = plan(REAL, shape_of("512x896"), ENCODERS, FREE[141], Running(bits)).footprint
        assert found.course.width == Width(5120, 13824, bits)


def count_denoising(manifest, shape, rung, bits):
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
    text = torch.ones(shape.text_tokens, manifest.model.text_dim)
    with torch.inference_mode(), Live() as live:
        conditions = Conditions(
            text,
            2 * text if shape.contexts == 2 else None,
            meta(257, manifest.model.clip_dim),
            meta(16, 1, height, width),
            meta(16, time, height // 2, width // 2),
        )
        pool = Pool(live)
        graphed = (lambda steps: GraphedBlocks(steps, pool)) if rung.graphs else None
        denoiser = PackagedDenoiser(package, ops_of(bits), graphed)
        denoiser.kept.keep(weights=rung.contexts_stay, texts=rung.texts_stay)
        velocity = denoiser.bind(conditions, recipe)
        latents = meta(16, time, height, width)
        timesteps = grid(recipe.sampler, steps, recipe.shift).timesteps
        for step in asked:
            latents = latents - velocity(latents, range(time), step, timesteps[step])
    return live.peak


PLAIN, PRODUCTION, GUIDED = {}, {"unseen": "last"}, {"contexts": 2}
LATE = {"unseen": "first"}
SHORT = {"unseen": "last", "evaluations": (3, 3)}  # the production recipe: 6 steps, one window


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
    while found.rung.graphs is not recorded or found.rung.texts_stay is not stay:
        found = next_rung(found, "denoise")
    gap = max(0, gap_of(found) - GAP_BYTES)
    got = found.peaks["denoise"] - ALLOWANCES - found.footprint.rounding - gap
    if found.rung.texts_stay:
        got -= KEPT_TEXT_BYTES  # these texts are the clip's own, which is counted with it
    assert got == pytest.approx(count_denoising(layers, shape, found.rung, bits), rel=0.01)


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


def recorded_evaluations(shape, bits, kinds):
    """The events of two evaluations of each kind, by the code on the meta device."""
    manifest = manifest_of(replace(SCAIL_14B, layers=2), 13824)
    recipe = Recipe("euler", 50, 1.0, 5.0, pose_until=0.5)
    time, height, width = shape.grid[0], shape.height // 8, shape.width // 8
    text = torch.ones(4, manifest.model.text_dim)
    conditions = Conditions(
        text,
        None,
        meta(257, manifest.model.clip_dim),
        meta(16, 1, height, width),
        meta(16, time, height // 2, width // 2),
    )
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
    ("size", "frames", "bits"),
    [((512, 896), 81, 8), ((704, 1280), 77, 8), ((64, 96), 5, 8),
     ((256, 448), 33, 16)],
)  # fmt: skip
def test_an_allocator_with_the_planned_bytes_runs_what_the_code_does(
    size, frames, bits, expandable
):
    shape = ClipShape(*size, frames, unseen="last", evaluations=(3, 3))
    found = plan(REAL, shape, ENCODERS, FREE[141], Running(bits, expandable))
    planned = most_bytes(found.footprint.course) + max(GAP_BYTES, gap_of(found)) + SMALL_BYTES
    events = recorded_evaluations(shape, bits, (0, 25))
    replay(events, Card(planned), expandable)  # raises `Full` where it does not fit


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
                ALLOWANCES - GAP_BYTES + fp.outside + fp.blocks + fp.rounding + fp.vision + fp.vae
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


def told_in_readme(row):
    """The gigabytes of a row of the table in README.md."""
    lines = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(f"| {row}"))
    return [float(told) for told in re.findall(r"([0-9.]+) GB", line)]


@pytest.mark.parametrize(
    ("of_clip", "rows"),
    [
        (
            {"evaluations": (3, 3)},  # of six steps in one window
            ["and the weights that prepare text and picture", "and the keys of the last prompts",
             "all models stay", "at least: models take turns"],
        ),
        (
            {"clip_frames": 325},
            ["the same with them", "325 frames, in windows with CUDA graphs"],
        ),
    ],
    ids=["one window", "windows"],
)  # fmt: skip
@pytest.mark.parametrize("place", range(3), ids=list(NAMED))
def test_the_readme_tells_what_is_planned(place, of_clip, rows):
    """Row by row, each of the plan that fits into less than the one before."""
    shape = shape_of([*NAMED][place], unseen="last", **of_clip)
    encoders, free = replace(ENCODERS, text=0), 10**12
    for row in rows:
        found = plan(REAL, shape, encoders, free, Running(expandable=True))
        assert found.peak_bytes / GB == pytest.approx(told_in_readme(row)[place], abs=0.051)
        free = found.peak_bytes - 1


def count_vae(job):
    with META:
        vae = Vae().to(torch.bfloat16)
    with Live() as live:
        job(vae)
    return live.peak


def leave_the_window(x, branch, bias, gamma, window, history):
    """In place of the norm's kernel, which allocates nothing."""


@pytest.mark.parametrize("name", ["416x672", "704x1280"])
def test_the_vae_needs_what_it_allocates(name):
    height, width = NAMED[name]
    found = plan(REAL, shape_of(name), ENCODERS, FREE[141]).footprint

    def encode(vae):
        vae.encode([meta(3, 1, height, width)])
        vae.encode([meta(3, 13, height // 2, width // 2)])

    def decode(vae, norm=leave_the_window):
        decoder = VaeDecoder(vae, norm, frames_to_u8)
        for _ in decoder.decode(meta(16, 4, height // 8, width // 8)):
            pass

    assert found.encode == pytest.approx(count_vae(encode), rel=0.01)
    assert found.decode == pytest.approx(count_vae(decode), rel=0.01)
    plain = replace(ENCODERS, plain_norm=True)
    found = plan(REAL, shape_of(name), plain, FREE[141]).footprint
    assert found.decode == pytest.approx(
        count_vae(lambda vae: decode(vae, channel_norm_reference)), rel=0.02
    )


# --- what fits where


@pytest.mark.parametrize("changes", [PLAIN, PRODUCTION, GUIDED], ids=["plain", "half", "guided"])
@pytest.mark.parametrize("name", ["416x672", "512x896"])
def test_24_gb_hold_the_sizes_in_use_with_all_weights_where_they_are(name, changes):
    found = plan(REAL, shape_of(name, **changes), ENCODERS, FREE[24])
    assert found.rung.blocks_stay
    assert found.rung.encoders_stay
    assert found.peak_bytes <= FREE[24]


@pytest.mark.parametrize("changes", [PRODUCTION, GUIDED], ids=["production", "guided"])
@pytest.mark.parametrize("card", [32, 141])
def test_larger_cards_hold_the_largest_size_too(card, changes):
    found = plan(REAL, shape_of("704x1280", **changes), ENCODERS, FREE[card])
    assert found.rung.encoders_stay
    assert found.rung.graphs or card == 32


@pytest.mark.parametrize("changes", [PLAIN, PRODUCTION], ids=["plain", "production"])
def test_18_gb_are_enough_with_the_blocks_where_they_are_and_prompts_known(changes):
    known = replace(ENCODERS, text=0)
    assert plan(REAL, shape_of("512x896", **changes), known, 18 * GB).rung.blocks_stay


@pytest.mark.parametrize(
    ("name", "free", "stays"),
    [
        ("512x896", 32, (True, True)),
        ("512x896", 24, (False, True)),
        ("704x1280", 32, (False, True)),
        ("704x1280", 141, (True, True)),
    ],
)
def test_what_prepares_text_and_picture_stays_where_there_is_room(name, free, stays):
    known = replace(ENCODERS, text=0)
    found = plan(REAL, shape_of(name, **PRODUCTION), known, FREE[free])
    assert (found.rung.contexts_stay, found.rung.texts_stay) == stays
    assert found.rung.graphs  # none is given up for it


def test_what_prepares_text_and_picture_is_counted_wherever_it_stays():
    shape, rungs = shape_of("512x896", **PRODUCTION), []
    known = plan(REAL, shape, ENCODERS, FREE[141])
    while known is not None:
        rungs.append(known)
        known = next_rung(known, "denoise")
    first, second, third, *rest = rungs
    held = first.footprint.context_weights
    for stage in first.peaks:
        assert first.peaks[stage] - second.peaks[stage] == held
        assert second.peaks[stage] - third.peaks[stage] == KEPT_TEXT_BYTES
    assert first.resident_bytes - third.resident_bytes == held + KEPT_TEXT_BYTES
    lower = [one.rung for one in (third, *rest)]
    assert not any(rung.contexts_stay or rung.texts_stay for rung in lower)
    # a byte less than either needs, and it is given up
    assert plan(REAL, shape, ENCODERS, first.peak_bytes).rung == first.rung
    assert plan(REAL, shape, ENCODERS, first.peak_bytes - 1).rung == second.rung
    assert plan(REAL, shape, ENCODERS, second.peak_bytes - 1).rung == third.rung


def test_a_plan_takes_the_first_rung_that_fits():
    shape = shape_of("512x896", **PRODUCTION)
    known = plan(REAL, shape, ENCODERS, FREE[141])
    needs = {known.rung: known.peak_bytes}
    while (known := next_rung(known, max(known.peaks, key=known.peaks.get))) is not None:
        needs[known.rung] = known.peak_bytes
    assert len(needs) > 1
    assert [*needs] == [rung for rung in LADDER if rung in needs]
    assert [*needs.values()] == sorted(needs.values(), reverse=True)
    for rung, nbytes in needs.items():
        assert plan(REAL, shape, ENCODERS, nbytes).rung == rung
    with pytest.raises(EngineError):
        plan(REAL, shape, ENCODERS, min(needs.values()) - 1)


@pytest.mark.parametrize("name", NAMED)
def test_a_clip_too_short_for_graphs_needs_what_it_needs_without_them(name):
    found = plan(REAL, shape_of(name, **SHORT), ENCODERS, FREE[141])
    many = plan(REAL, shape_of(name, **PRODUCTION), ENCODERS, FREE[141])
    assert found.rung == many.rung == LADDER[0]
    stream = 4 * 5120 * shape_of(name).tokens
    assert many.peaks["denoise"] - found.peaks["denoise"] >= 2 * stream
    launched = next(lower for lower in lower_plans(many, "denoise") if not lower.rung.graphs)
    *keeping, found = (
        lower for lower in (found, *lower_plans(found, "denoise")) if lower.rung.encoders_stay
    )
    assert all(one.rung.graphs for one in (*keeping, found))
    assert found.peaks == launched.peaks
    below = next_rung(found, "denoise").rung  # doing without graphs alone would give nothing
    assert not (below.graphs or below.encoders_stay)


def lower_plans(found, stage):
    """The plans below one, as a stage that runs out of memory again and again meets them."""
    while (found := next_rung(found, stage)) is not None:
        yield found


def test_only_the_kinds_that_are_recorded_have_graphs_in_the_plan():
    peaks = [
        plan(
            REAL, shape_of("512x896", **PRODUCTION | {"evaluations": counts}), ENCODERS, FREE[141]
        ).peaks["denoise"]
        for counts in ((8, 8), (9, 8), (9, 9))
    ]
    assert peaks[0] < peaks[1] <= peaks[2]


def count_graphs(recipe, time=3):
    """How often blocks are recorded and replayed in a clip of one window, without a GPU."""

    class Recorder:
        recorded = replayed = 0

        def __call__(self, run):
            self.recorded += 1

            def replay():
                self.replayed += 1

            return replay

    recorder = Recorder()
    package = MetaPackage(manifest_of(TINY, 512))
    text = torch.ones(4, TINY.text_dim)
    conditions = Conditions(
        text,
        text.clone() if recipe.cfg != 1 else None,
        meta(257, TINY.clip_dim),
        meta(16, 1, 8, 8),
        meta(16, time, 4, 4),
    )
    graphed = lambda runner: GraphedBlocks(runner, recorder)  # noqa: E731
    with torch.inference_mode():
        denoiser = PackagedDenoiser(package, native_ops(NoLaunches(), SM89), graphed)
        velocity = windowed(denoiser.bind(conditions, recipe), in_latents(recipe.window_frames, 4))
        for step, told in enumerate(grid(recipe.sampler, recipe.steps, recipe.shift).timesteps):
            velocity(meta(16, time, 8, 8), step, told)
    return recorder.recorded, recorder.replayed


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        (RECIPES["production"], (0, 0)),
        (RECIPES["official"], (2, 2 * 49)),
        (replace(RECIPES["official"], cfg=1.0), (1, 49)),
        (Recipe("euler", 8, 1.0, 5.0), (0, 0)),
        (Recipe("euler", 9, 1.0, 5.0), (1, 8)),
        (replace(RECIPES["production"], steps=17), (1, 8)),  # 9 see the skeleton, 8 do not
        (replace(RECIPES["production"], steps=17, pose_from=0.5, pose_until=1.0), (1, 8)),
    ],
    ids=str,
)
def test_only_what_is_replayed_eight_times_is_recorded(recipe, counts):
    assert count_graphs(recipe) == counts
    kinds = evaluations_of_each(recipe, 3)
    contexts = 1 if recipe.cfg == 1 else 2
    assert counts[0] == contexts * sum(map(is_recorded, kinds))  # as the plan takes for granted


def test_windows_of_a_long_clip_count_as_evaluations():
    recipe = replace(RECIPES["production"], window_frames=9, overlap_frames=4)
    with_pose, without = evaluations_of_each(recipe, 21)
    assert min(with_pose, without) > 9
    assert count_graphs(recipe, 21) == (2, with_pose + without - 2)


def test_what_stays_and_what_comes_and_goes_add_up():
    shape = shape_of("512x896")
    everything = plan(REAL, shape, ENCODERS, FREE[141])
    bytes_of = everything.footprint
    kept = ALLOWANCES + bytes_of.blocks + bytes_of.rounding + bytes_of.outside
    kept += bytes_of.context_weights + KEPT_TEXT_BYTES
    assert everything.resident_bytes == kept + bytes_of.vision + bytes_of.vae
    assert everything.peaks["conditioning"] == everything.resident_bytes + ENCODERS.text
    decoding = bytes_of.decode + bytes_of.latents
    assert everything.peaks["decode"] == everything.resident_bytes + decoding
    last = everything
    while (lower := next_rung(last, "decode")) is not None:
        last = lower
    assert not last.rung.blocks_stay
    assert last.resident_bytes == ALLOWANCES + bytes_of.outside
    assert last.peaks["decode"] == last.resident_bytes + bytes_of.vae + decoding
    assert last.peaks["denoise"] > last.resident_bytes + bytes_of.blocks


def test_motion_capture_is_counted_in_every_stage_of_every_rung():
    shape, captures = shape_of("512x896", **PRODUCTION), replace(ENCODERS, capture=3 * 10**9)
    plain, more = (plan(REAL, shape, each, 10**12) for each in (ENCODERS, captures))
    while plain is not None:
        assert more.resident_bytes - plain.resident_bytes == captures.capture
        assert {more.peaks[stage] - plain.peaks[stage] for stage in plain.peaks} == {3 * 10**9}
        plain, more = (next_rung(one, "denoise") for one in (plain, more))
    assert more is None


def test_after_running_out_of_memory_the_next_rung_needs_less_in_that_stage():
    first = plan(REAL, shape_of("512x896"), ENCODERS, FREE[141])
    below = {stage: [first.rung] for stage in first.peaks}
    for stage, rungs in below.items():
        lower = first
        while (lower := next_rung(lower, stage)) is not None:
            rungs.append(lower.rung)
            last = lower
    assert below["denoise"] == [*LADDER[:-1]]  # the blocks are there, whoever leaves
    unrecorded = LADDER[3]  # the first without graphs, of which decoding has none
    assert below["decode"] == [rung for rung in LADDER if rung != unrecorded]
    assert below["conditioning"] == below["decode"]
    for stage in last.peaks:
        assert next_rung(last, stage) is None


@pytest.mark.parametrize("changes", [PRODUCTION, GUIDED], ids=["production", "guided"])
def test_what_does_not_fit_is_refused_with_what_would(changes):
    shape = shape_of("704x1280", **changes)
    with pytest.raises(EngineError) as refusal:
        plan(REAL, shape, ENCODERS, 20 * GB)
    message = str(refusal.value)
    assert re.match(
        r"1280x704, 81 frames at once.* needs \d+\.\d GB .*; 20\.0 GB are free", message
    )
    offers = re.findall(r"(\d+)x(\d+), (\d+) frames at once", message)[1:]
    assert len(offers) == 2
    for width, height, frames in offers:
        offered = replace(shape, height=int(height), width=int(width), frames=int(frames))
        assert plan(REAL, offered, ENCODERS, 20 * GB).peak_bytes <= 20 * GB
    assert offers[0][:2] == ("1280", "704")
    longer = replace(shape, frames=int(offers[0][2]) + 4)
    larger = replace(shape, width=int(offers[1][0]) + 64, height=int(offers[1][1]) + 32)
    for beyond in (longer, larger):
        with pytest.raises(EngineError):
            plan(REAL, beyond, ENCODERS, 20 * GB)


@pytest.mark.parametrize("free", [0, -1, 8 * GB])
def test_a_gpu_that_is_too_small_for_the_weights_is_told(free):
    with pytest.raises(EngineError, match="No size fits: free memory on this GPU"):
        plan(REAL, shape_of("416x672"), ENCODERS, free)


def test_a_whole_clip_of_windows_needs_more_for_its_latents_alone():
    one = plan(REAL, shape_of("416x672"), ENCODERS, FREE[141])
    long = plan(REAL, shape_of("416x672", clip_frames=2001), ENCODERS, FREE[141])
    latents = 8 * 4 * 16 * (501 - 21) * 52 * 84
    assert long.peaks["denoise"] - one.peaks["denoise"] == latents
    assert long.footprint.course == one.footprint.course


def test_the_sentence_says_what_is_needed_and_what_is_done():
    found = plan(REAL, shape_of("512x896"), ENCODERS, FREE[24])
    for part in ("896x512, 81 frames at once", "25.2 GB are free", found.rung.does):
        assert part in found.sentence
    assert f"{found.peak_bytes / 1e9:.1f} GB are needed" in found.sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 0},
        {"width": -32},
        {"height": 500},
        {"width": float("nan")},
        {"frames": 0},
        {"frames": 81.0},
        {"contexts": 3},
        {"contexts": True},
        {"text_tokens": 0},
        {"clip_frames": -1},
        {"clip_frames": None},
        {"evaluations": (3, -1)},
        {"evaluations": (3.0, 3)},
    ],
    ids=str,
)
def test_a_shape_that_no_clip_has_is_refused(changes):
    with pytest.raises(EngineError, match="cannot be planned"):
        shape_of("512x896", **changes)


def test_a_huge_clip_is_refused_like_any_that_does_not_fit():
    with pytest.raises(EngineError, match=r"needs \d{5,}\.\d GB"):
        plan(REAL, ClipShape(32 * 1000, 32 * 1000, 10_001), ENCODERS, FREE[141])
