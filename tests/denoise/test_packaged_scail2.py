"""The transformer of a SCAIL-2 package: masks, further pictures, both modes and history, in 8 bits.

Golden cases: a is an animation, b a replacement, c has two further pictures, d goes on from an
earlier segment.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file

from engine.build.make import Order, make_package
from engine.config import TINY_SCAIL2, state_dir
from engine.demo.weights import scail2_weights
from engine.denoise.exact import ExactDenoiser
from engine.denoise.packaged import PackagedDenoiser
from engine.denoise.sampler import grid
from engine.flow import Conditions, Recipe, Roles
from engine.machine.upload import PackageWeights
from engine.models.attention import sdpa
from engine.models.checkpoint import Checkpoint
from engine.models.dit import patch_grid, rope_tables
from engine.package.folder import open_package
from kernels.arch import SM90
from kernels.attention import variants
from kernels.ops import reference_ops
from tests.support.built import tiny_package
from tests.support.compiled import STATE, each_arch

COSINE = 0.999  # the 8-bit gate
CPU = torch.device("cpu")
CASES = "abcd"
OTHER = {"animation": "replacement", "replacement": "animation"}


def cosine(got, want):
    return torch.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0).item()


def assert_near(got, want, least=COSINE):
    assert got.shape == want.shape
    assert cosine(got, want) > least
    assert got.norm().item() == pytest.approx(want.norm().item(), rel=0.02)


def velocity(denoiser, conditions, latents, recipe):
    """Of the second of two steps, with whatever is known of it put in."""
    times = grid(recipe.sampler, recipe.steps, recipe.shift).timesteps
    return denoiser.bind(conditions, recipe)(latents, range(latents.shape[1]), 1, times[1])


# --- against the official program


class Scene:
    """A golden case as a clip that is denoised: its second step of two is at the case's time."""

    def __init__(self, folder, case):
        self.tensors = load_file(folder / f"case_{case}_forward.safetensors")
        self.latents = self.of("in.x")
        share = self.tensors["in.timestep"].item() / 1000
        self.recipe = Recipe("euler", 2, 1.0, shift=1 / (1 - share) - 1)
        plane = self.latents.shape[2:]
        further = {"additional": torch.zeros(16, 0, *plane)}
        further["additional_masks"] = torch.zeros(28, 0, *plane)
        if case == "c":
            further["additional"] = self.of("in.additional_ref_latents")
            further["additional_masks"] = self.of("in.additional_ref_masks")
        mode = "replacement" if case == "b" else "animation"
        masks = self.of("in.ref_masks")[:, :1], self.of("in.driving_masks")
        known = self.of("in.history_latent") if case == "d" else None
        self.conditions = Conditions(
            text=self.tensors["in.context"][0],
            negative=None,
            vision=self.tensors["in.clip_fea"][0].float(),
            reference=self.of("in.ref_latents"),
            pose=self.of("in.pose_latents"),
            roles=Roles(mode, *masks, **further),
            history=known,
        )

    def of(self, name):
        return self.tensors[name][0].float().contiguous()

    def told(self, **changes):
        """The conditions with other roles."""
        return replace(self.conditions, roles=replace(self.conditions.roles, **changes))

    def velocity(self, denoiser, conditions=None):
        return velocity(denoiser, conditions or self.conditions, self.latents, self.recipe)


@pytest.fixture(scope="module")
def scene():
    held = {}

    def find(golden, case):
        if case not in held:
            held[case] = Scene(golden / "scail2", case)
        return held[case]

    return find


@cache
def golden_package(golden, form="int8"):
    """A package of the golden weights."""
    weights = golden / "scail2" / "weights_A.safetensors"
    folder = Path(mkdtemp(dir=state_dir()))
    return open_package(make_package(Order(SM90, weights, weights=form), folder, STATE))


@pytest.fixture(scope="module")
def packaged():
    """Denoisers of packages of the golden weights by their form, which launch references."""
    held = {}

    def build(golden, form="int8"):
        if form not in held:
            weights = PackageWeights(golden_package(golden, form), CPU)
            held[form] = PackagedDenoiser(weights, reference_ops())
        return held[form]

    return build


