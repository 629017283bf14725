"""The packaged transformer gives the velocity of the exact model, whatever it is asked for."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file

from engine.build.make import Order, make_package
from engine.config import state_dir
from engine.denoise.block import BlockWeights, ContextWeights, assemble, run_block, tensor_names
from engine.denoise.contexts import count_padding
from engine.denoise.cuda_graphs import GraphedBlocks
from engine.denoise.exact import ExactDenoiser
from engine.denoise.packaged import PackagedDenoiser, video_first
from engine.denoise.sampler import grid
from engine.errors import BadCheckpoint, BadPackage
from engine.flow import Conditions, Recipe
from engine.machine.upload import PackageWeights
from engine.models.attention import sdpa
from engine.models.checkpoint import Checkpoint
from engine.models.dit import Rope
from engine.package.folder import open_folder, open_package
from kernels.arch import SM90
from kernels.attention import FORMS, variants
from kernels.ops import plain_attention, reference_ops
from tests.support.compiled import STATE
from tests.support.packages import reseal

COSINE = 0.999  # the 8-bit gate
CPU = torch.device("cpu")


class Scene:
    """A golden case as a clip that is denoised: its second step of two is at the case's time."""

    def __init__(self, folder, case):
        self.tensors = load_file(folder / f"case_{case}_forward.safetensors")
        self.latents = self.ours("in.x")
        share = self.tensors["in.timestep"].item() / 1000
        self.recipe = Recipe("euler", 2, 1.0, shift=1 / (1 - share) - 1)
        self.conditions = Conditions(
            text=self.tensors["in.context"][0],
            negative=None,
            vision=self.tensors["in.image_clip_features"][0].float(),
            reference=self.ours("in.ref_concat"),
            pose=self.ours("in.concat_smpl_render"),
        )

    def ours(self, name):
        return self.tensors[name][0].float().transpose(0, 1).contiguous()

    @property
    def guided(self):
        return replace(self.conditions, negative=self.tensors["in.context_uncond"][0])

    def velocity(self, denoiser, conditions=None, **changes):
        recipe = replace(self.recipe, **changes)
        times = grid(recipe.sampler, recipe.steps, recipe.shift).timesteps
        velocity = denoiser.bind(conditions or self.conditions, recipe)
        return velocity(self.latents, range(self.latents.shape[1]), 1, times[1])


@pytest.fixture(scope="module")
def scene():
    held = {}

    def find(golden, case):
        if case not in held:
            held[case] = Scene(golden / "transformer", case)
        return held[case]

    return find


@pytest.fixture(scope="module")
def package():
    """Packages of the golden weights by their form. They must not be changed."""
    held = {}

    def build(golden, form):
        if form not in held:
            first = min((golden / "transformer").glob("weights_A-*"))
            folder = Path(mkdtemp(dir=state_dir()))
            held[form] = open_package(make_package(Order(SM90, first, weights=form), folder, STATE))
        return held[form]

    return build


@pytest.fixture
def packaged(golden, package):
    """Makes a denoiser that launches references."""

    def make(form="int8", ops=None, make_graphs=None):
        weights = PackageWeights(package(golden, form), CPU)
        return PackagedDenoiser(weights, ops or reference_ops(), make_graphs)

    return make


@pytest.fixture(scope="module")
def exact():
    held = []

    def load(golden):
        if not held:
            checkpoint = Checkpoint(*sorted((golden / "transformer").glob("weights_A-*")))
            held.append(ExactDenoiser(checkpoint, CPU, torch.float32, sdpa))
        return held[0]

    return load


def cosine(got, want):
    return torch.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0).item()


def assert_near(got, want, least=COSINE):
    assert got.shape == want.shape
    assert cosine(got, want) > least
    assert got.norm().item() == pytest.approx(want.norm().item(), rel=0.02)


pytestmark = pytest.mark.golden


