"""Plans of memory: their tables hold against the code itself, and a GPU is used as far as it goes.

The truth is counted: the code runs on the meta device, where a tensor has a size and no memory,
with the real launchers and a bank that launches nothing.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import TINY
from engine.denoise.contexts import KEPT_TEXT_BYTES
from engine.denoise.cuda_graphs import GraphedBlocks, is_recorded
from engine.denoise.packaged import TIME, PackagedDenoiser
from engine.denoise.sampler import grid
from engine.denoise.schedule import Streaming
from engine.denoise.windows import evaluations_of_each, in_latents, windowed
from engine.errors import EngineError
from engine.flow import Conditions, Recipe
from engine.machine.ladder import LADDER, Rates
from engine.media.framing import frames_to_u8
from engine.memory import ALLOWANCES, LESS, ClipShape, Running, has_room_for_blocks, next_rung, plan
from engine.models.vae import Vae
from engine.models.vae_decode import VaeDecoder
from engine.recipes import RECIPES
from kernels.arch import SM89
from kernels.channel_norm import channel_norm_reference
from kernels.ops import native_ops
from tests.support.live_memory import META, Live, NoLaunches
from tests.support.planned_clips import (
    DESKTOP,
    ENCODERS,
    FREE,
    GB,
    GUIDED,
    NAMED,
    PLAIN,
    PRODUCTION,
    REAL,
    REAL_SCAIL2,
    SHORT,
    MetaPackage,
    manifest_of,
    meta,
    shape_of,
)

RECIPE = RECIPES["preview"]

# --- what is known


def test_tokens_are_those_of_the_specification():
    assert [shape_of(name).tokens for name in NAMED] == [29757, 48832, 95920]


@pytest.mark.parametrize(
    ("name", "references", "tokens"),
    [("512x896", 0, 48_832), ("512x896", 2, 52_416), ("704x1280", 2, 102_960)],
)
def test_further_pictures_are_tokens_as_in_the_specification(name, references, tokens):
    assert shape_of(name, references=references).tokens == tokens


def test_a_model_that_takes_masks_needs_their_embedding_and_the_masks():
    """Everything else is as it was."""
    shape = shape_of("512x896", references=2)
    plain, masked = (plan(of, shape, ENCODERS, FREE[141]).footprint for of in (REAL, REAL_SCAIL2))
    embedding = 5120 * (28 * 4 + 1)
    assert masked.weights.outside - plain.weights.outside == 4 * embedding
    height, width = 512 // 8, 896 // 8
    driving, further = 28 * 21 * height // 2 * width // 2, 28 * 3 + 16 * 2
    roles = 4 * (2 * driving + further * height * width)
    assert masked.latents - plain.latents == roles
    assert masked.course.kinds == plain.course.kinds
    told = masked.course.kinds[0].told
    assert (told.video, told.further, told.total) == (21 * 1792, 2 * 1792, 52_416)


def test_the_weights_of_the_steps_are_those_of_the_specification():
    found = plan(REAL, shape_of("512x896"), ENCODERS, FREE[141]).footprint
    assert found.weights.blocks == pytest.approx(11.96e9, rel=2e-3)
    # 40 blocks x (512 + 257 keys, in tiles of 64) x 2 x 5120 BF16, and a bias each
    assert found.contexts == 40 * (512 + 320) * (4 * 5120 + 4)
    guided = plan(REAL, shape_of("512x896", contexts=2), ENCODERS, FREE[141]).footprint
    assert guided.contexts == 40 * (2 * 512 + 320) * (4 * 5120 + 4)  # both see one picture
    # keys and values of both sides in 8 bits, with scales, biases and norms
    assert found.weights.contexts == pytest.approx(40 * 4 * 5120**2, rel=3e-3)
    assert found.weights.contexts >= 40 * 4 * 5120**2


def test_names_and_shapes_are_those_that_a_denoiser_reads():
    package = MetaPackage(manifest_of(TINY, 512))
    denoiser = PackagedDenoiser(package, native_ops(NoLaunches(), SM89))
    denoiser.contexts([torch.ones(3, TINY.text_dim)], meta(257, TINY.clip_dim))
    times = {name for name in package.names if name.startswith(TIME)}
    assert package.handed_over == {*package.names} - times


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
             "all models stay", "all blocks stay, CLIP and VAE take turns"],
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


@pytest.mark.parametrize("place", range(3), ids=list(NAMED))
def test_the_readme_tells_what_is_needed_at_least(place):
    shape = shape_of([*NAMED][place], unseen="last", evaluations=(3, 3))
    usual = plan(REAL, shape, replace(ENCODERS, text=0), 10**12, Running(expandable=True))
    *_, least = lower_plans(usual, "denoise")
    told = told_in_readme("at least: all blocks are streamed")[place]
    assert least.peak_bytes / GB == pytest.approx(told, abs=0.051)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("card", [8, 12, 16])
def test_the_documents_tell_how_many_blocks_stay(card, name):
    """Row by row of the table in docs/deploy.md, for one prompt and for two."""
    text = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")
    line = next(
        line for line in text.splitlines() if f"({card} GB)" in line or f"of {card} GB)" in line
    )
    cell = line.strip("| ").split("|")[1 + [*NAMED].index(name)]
    if "refused" in cell:
        with pytest.raises(EngineError):
            plan(REAL, shape_of(name), ENCODERS, DESKTOP[card], Running(expandable=True))
        return
    told = re.fullmatch(r" (\d+|none)\b.*; guided (\d+)\b.*", cell.replace(" of 40", ""))
    stay = [0 if count == "none" else int(count) for count in told.groups()]
    for contexts in (1, 2):
        shape = shape_of(name, contexts=contexts)
        found = plan(REAL, shape, ENCODERS, DESKTOP[card], Running(expandable=True))
        assert found.streaming.resident == stay[contexts - 1]


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
    going_on = shape_of(name, has_history=True)
    found = plan(REAL_SCAIL2, going_on, ENCODERS, FREE[141]).footprint
    again = count_vae(lambda vae: vae.encode([meta(3, 5, height, width)]))
    assert found.encode == pytest.approx(again, rel=0.01)
    found = plan(REAL, shape_of(name), ENCODERS, FREE[141]).footprint
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
    held = first.footprint.weights.contexts
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
        lower
        for lower in (found, *lower_plans(found, "denoise"))
        if lower.rung.encoders_stay and not lower.rung.streams
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
        (RECIPE["production"], (0, 0)),
        (RECIPE["official"], (2, 2 * 49)),
        (replace(RECIPE["official"], cfg=1.0), (1, 49)),
        (Recipe("euler", 8, 1.0, 5.0), (0, 0)),
        (Recipe("euler", 9, 1.0, 5.0), (1, 8)),
        (replace(RECIPE["production"], steps=17), (1, 8)),  # 9 see the skeleton, 8 do not
        (replace(RECIPE["production"], steps=17, pose_from=0.5, pose_until=1.0), (1, 8)),
    ],
    ids=str,
)
def test_only_what_is_replayed_eight_times_is_recorded(recipe, counts):
    assert count_graphs(recipe) == counts
    kinds = evaluations_of_each(recipe, 3)
    contexts = 1 if recipe.cfg == 1 else 2
    assert counts[0] == contexts * sum(map(is_recorded, kinds))  # as the plan takes for granted


def test_windows_of_a_long_clip_count_as_evaluations():
    recipe = replace(RECIPE["production"], window_frames=9, overlap_frames=4)
    with_pose, without = evaluations_of_each(recipe, 21)
    assert min(with_pose, without) > 9
    assert count_graphs(recipe, 21) == (2, with_pose + without - 2)


def test_what_stays_and_what_comes_and_goes_add_up():
    shape = shape_of("512x896")
    everything = plan(REAL, shape, ENCODERS, FREE[141])
    bytes_of = everything.footprint
    kept = (
        ALLOWANCES + bytes_of.weights.blocks + bytes_of.weights.rounding + bytes_of.weights.outside
    )
    kept += bytes_of.weights.contexts + KEPT_TEXT_BYTES
    assert everything.resident_bytes == kept + bytes_of.vision + bytes_of.vae
    assert bytes_of.encode > ENCODERS.text
    assert everything.peaks["conditioning"] == everything.resident_bytes + bytes_of.encode
    decoding = bytes_of.decode + bytes_of.latents
    assert everything.peaks["decode"] == everything.resident_bytes + decoding
    last = everything
    while (lower := next_rung(last, "decode")) is not None:
        last = lower
    assert not last.rung.blocks_stay
    assert last.resident_bytes == ALLOWANCES + bytes_of.weights.outside
    assert last.peaks["decode"] == last.resident_bytes + bytes_of.vae + decoding
    assert last.peaks["denoise"] > last.resident_bytes + bytes_of.weights.blocks


def test_room_for_making_masks_is_asked_of_the_stage_before_the_clip_and_given_back():
    shape, sam = shape_of("512x896", **PLAIN), replace(ENCODERS, segmenting=3 * GB)
    plain, more = (plan(REAL_SCAIL2, shape, each, 10**12) for each in (ENCODERS, sam))
    spent = max(ENCODERS.text, plain.footprint.encode)  # it does not run beside these
    assert more.peaks["conditioning"] - plain.peaks["conditioning"] == 3 * GB - spent
    assert {more.peaks[stage] - plain.peaks[stage] for stage in ("denoise", "decode")} == {0}
    assert more.resident_bytes == plain.resident_bytes
    large = replace(ENCODERS, segmenting=12 * GB)
    without, beside = (plan(REAL_SCAIL2, shape, each, FREE[24]) for each in (ENCODERS, large))
    assert beside.rung != without.rung  # weights leave, so that masks can be made


def test_motion_capture_is_counted_in_every_stage_of_every_rung():
    shape, captures = shape_of("512x896", **PRODUCTION), replace(ENCODERS, capture=3 * 10**9)
    plain, more = (plan(REAL, shape, each, 10**12) for each in (ENCODERS, captures))
    while not plain.rung.streams:  # what is streamed fills whatever is free
        assert more.resident_bytes - plain.resident_bytes == captures.capture
        assert {more.peaks[stage] - plain.peaks[stage] for stage in plain.peaks} == {3 * 10**9}
        plain, more = (next_rung(one, "denoise") for one in (plain, more))
    assert more.rung.streams


def test_after_running_out_of_memory_the_next_rung_needs_less_in_that_stage():
    first = plan(REAL, shape_of("512x896"), ENCODERS, FREE[141])
    below = {
        stage: [first.rung, *(lower.rung for lower in lower_plans(first, stage))]
        for stage in first.peaks
    }
    *whole, streamed, in_turns = LADDER
    # the blocks are there, whoever leaves; at last none of them stays
    assert below["denoise"] == [*whole[:-1], streamed, in_turns, in_turns]
    unrecorded = LADDER[3]  # the first without graphs, of which decoding has none
    assert below["decode"] == [rung for rung in whole if rung != unrecorded]
    assert below["conditioning"] == below["decode"]


@pytest.mark.parametrize("changes", [PRODUCTION, GUIDED], ids=["production", "guided"])
def test_what_does_not_fit_is_refused_with_what_would(changes):
    shape, free = shape_of("704x1280", **changes), 9_300_000_000
    with pytest.raises(EngineError) as refusal:
        plan(REAL, shape, ENCODERS, free)
    message = str(refusal.value)
    assert re.match(r"1280x704, 81 frames at once.* needs \d+\.\d GB .*; 9\.3 GB are free", message)
    offers = re.findall(r"(\d+)x(\d+), (\d+) frames at once", message)[1:]
    assert len(offers) == 2
    for width, height, frames in offers:
        offered = replace(shape, height=int(height), width=int(width), frames=int(frames))
        assert plan(REAL, offered, ENCODERS, free).peak_bytes <= free
    assert offers[0][:2] == ("1280", "704")
    longer = replace(shape, frames=int(offers[0][2]) + 4)
    larger = replace(shape, width=int(offers[1][0]) + 64, height=int(offers[1][1]) + 32)
    for beyond in (longer, larger):
        with pytest.raises(EngineError):
            plan(REAL, beyond, ENCODERS, free)


@pytest.mark.parametrize("free", [0, -1, 2 * GB])
def test_a_gpu_that_is_too_small_for_anything_is_told(free):
    with pytest.raises(EngineError, match="No size fits: free memory on this GPU"):
        plan(REAL, shape_of("416x672"), ENCODERS, free)


@pytest.mark.parametrize("changes", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_24_gb_hold_a_clip_of_scail_2_in_segments_with_two_further_pictures(changes):
    shape = shape_of("512x896", references=2, has_history=True, clip_frames=325, **changes)
    found = plan(REAL_SCAIL2, shape, ENCODERS, FREE[24])
    assert found.rung.encoders_stay
    assert found.peak_bytes <= FREE[24]


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
    found = plan(REAL_SCAIL2, shape_of("512x896", references=2), ENCODERS, FREE[24])
    assert "896x512, 81 frames at once, 2 further pictures: " in found.sentence


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
        {"references": -1},
        {"references": 2.0},
    ],
    ids=str,
)
def test_a_shape_that_no_clip_has_is_refused(changes):
    with pytest.raises(EngineError, match="cannot be planned"):
        shape_of("512x896", **changes)


def test_a_huge_clip_is_refused_like_any_that_does_not_fit():
    with pytest.raises(EngineError, match=r"needs \d{5,}\.\d GB"):
        plan(REAL, ClipShape(32 * 1000, 32 * 1000, 10_001), ENCODERS, FREE[141])


# --- blocks that are streamed

MODELS = pytest.mark.parametrize("model", [REAL, REAL_SCAIL2], ids=["preview", "scail2"])


@MODELS
@pytest.mark.parametrize("expandable", [False, True], ids=["usual", "expandable"])
@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize(
    ("name", "card"), [("416x672", 8), ("512x896", 8), ("704x1280", 12), ("704x1280", 16)]
)
def test_small_cards_hold_the_sizes_in_use(model, name, card, contexts, expandable):
    """With a prompt that is not stored: its encoder passes block by block."""
    running = Running(expandable=expandable)
    found = plan(model, shape_of(name, contexts=contexts), ENCODERS, DESKTOP[card], running)
    assert found.peak_bytes <= DESKTOP[card]
    assert found.rung.streams
    # the ring has as many as no step waits for; where no block stays two will do
    assert found.streaming.depth == 3 or found.streaming == Streaming(resident=0, depth=2)


@MODELS
@pytest.mark.parametrize("contexts", [1, 2])
def test_the_largest_size_is_refused_at_8_gb_with_what_fits(model, contexts):
    shape = shape_of("704x1280", contexts=contexts)
    with pytest.raises(EngineError) as refusal:
        plan(model, shape, ENCODERS, DESKTOP[8])
    offers = re.findall(r"(\d+)x(\d+), (\d+) frames at once", str(refusal.value))[1:]
    assert offers
    for width, height, frames in offers:
        offered = replace(shape, height=int(height), width=int(width), frames=int(frames))
        plan(model, offered, ENCODERS, DESKTOP[8])
    assert int(offers[-1][0]) >= 896


def test_as_many_blocks_stay_as_fit():
    shape = shape_of("512x896", **PRODUCTION)
    stay = []
    for free in range(DESKTOP[8], 15 * GB, GB // 4):
        found = plan(REAL, shape, ENCODERS, free)
        one = found.footprint.weights.block
        assert found.rung.streams
        assert free - one < found.peak_bytes <= free
        held = found.streaming.resident + found.streaming.depth
        turns = 0 if found.rung.encoders_stay else 1
        assert found.resident_bytes >= ALLOWANCES + held * one
        stay.append((1 - turns, found.streaming.resident))
    assert stay == sorted(stay)
    assert stay[0][1] >= 0
    assert stay[-1][1] > 20


def test_a_block_in_one_piece_is_the_40th_part_of_all():
    found = plan(REAL, shape_of("512x896"), ENCODERS, FREE[141]).footprint
    assert (
        found.weights.blocks
        <= 40 * found.weights.block
        <= found.weights.blocks + found.weights.rounding
    )


def test_what_a_plan_costs_is_what_is_on_its_way_and_not_hidden():
    rates = Rates(copy=10e9, read=2e9)
    shape = shape_of("512x896", evaluations=(3, 3), unseen="last")
    costs = {}
    for free in (40 * GB, 18_500_000_000, DESKTOP[16], DESKTOP[8]):
        found = plan(REAL, shape, ENCODERS, free, Running(rates=rates))
        costs[found.rung] = found.seconds
    held = found.footprint
    contexts = held.weights.contexts / rates.read
    assert costs[LADDER[0]] == 0
    assert costs[LADDER[4]] == pytest.approx(contexts + 2 * (held.vision + held.vae) / rates.copy)
    # a forward computes longer than copies take: only what is read for each clip costs time
    assert costs[LADDER[6]] == pytest.approx(contexts)
    slow = plan(REAL, shape, ENCODERS, DESKTOP[8], Running(rates=replace(rates, copy=1e9)))
    copies = slow.streamed_bytes / 1e9
    assert slow.seconds > contexts + 6 * (copies - 4)
    assert "weights on their way take at most" in slow.sentence
    read = plan(REAL, shape, ENCODERS, DESKTOP[8], Running(rates=replace(rates, is_pinned=False)))
    assert read.seconds > contexts + 6 * (read.streamed_bytes / rates.read - 4)
    assert "from pinned memory" in slow.does
    assert "from the page cache" in read.does


def test_a_stage_that_runs_out_while_blocks_are_streamed_goes_on_with_fewer():
    found = plan(REAL, shape_of("512x896"), ENCODERS, DESKTOP[16])
    seen = [found, *lower_plans(found, "denoise")]
    assert [one.rung for one in seen] == [LADDER[6], LADDER[7], LADDER[7]]
    assert seen[1].peak_bytes <= LESS * seen[0].peak_bytes
    assert (seen[2].streaming.resident, seen[2].streaming.depth) == (0, 2)
    assert len({one.does for one in seen}) == 3


def test_blocks_are_loaded_at_once_where_a_usual_clip_leaves_them_room():
    found = [has_room_for_blocks(REAL, free, Running()) for free in (*DESKTOP.values(), FREE[24])]
    assert found == [False, False, False, True]