@pytest.fixture(scope="module")
def exact():
    held = []

    def load(golden):
        if not held:
            checkpoint = Checkpoint(golden / "scail2" / "weights_A.safetensors")
            held.append(ExactDenoiser(checkpoint, CPU, torch.float32, sdpa))
        return held[0]

    return load


@pytest.mark.golden
@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_the_velocity_of_the_official_program_is_met_at_8_bits(golden, scene, packaged, case, form):
    known = scene(golden, case)
    assert_near(known.velocity(packaged(golden, form)), known.of("out.out"))


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_the_other_mode_and_no_masks_are_met_too(golden, scene, packaged, case):
    known, denoiser = scene(golden, case), packaged(golden)
    roles = known.conditions.roles
    blank = known.told(
        reference=torch.zeros_like(roles.reference), driving=torch.zeros_like(roles.driving)
    )
    others = {
        "out.out_other_mode": known.told(mode=OTHER[roles.mode]),
        "out.out_zero_masks": blank,
    }
    if case == "c":
        nothing = {"additional": roles.additional[:, :0]}
        nothing["additional_masks"] = roles.additional_masks[:, :0]
        others["out.out_no_additional"] = known.told(**nothing)
    if case == "d":
        others["out.out_no_history"] = replace(known.conditions, history=None)
    wanted = {name: known.of(name) for name in ("out.out", *others)}
    for name, conditions in others.items():
        got = known.velocity(denoiser, conditions)
        assert_near(got, wanted[name])
        assert max(wanted, key=lambda other: cosine(got, wanted[other])) == name


@pytest.mark.golden
def test_further_pictures_in_another_order_are_another_velocity(golden, scene, packaged, exact):
    known = scene(golden, "c")
    roles = known.conditions.roles
    turned = known.told(
        additional=roles.additional.flip(1), additional_masks=roles.additional_masks.flip(1)
    )
    got = known.velocity(packaged(golden)), known.velocity(packaged(golden), turned)
    want = known.velocity(exact(golden)), known.velocity(exact(golden), turned)
    for n in (0, 1):
        assert_near(got[n], want[n])
        assert cosine(got[n], want[n]) > cosine(got[n], want[1 - n])


class Watch:
    """In place of the blocks: keeps what they are given."""

    def __init__(self, ops, weights):
        self.given = None

    def __call__(self, given):
        self.given = given
        return given.x[: given.kept].clone()


def places_in_tokens(golden, known, conditions):
    """The pass that the blocks of a package are given, the places of its tokens among those of the
    exact model, and that model's tables.
    """
    watches = []

    def make(ops, weights):
        watches.append(Watch(ops, weights))
        return watches[-1]

    weights = PackageWeights(golden_package(golden), CPU)
    denoiser = PackagedDenoiser(weights, reference_ops(), make_runner=make)
    velocity(denoiser, conditions, known.latents, known.recipe)
    given, roles = watches[-1].given, conditions.roles
    with torch.inference_mode():
        history = None
        if conditions.history is not None:
            history = torch.zeros(4, *known.latents.shape[1:])
            history[:, : conditions.history.shape[1]] = 1
        tokens = denoiser._outside.embed(
            known.latents, conditions.reference, conditions.pose, history, roles=roles
        )
        rope = rope_tables(patch_grid(known.latents), True, CPU, roles.count, roles.mode)
    return given, found_at(given.x, tokens), rope


def found_at(rows, among):
    """The one place of each row among others."""
    is_there = (rows[:, None] == among[None]).all(dim=2)
    assert bool((is_there.sum(dim=1) == 1).all())
    return is_there.int().argmax(dim=1)