# --- the velocity


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("case", ["a", "b"])
def test_the_velocity_of_the_official_program_is_met_at_8_bits(golden, scene, packaged, case, form):
    """Case a has 475 rows of padded text, case b none; b is a picture alone."""
    known = scene(golden, case)
    assert_near(known.velocity(packaged(form)), known.ours("out.out"))


@pytest.mark.parametrize("attention", [*FORMS, "sdpa"])
def test_every_attention_meets_it(golden, scene, packaged, attention):
    ops = (
        plain_attention(reference_ops(), sdpa)
        if attention == "sdpa"
        else reference_ops(variants(attention, SM90)[0])
    )
    known = scene(golden, "a")
    assert_near(known.velocity(packaged(ops=ops)), known.ours("out.out"))


SKELETONS = [{}, {"pose_until": 0.5}, {"pose_strength": 0.0}, {"pose_strength": 4.0}]


def test_the_skeleton_counts_as_it_is_seen_and_as_strong_as_it_is(golden, scene, packaged, exact):
    """Random weights let it move the velocity by 3 %, twice as far as 8 bits do. The second of two
    steps is the first that does not see it before a half.
    """
    known, denoiser = scene(golden, "a"), packaged()
    wanted = [known.velocity(exact(golden), **changes) for changes in SKELETONS]
    for changes, want in zip(SKELETONS, wanted):
        got = known.velocity(denoiser, **changes)
        assert_near(got, want)
        assert max(wanted, key=lambda other: cosine(got, other)) is want, changes
    late = known.velocity(denoiser, pose_from=0.5)
    assert torch.equal(late, known.velocity(denoiser))


def test_guidance_leads_away_from_the_negative_prompt(golden, scene, packaged):
    known, denoiser = scene(golden, "a"), packaged()
    both = known.tensors["out.out_b2"].float().transpose(1, 2)  # without and with the prompt
    away = known.velocity(denoiser, replace(known.conditions, text=known.guided.negative))
    toward = known.velocity(denoiser)
    for got, want in zip((away, toward), both):
        assert_near(got, want)
    got = known.velocity(denoiser, known.guided, cfg=4.0)
    torch.testing.assert_close(got, away + 4 * (toward - away))
    assert torch.equal(known.velocity(denoiser, known.guided, cfg=1.0), toward)


def test_padded_text_takes_part_and_text_without_padding_is_right_too(
    golden, scene, packaged, exact
):
    known, denoiser = scene(golden, "a"), packaged()
    real = len(known.conditions.text) - count_padding(known.conditions.text)
    assert real == 37
    found = {}
    for rows in (real, real + 1, 512):
        told = replace(known.conditions, text=known.conditions.text[:rows])
        found[rows] = known.velocity(denoiser, told)
        assert_near(found[rows], known.velocity(exact(golden), told))
    assert not torch.allclose(found[real], found[512], atol=1e-3)
    nothing = replace(known.conditions, text=torch.zeros(512, 64))
    assert_near(known.velocity(denoiser, nothing), known.velocity(exact(golden), nothing))


def test_what_is_given_is_not_changed_and_the_next_evaluation_gives_the_same(
    golden, scene, packaged
):
    known, denoiser = scene(golden, "b"), packaged()
    before = known.latents.clone(), known.conditions.pose.clone(), known.conditions.text.clone()
    velocity = denoiser.bind(known.conditions, known.recipe)
    times = grid("euler", 2, known.recipe.shift).timesteps
    first = velocity(known.latents, [0], 1, times[1]).clone()
    other = velocity(2 * known.latents, [0], 0, times[0])
    assert torch.equal(velocity(known.latents, [0], 1, times[1]), first)
    assert not torch.allclose(other, first, atol=1e-2)
    after = known.latents, known.conditions.pose, known.conditions.text
    assert all(map(torch.equal, before, after))


# --- how it is run


class Replays:
    """Records nothing and runs again: what a graph does to the memory it was recorded with."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        return run


def test_recorded_blocks_give_the_same_velocities(golden, scene, packaged):
    known, recorder = scene(golden, "a"), Replays()
    graphed = packaged(make_graphs=lambda runner: GraphedBlocks(runner, recorder))
    recipe = replace(known.recipe, steps=18, cfg=3.0, pose_until=0.5)  # nine of each kind
    times = grid("euler", 18, recipe.shift).timesteps
    runs = [one.bind(known.guided, recipe) for one in (packaged(), graphed)]
    for step in (0, 1, 2, 9, 10, 11):
        plain, replayed = (run(known.latents, range(4), step, times[step]) for run in runs)
        assert torch.equal(plain, replayed), step
    assert recorder.recorded == 4  # two texts, with and without the skeleton
    graphed.forget()
    graphed.use_graphs(False)
    again = graphed.bind(known.guided, recipe)
    for step in (0, 1, 2):
        again(known.latents, range(4), step, times[step])
    assert recorder.recorded == 4


def test_blocks_that_left_come_back_as_they_were(golden, scene, packaged):
    known, denoiser = scene(golden, "b"), packaged()
    want = known.velocity(denoiser)
    denoiser.home.settle(stays=False)
    with denoiser.home.present():
        assert torch.equal(known.velocity(denoiser), want)
    denoiser.home.settle(stays=True)
    assert torch.equal(known.velocity(denoiser), want)


class Counted:
    """The references, and how many tokens asked in each block's attention."""

    def __init__(self):
        self.asked, ops = [], reference_ops()

        def attention(heads, queries):
            self.asked.append(queries)
            return ops.attention(heads, queries)

        self.ops = replace(ops, attention=attention)


class Visits(PackageWeights):
    """Writes down what is asked for."""

    def __init__(self, package):
        super().__init__(package, CPU)
        self.asked = []

    def visit(self, names, take):
        names = [*names]
        self.asked.append(len(names))
        super().visit(names, take)


def test_the_weights_of_the_context_are_read_once_for_both_prompts(golden, scene, package):
    known, weights = scene(golden, "a"), Visits(package(golden, "int8"))
    denoiser = PackagedDenoiser(weights, reference_ops())
    denoiser.kept.keep(weights=False, texts=False)
    told = known.conditions.text, known.guided.negative
    alone = [denoiser.contexts([text], known.conditions.vision)[0] for text in told]
    weights.asked.clear()
    together = denoiser.contexts(told, known.conditions.vision)
    assert weights.asked == [3 * len(tensor_names(ContextWeights))]  # of 3 blocks
    for one, want in zip(together, alone, strict=True):
        for got, keys in zip(one, want, strict=True):
            assert all(map(torch.equal, tensors_of(got), tensors_of(keys)))
    assert not torch.equal(together[0][0].text.k, together[1][0].text.k)


def tensors_of(keys):
    return [tensor for side in (keys.text, keys.vision) for tensor in (side.k, side.v, side.bias)]


def test_after_the_last_block_only_the_video_is_computed(golden, scene, packaged):
    known, counted = scene(golden, "a"), Counted()
    known.velocity(packaged(ops=counted.ops))
    area, frames = 6 * 10, 4
    everything = area * (1 + frames) + frames * area // 4
    assert counted.asked == [everything, everything, area * frames]


def test_tokens_that_are_not_kept_change_nothing_of_those_that_are(golden, package, monkeypatch):
    """But what all have in common, besides which they are rounded: the first one counts here."""
    monkeypatch.setattr("engine.denoise.block.common_step", lambda tokens: tokens)
    held = package(golden, "int8")
    weights = assemble(BlockWeights, lambda name: held.read(f"blocks.2.{name}"))
    draw = torch.Generator().manual_seed(3)
    x, modulation = torch.randn(70, 256, generator=draw), torch.randn(6, 256, generator=draw)
    angles = torch.rand(70, 1, 64, generator=draw)
    rope, ops = Rope(angles.cos(), angles.sin()), reference_ops()
    text, vision = torch.randn(5, 64, generator=draw), torch.randn(257, 1280, generator=draw)
    ((*_, seen),) = PackagedDenoiser(PackageWeights(held, CPU), ops).contexts([text], vision)
    whole = run_block(ops, weights, seen, x.clone(), modulation, rope)
    kept = run_block(ops, weights, seen, x.clone(), modulation, rope, 40)
    assert kept.shape == (40, 256)
    torch.testing.assert_close(kept, whole[:40])