@pytest.mark.golden
@pytest.mark.parametrize("mode", OTHER)
@pytest.mark.parametrize("case", "cd")
def test_blocks_are_given_the_video_first_and_each_token_its_own_tables(golden, scene, case, mode):
    known = scene(golden, case)
    given, places, rope = places_in_tokens(golden, known, known.told(mode=mode))
    frames, rows, columns = patch_grid(known.latents)
    area, count = rows * columns, known.conditions.roles.count
    first = area * (1 + count)
    video, skeleton = frames * area, frames * area // 4
    order = [*range(first, first + video), *range(first), *range(first + video, len(places))]
    assert places.tolist() == order
    assert (given.kept, len(places)) == (video, first + video + skeleton)
    assert torch.equal(given.rope.cos, rope.cos[places])
    assert torch.equal(given.rope.sin, rope.sin[places])


# --- packages of every architecture


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(seed, *shape):
    """Shares of classes, as colours that were shrunk have."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).round()


FRAMES, HEIGHT, WIDTH = 3, 8, 12


def clip(mode="animation", references=0, history=0):
    """What a transformer is told of a clip of noise, and its latents."""
    half, plane = (FRAMES, HEIGHT // 2, WIDTH // 2), (HEIGHT, WIDTH)
    roles = Roles(
        mode,
        reference=masks(1, 28, 1, *plane),
        driving=masks(2, 28, *half),
        additional=noise(3, 16, references, *plane),
        additional_masks=masks(4, 28, references, *plane),
    )
    known = noise(5, 16, history, *plane) if history else None
    latents = noise(6, 16, FRAMES, *plane)
    if known is not None:
        latents[:, :history] = known
    told = Conditions(
        text=noise(7, 9, TINY_SCAIL2.text_dim),
        negative=noise(8, 4, TINY_SCAIL2.text_dim),
        vision=noise(9, 257, TINY_SCAIL2.clip_dim),
        reference=noise(10, 16, 1, *plane),
        pose=noise(11, 16, *half),
        roles=roles,
        history=known,
    )
    return told, latents


CLIPS = {
    "animation": {},
    "two further pictures": {"references": 2},
    "replacement": {"mode": "replacement"},
    "replacement with two": {"mode": "replacement", "references": 2},
    "going on": {"history": 2},
    "going on in replacement with one": {"mode": "replacement", "references": 1, "history": 2},
}
GUIDED = Recipe("euler", 2, 3.0, 3.0)


@cache
def tiny(arch=None):
    if arch is None:
        checkpoint = Checkpoint(scail2_weights(state_dir()).checkpoint)
        return ExactDenoiser(checkpoint, CPU, torch.float32, sdpa)
    package = open_package(tiny_package(arch, kind="scail2"), arch)
    found = variants(arch.attention, arch)[0]
    return PackagedDenoiser(PackageWeights(package, CPU), reference_ops(found, arch))


@cache
def wanted(name, cfg):
    return velocity(tiny(), *clip(**CLIPS[name]), replace(GUIDED, cfg=cfg))


@each_arch
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", CLIPS)
def test_a_package_of_any_architecture_has_the_velocity_of_the_exact_model(arch, name, cfg):
    got = velocity(tiny(arch), *clip(**CLIPS[name]), replace(GUIDED, cfg=cfg))
    assert_near(got, wanted(name, cfg))
    others = {other: wanted(other, cfg) for other in CLIPS}
    assert max(others, key=lambda other: cosine(got, others[other])) == name


@each_arch
def test_the_driving_masks_of_a_window_are_those_of_its_frames(arch):
    told, latents = clip(references=1)
    times = grid("euler", 2, 3.0).timesteps
    got, want = (
        denoiser.bind(told, GUIDED)(latents[:, 1:], [1, 2], 1, times[1])
        for denoiser in (tiny(arch), tiny())
    )
    assert_near(got, want)


def test_a_package_of_preview_takes_no_roles_and_one_of_scail_2_no_clip_without():
    told, latents = clip()
    preview = PackagedDenoiser(
        PackageWeights(open_package(tiny_package(SM90)), CPU), reference_ops()
    )
    for denoiser, conditions in ((preview, told), (tiny(SM90), replace(told, roles=None))):
        with pytest.raises(AssertionError):
            velocity(denoiser, conditions, latents, GUIDED)