def test_the_video_comes_first_then_picture_and_skeleton():
    tokens = torch.arange(3 + 12 + 6)  # of 3 patches: a reference, 4 frames, the skeleton
    assert video_first(tokens, 3, 12).tolist() == [*range(3, 15), 0, 1, 2, *range(15, 21)]
    assert video_first(tokens[:15], 3, 12).tolist() == [*range(3, 15), 0, 1, 2]
    tables = tokens[:, None, None].expand(-1, 1, 2)
    assert video_first(tables, 3, 12)[:, 0, 1].tolist()[:13] == [*range(3, 15), 0]


def test_only_zero_rows_at_the_end_are_padding():
    text = torch.ones(6, 4)
    assert count_padding(text) == 0
    text[2] = 0  # a row between others is none
    assert count_padding(text) == 0
    text[4:] = 0
    assert count_padding(text) == 2
    text[5, 3] = math.nan
    assert count_padding(text) == 0
    assert count_padding(torch.zeros(6, 4)) == 6


# --- what cannot be used


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": torch.ones(3, 4096)}, r"text encoder makes features 4096 wide, the package sm90"),
        ({"vision": torch.ones(257, 160)}, r"image encoder makes features 160 wide.*takes 1280"),
    ],
    ids=["text", "vision"],
)
def test_features_of_other_encoders_are_refused(golden, scene, packaged, changes, says):
    known = scene(golden, "b")
    with pytest.raises(BadCheckpoint, match=says):
        known.velocity(packaged(), replace(known.conditions, **changes))


@pytest.fixture
def copied(golden, package, tmp_path):
    """A package that may be broken: weights are changed at a tensor, or the manifest."""
    source = package(golden, "int8")
    for path in source.path.rglob("*"):
        target = tmp_path / "sm90" / path.relative_to(source.path)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "sm90"


@pytest.mark.parametrize("name", ["head.head.bias", "blocks.1.up.s", "time_embedding.0.bias"])
def test_damaged_weights_are_named_when_they_are_loaded(copied, name):
    flip(copied, name)
    with pytest.raises(BadPackage, match=rf"damaged: {name}"):
        PackagedDenoiser(PackageWeights(open_package(copied), CPU), reference_ops())


def test_damaged_weights_of_the_context_are_named_when_they_are_first_used(golden, copied, scene):
    flip(copied, "blocks.2.vision.q")
    denoiser = PackagedDenoiser(PackageWeights(open_package(copied), CPU), reference_ops())
    with pytest.raises(BadPackage, match=r"damaged: blocks\.2\.vision\.q"):
        scene(golden, "b").velocity(denoiser)


def flip(path, name):
    """One bit of a tensor."""
    entry = open_package(path).entry(name)
    data = bytearray((path / "weights.bin").read_bytes())
    data[entry.offset + entry.nbytes // 2] ^= 4
    (path / "weights.bin").write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["head.head.bias", "time_embedding.0.bias", "blocks.1.up.s", "blocks.0.text_norm_k",
     "blocks.2.vision.bias"],
)  # fmt: skip
def test_a_package_that_lacks_a_tensor_is_refused_when_it_is_opened_or_loaded(copied, name):
    def rename(body):
        entry = next(entry for entry in body["tensors"] if entry["name"] == name)
        entry["name"] = "blocks.0.another.q"  # of an engine that knows more

    reseal(copied, rename)
    with pytest.raises(BadPackage, match=rf"the tensor {name} is missing.* Build it again"):
        open_package(copied)
    with pytest.raises(BadPackage, match=rf"has no tensor {name}\. Build it again"):
        PackagedDenoiser(PackageWeights(open_folder(copied), CPU), reference_ops())
